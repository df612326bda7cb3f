"""EleutherAI's sparsify: a folder for each hookpoint, with `cfg.json` and `sae.safetensors`; `mxd.json` is ours.

What its `SparseCoder` computes, as read in eai-sparsify 1.3.3: the k largest of `relu(encoder(x'))`, times rows of
`W_dec`, plus `b_dec`, plus `x @ W_skip.T`; x' is x for a transcoder (`transcode`) and x less `b_dec` otherwise. There
is one width. A hookpoint is a module's path below the model's base; a transcoder reads the module's input, anything
else its output, which is what our layers read.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mxd.atomic import JSON, json_text
from mxd.interop.files import write_tensors, write_text
from mxd.interop.places import Place, require_own_module
from mxd.interop.plain import DoesNotFit, PlainLayer, require_one_width, require_weights
from mxd.layers import (
    Provenance,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseLayer,
    TopKAutoencoder,
    TopKAutoencoderConfig,
    Transcoder,
    TranscoderConfig,
)
from mxd.models.families import USUAL_NAMES

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
ABOUT_FILE = "mxd.json"
"""Where the layer comes from, for people."""


def require_sparsify(layer: PlainLayer, place: Place) -> None:
    """Check that sparsify can hold a layer.

    Raises:
        DoesNotFit: If it cannot.
    """
    require_one_width(layer, "sparsify")
    if layer.rule != "topk":
        raise DoesNotFit(
            f"sparsify keeps the k largest scores of each token; selection {layer.rule} keeps as many as there are "
            f"above {'a threshold' if layer.rule == 'batch-topk' else 'zero'}. What fits: --format saelens or "
            "circuit-tracer, or a layer that was trained with selection topk."
        )
    require_own_module(place, "sparsify")


def write_sparsify(layer: PlainLayer, place: Place, about: Mapping[str, JSON], folder: Path) -> None:
    """Write one layer's folder below that of the hookpoints."""
    target = folder / str(place.hookpoint)
    target.mkdir()
    tensors = {
        "encoder.weight": layer.W_enc.t(),
        "encoder.bias": layer.b_enc,
        "W_dec": layer.W_dec,
        "b_dec": layer.b_dec,
    }
    if layer.W_skip is not None:
        tensors["W_skip"] = layer.W_skip.t()
    write_tensors(target / WEIGHTS_FILE, tensors)
    config = {
        "activation": "topk",
        "num_latents": layer.num_latents,
        "k": layer.k,
        "multi_topk": False,
        "skip_connection": layer.W_skip is not None,
        "transcode": not layer.is_autoencoder,
        # Read in training alone, and of autoencoders alone.
        "normalize_decoder": bool(about["normalize_decoder"]),
        "d_in": layer.d_in,
    }
    write_text(target / CONFIG_FILE, json_text(config))
    # sparsify prints a line about every key of its own file that it does not know.
    write_text(target / ABOUT_FILE, json_text(about))


def load_sparsify(folder: str | Path, *, block: int | None = None) -> SparseLayer:
    """Return a transcoder, skip transcoder or TopK autoencoder that sparsify wrote, or mxd in sparsify's format.

    It is in evaluation mode, on the CPU, in the type that it was saved in. Nothing is unpickled. A coder trained
    with `multi_topk` becomes what its encoding decodes to; sparsify's own forward returns that of 4k latents, for the
    loss.

    Args:
        folder: The hookpoint's folder, with `cfg.json` and `sae.safetensors`.
        block: Index of the block whose MLP it stands for; where None, the number before the MLP in the folder's name,
            as in `h.8.mlp`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, weights are not finite or not of one type of 16 to 64 bits, the coder is of a
            kind that mxd has none of (GroupMax, or an autoencoder with a skip map), or no block is given and the
            folder's name is not that of a block's MLP.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"A coder of sparsify must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}; {folder} has no {name}. "
                "Give the folder of one hookpoint."
            )
    layer = _layer_of(_settings(folder / CONFIG_FILE), _tensors(folder / WEIGHTS_FILE), folder)
    layer.provenance = Provenance(layer=_block_named(folder) if block is None else block)
    return layer.eval()


def _block_named(folder: Path) -> int:
    # Coders of the residual stream, which have hookpoints such as layers.8, stand for no MLP.
    named = re.search(rf"(\d+)\.({'|'.join(USUAL_NAMES)})$", folder.resolve().name)
    if named is None:
        raise ValueError(
            f"A coder must be one of a block's MLP, in a folder such as h.8.mlp; this one is in {folder.name!r}. If it "
            "is of an MLP, say of which block with block=."
        )
    return int(named[1])


def _settings(path: Path) -> dict[str, Any]:
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    # What is nested deeper than Python's stack raises the latter.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON; it does not parse ({error}). Fetch it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, as sparsify writes it. Fetch it again.")
    settings = {"activation": "topk", "skip_connection": False, "transcode": False, **cast("dict[str, Any]", found)}
    if settings["activation"] != "topk":
        raise ValueError(
            f"{path} must have activation topk to be read; it has {str(settings['activation'])[:40]!r}, and mxd has no "
            "kind that computes that."
        )
    if settings["skip_connection"] and not settings["transcode"]:
        raise ValueError(f"{path} must be a transcoder where it has a skip map; mxd has no such autoencoder.")
    if type(settings.get("k")) is not int:
        raise ValueError(f"{path} must say k, a whole number; it does not. Fetch it again.")
    return settings


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be safetensors; it is damaged ({error}). Fetch it again.") from error
    require_weights(str(path), tensors)
    return tensors


def _layer_of(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> SparseLayer:
    wanted = {"encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if settings["skip_connection"] else [])}
    if set(tensors) != wanted or tensors["encoder.weight"].ndim != 2:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} must hold {', '.join(sorted(wanted))}, as {CONFIG_FILE} says; it holds "
            f"{', '.join(sorted(tensors)) or 'nothing'}. Fetch both from the same source."
        )
    num_latents, width = tensors["encoder.weight"].shape
    k = cast(int, settings["k"])
    with torch.random.fork_rng(devices=[]):
        if settings["skip_connection"]:
            layer = SkipTranscoder(SkipTranscoderConfig(d_in=width, d_out=width, num_latents=num_latents, k=k))
        elif settings["transcode"]:
            # sparsify keeps rows at unit length in autoencoders alone.
            sizes = TranscoderConfig(d_in=width, d_out=width, num_latents=num_latents, k=k, normalize_decoder=False)
            layer = Transcoder(sizes)
        else:
            unit = bool(settings.get("normalize_decoder", True))
            sizes = TopKAutoencoderConfig(d_in=width, num_latents=num_latents, k=k, normalize_decoder=unit)
            layer = TopKAutoencoder(sizes)
    ours = {
        "W_enc": tensors["encoder.weight"].t(),
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if settings["skip_connection"]:
        ours["W_skip"] = tensors["W_skip"].t()
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    wrong = [name for name, tensor in ours.items() if tuple(tensor.shape) != shapes[name]]
    if wrong:
        raise ValueError(f"{folder / WEIGHTS_FILE} must hold tensors that fit each other; {', '.join(wrong)} does not.")
    layer.to(tensors["encoder.weight"].dtype).load_state_dict(ours)
    return layer
