"""Where latents fire, as delphi (EleutherAI's auto-interpretation library) keeps it, so that its tools can go on.

A folder for each hookpoint (the path of the module below the model's base) with files `<first>_<last>.safetensors`,
both latents included, and `config.json`. A file holds `locations`, one row (context, position, latent − first) an
activation, `activations` beside it, and `tokens`, all contexts. It is the layout of delphi's `LatentCache.save_splits`
(commit 3c2e139), which `LatentDataset` reads.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from safetensors.numpy import save_file
from torch import Tensor

from mxd.atomic import partial_path, sync_file, write_json_atomically
from mxd.evaluation.firings import Firings

LEAST = 1e-5
"""Values up to this are no activations to delphi."""


def export_latents(
    firings: Firings,
    contexts: Int[Tensor, "n context"],
    num_latents: int,
    folder: Path,
    *,
    hookpoint: str,
    model: str,
    text: str,
    splits: int = 5,
) -> list[Path]:
    """Write where latents fire in delphi's cache format; return the files.

    Args:
        firings: Where they fire.
        contexts: The tokens.
        num_latents: Size of the code.
        folder: The cache: what delphi takes as `raw_dir`.
        hookpoint: Path of the MLP below the model's base, as in `h.3.mlp`.
        model: Hub id or folder, from which delphi loads the tokenizer.
        text: What the tokens are of.
        splits: Files; fewer where there are fewer latents.

    Raises:
        ValueError: If the hookpoint is no name of a folder.
    """
    if not hookpoint or Path(hookpoint).name != hookpoint:
        raise ValueError(f"A hookpoint must be a module's path such as h.3.mlp; got {hookpoint!r}.")
    target = folder / hookpoint
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*_*.safetensors"):
        old.unlink()
    tokens = contexts.cpu().numpy().astype(np.int64)
    written: list[Path] = []
    bounds = np.linspace(0, num_latents, min(splits, num_latents) + 1).astype(int).tolist()
    for first, end in pairwise(bounds):
        path = target / f"{first}_{end - 1}.safetensors"
        partial = partial_path(path)
        try:
            save_file({**_split(firings, first, end), "tokens": tokens}, partial)
            sync_file(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        written.append(path)
    write_json_atomically(target / "config.json", _config(contexts, model, text, len(written)))
    return [*written, target / "config.json"]


def _split(firings: Firings, first: int, end: int) -> dict[str, np.ndarray]:
    latents = firings.latents
    start, stop = torch.searchsorted(latents, torch.tensor([first, end], dtype=latents.dtype)).tolist()
    some = Firings(*(column[start:stop] for column in firings))
    kept = some.values > LEAST
    columns: Sequence[Tensor] = (some.contexts, some.positions, some.latents - first)
    locations = torch.stack([column[kept].long() for column in columns], 1).numpy()
    fits = not locations.size or int(locations.max()) < 2**16
    values = some.values[kept].numpy()
    large = bool(values.size) and float(values.max()) > float(np.finfo(np.float16).max)
    return {
        "locations": locations.astype(np.uint16 if fits else np.uint32),
        "activations": values if large else values.astype(np.float16),
    }


def _config(contexts: Int[Tensor, "n context"], model: str, text: str, splits: int) -> dict[str, object]:
    # The names of delphi's CacheConfig; versions differ in two of them. The tokens are in the files, so nothing of a
    # data set is loaded.
    context = contexts.shape[1]
    return {
        "dataset_repo": text,
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "dataset_row": "text",
        "batch_size": 1,
        "cache_ctx_len": context,
        "ctx_len": context,
        "n_tokens": contexts.numel(),
        "n_splits": splits,
        "model_name": model,
    }
