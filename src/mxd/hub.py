"""Layers on the Hugging Face hub: the same folders as on disk, with a model card."""

import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mxd.atomic import write_text_atomically
from mxd.checkpoint import (
    CONFIG_FILE,
    EDITS_FILE,
    LAYER_FILES,
    LAYERS_FOLDER,
    Checkpoint,
    Provenance,
    edits_digest,
    layer_folders,
    load_checkpoint,
    load_layer,
    save_layer,
)
from mxd.layers import SparseLayer

CARD_FILE = "README.md"
_COLUMNS = ("k", "ce_increase", "loss_recovered", "kl", "nmse", "fvu", "l0", "dead_fraction", "specialisation")


def from_pretrained(repository: str, *, subfolder: str = "", revision: str | None = None) -> SparseLayer:
    """Return a layer from the hub, or from a local folder in the hub's layout, as `mxd.load` does.

    Args:
        repository: A hub id such as `someone/gpt2-mxd`, or a local folder.
        subfolder: The layer's folder in the repository, as in `layers/8/mxd-k32`; not needed where it holds just one.
        revision: Branch, tag or commit on the hub; the newest where it is None.

    Raises:
        FileNotFoundError: If there is no such repository or folder, or a file is missing in it.
        ValueError: If a file is damaged, or the repository holds several layers and none is named.
    """
    local = Path(repository)
    return load_layer((local if local.is_dir() else _download(repository, subfolder, revision)) / subfolder)


def push_to_hub(
    layers: SparseLayer | str | Path, repository: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload a layer, a layer's folder, or all layers of a run, with a model card; return the commit's address.

    Args:
        layers: A layer, as `mxd.save` would write it; a folder that `mxd.save` wrote; or a finished run.
        repository: Hub id; made where it does not exist.
        private: Whether a new repository is private.
        token: Access token; the one that is logged in where it is None.

    Raises:
        FileNotFoundError: If the folder holds no layer.
        ValueError: As `model_card`; for a layer, as `mxd.save`.
    """
    if isinstance(layers, SparseLayer):
        with tempfile.TemporaryDirectory() as place:
            save_layer(layers, place)
            return push_to_hub(place, repository, private=private, token=token)
    from huggingface_hub import HfApi

    from mxd.evaluation.record import EVALUATION_FILE

    folder = Path(layers)
    write_text_atomically(folder / CARD_FILE, model_card(folder))
    api = HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    names = (CARD_FILE, *LAYER_FILES, EVALUATION_FILE, "frontier.png")
    wanted = [*names, *(f"{LAYERS_FOLDER}/*/*/{name}" for name in LAYER_FILES)]
    # Edits that were undone here are undone there.
    outdated = [EDITS_FILE, f"{LAYERS_FOLDER}/*/*/{EDITS_FILE}"]
    return str(
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=wanted, delete_patterns=outdated)
    )


def model_card(folder: str | Path) -> str:
    """Return the model card of a layer's folder, or of a run: what the layers are, how good they are, how to use them.

    Raises:
        FileNotFoundError: If the folder holds no layer.
        ValueError: If a layer is damaged, or evaluation.json is of another version of mxd or of other edits.
    """
    from huggingface_hub import ModelCardData

    folder = Path(folder)
    paths = [folder] if (folder / CONFIG_FILE).is_file() else layer_folders(folder)
    if not paths:
        raise FileNotFoundError(f"{folder} must hold a layer or a finished run; it has neither. Check the path.")
    layers = {path.relative_to(folder).as_posix(): load_checkpoint(path) for path in paths}
    origins = [layer.provenance for layer in layers.values() if layer.provenance.model]
    models = sorted({str(origin.model) for origin in origins if is_of_the_hub(origin)})
    names = models or sorted({Path(str(origin.model)).name for origin in origins})
    header = ModelCardData(
        library_name="mxd", base_model=models or None, tags=["mechanistic-interpretability", "mixture-of-decoders"]
    )
    rows = [
        f"| `{name}` | {stored.layer.kind} | {_known(stored.provenance.layer)} | {stored.layer.config.num_latents:,} "
        f"| {stored.layer.config.k} | {_known(stored.provenance.text)} | {_known(stored.provenance.tokens_trained)} |"
        for name, stored in layers.items()
    ]
    first = next(iter(layers))
    subfolder = "" if first == "." else f', subfolder="{first}"'
    lines = [
        f"---\n{header.to_yaml()}\n---",
        f"# Sparse replacements for MLPs of {', '.join(names) or 'a language model'}",
        f"Each layer is of the MLP of one block of the Hugging Face model, whose output it predicts. {_inputs(layers)} "
        "Made with mxd.",
        "| folder | kind | block | latents | k | trained on | tokens |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(rows),
        *_evaluation(folder),
        f'```python\nimport mxd\n\nlayer = mxd.from_pretrained("REPOSITORY"{subfolder})\n```',
    ]
    return "\n\n".join(lines) + "\n"


def is_of_the_hub(origin: Provenance) -> bool:
    """Whether a layer's model has an id: the hub refuses others, and a folder's place is the trainer's own business.

    A revision shows that what looks like an id is one, also where a folder is called so here; without one, only names
    with an owner are ids.
    """
    name = str(origin.model)
    if origin.revision is not None:
        return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def _inputs(layers: Mapping[str, Checkpoint]) -> str:
    """Return what the layers are given, which is said of single ones only where they differ."""
    reading = [name for name, stored in layers.items() if stored.layer.reads == "output"]
    of_output = "is given the MLP's own output, and so stands behind the MLP, which stays"
    if not reading:
        return "It is given the MLP's input and stands in the MLP's place."
    if len(reading) == len(layers):
        return f"It {of_output}."
    names = ", ".join(f"`{name}`" for name in reading)
    return f"It is given the MLP's input and stands in the MLP's place; but {names} {of_output}."


def _evaluation(folder: Path) -> list[str]:
    """Return the table of what `mxd evaluate` measured, if it was run."""
    # These import what draws and measures, which nobody needs who loads a layer.
    from mxd.evaluation.grid import layer_name
    from mxd.evaluation.record import EVALUATION_FILE, read_record

    path = folder / EVALUATION_FILE
    if not path.is_file():
        return []
    evaluation = read_record(path)
    if evaluation.identity.edits != edits_digest(folder):
        raise ValueError(
            f"{path} must be of the edits that are in force; it is of others. Run mxd evaluate again, or remove it."
        )
    rows = [
        f"| {layer_name(row.layer)}, `{row.student}` | "
        + " | ".join(_number(getattr(row, column)) for column in _COLUMNS)
        + " |"
        for row in evaluation.rows
    ]
    head = "| student | " + " | ".join(_COLUMNS) + " |\n" + "|---" * (len(_COLUMNS) + 1) + "|"
    facts = "; ".join(f"{name}: {value}" for name, value in evaluation.facts.items())
    return [
        "## Faithfulness",
        f"Measured by `mxd evaluate` ({facts}); losses in nats a token.",
        "\n".join([head, *rows]),
    ]


def _number(value: int | float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _known(value: str | int | None) -> str:
    return "–" if value is None else str(value)


def _download(repository: str, subfolder: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    below = f"{subfolder.rstrip('/')}/" if subfolder else "**/"
    wanted = [*LAYER_FILES, *(f"{below}{name}" for name in LAYER_FILES)]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"a layer must be a local folder or a hub repository; {repository!r} is no folder here and could not be "
            f"fetched from the hub ({type(error).__name__}). Check the spelling, the network and your access."
        ) from error
