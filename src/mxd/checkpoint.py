"""A layer as a folder: `config.json` and `model.safetensors`, on disk or on the Hugging Face hub. Nothing is unpickled.

`config.json` holds everything that is not a tensor: the kind, its configuration, where the layer belongs (model,
revision, block, module path) and the weights' checksum. Tensors are stored `(in, out)` and row-contiguous, whatever
their layout in memory.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mxd.atomic import write_bytes_atomically, write_json_atomically
from mxd.layers import SparseLayer, require_kind

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a layer belongs and how it came about; every field is None where it is not known."""

    model: str | None = None
    """Hub id or folder of the language model whose MLP was decomposed."""
    revision: str | None = None
    """The model's revision on the hub."""
    layer: int | None = None
    """Index of the block whose MLP the layer stands for."""
    module_path: str | None = None
    """Dotted path of that MLP in the Hugging Face model; x is its input and the target its output, unfolded."""
    text: str | None = None
    """What the layer was trained on."""
    tokens_trained: int | None = None
    """Number of tokens it was trained on."""
    seed: int | None = None
    """Seed of its initialisation."""
    init: str | None = None
    """Name of its initialisation."""
    special_positions: str | None = None
    """`replace`, or `passthrough` where the original MLP stays at special tokens."""
    mxd_version: str | None = None
    """Version of mxd that trained it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A layer together with where it belongs."""

    layer: SparseLayer
    """The layer, in evaluation mode."""
    provenance: Provenance
    """Where it belongs."""


def save_layer(layer: SparseLayer, folder: str | Path, provenance: Provenance | None = None) -> None:
    """Write a layer's two files; each appears whole or not at all, and equal layers give equal bytes.

    Args:
        layer: The layer; it is moved to the CPU for writing and stays as it is.
        folder: Where to write; made where it does not exist.
        provenance: Where the layer belongs, if it is known.

    Raises:
        ValueError: If the layer's kind is not registered, so that the folder could not be loaded.
        OSError: If the folder cannot be written.
    """
    require_kind(layer.kind)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.state_dict().items()}
    weights = save(tensors)
    config = {
        "format": "mxd",
        "format_version": FORMAT_VERSION,
        "kind": layer.kind,
        "layer": asdict(layer.config),  # pyright: ignore[reportArgumentType]  # every config is a dataclass
        "provenance": asdict(provenance or Provenance()),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    write_bytes_atomically(folder / WEIGHTS_FILE, weights)
    write_json_atomically(folder / CONFIG_FILE, config)


def load_layer(source: str | Path, *, subfolder: str = "", revision: str | None = None) -> SparseLayer:
    """Return a layer from a local folder or from the hub, in evaluation mode, on the CPU, in the type it was saved in.

    Args:
        source: A folder that `save_layer` wrote, a run's folder with a single student, or a hub id.
        subfolder: Folder of the layer below the source, as in `layers/8/mxd-k32`.
        revision: Revision on the hub; the newest where it is None.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or a file is missing in it.
        ValueError: If a file is damaged, is not what its checksum says, has unknown keys or non-finite weights.
    """
    return load_checkpoint(source, subfolder=subfolder, revision=revision).layer


def load_checkpoint(source: str | Path, *, subfolder: str = "", revision: str | None = None) -> Checkpoint:
    """Return a layer with its provenance; see `load_layer`."""
    folder = _layer_folder(source, subfolder, revision)
    config = _read_config(folder / CONFIG_FILE)
    layer_kind = require_kind(cast(str, config["kind"]))
    layer_fields = cast(dict[str, object], config["layer"])
    _require_fields(folder / CONFIG_FILE, "layer", layer_fields, {field.name for field in fields(layer_kind.config)})
    provenance_fields = cast(dict[str, object], config["provenance"])
    known = {field.name for field in fields(Provenance)}
    _require_fields(folder / CONFIG_FILE, "provenance", provenance_fields, known)
    _require_types(folder / CONFIG_FILE, layer_kind.config, layer_fields)
    with torch.random.fork_rng(devices=[]):
        layer = layer_kind.layer(layer_kind.config(**layer_fields))  # pyright: ignore[reportCallIssue]
    tensors = _read_weights(folder / WEIGHTS_FILE, cast(str, config["weights_sha256"]))
    expected = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(
            f"{folder / WEIGHTS_FILE} must hold the tensors that {CONFIG_FILE} describes; {', '.join(wrong)} "
            "differ in name or shape. Restore both files from the same source."
        )
    layer.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
    return Checkpoint(layer=layer.eval(), provenance=Provenance(**provenance_fields))  # pyright: ignore[reportArgumentType]


def _layer_folder(source: str | Path, subfolder: str, revision: str | None) -> Path:
    local = Path(source)
    if not local.exists():
        local = _download(str(source), subfolder, revision)
    folder = local / subfolder
    if (folder / CONFIG_FILE).is_file():
        return folder
    layers = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob(f"layers/*/*/{CONFIG_FILE}"))
    if len(layers) == 1:
        return folder / layers[0]
    if layers:
        raise ValueError(f"{source} holds several layers; name one of them: {', '.join(layers)}.")
    raise FileNotFoundError(f"{folder} must hold a layer's {CONFIG_FILE} and {WEIGHTS_FILE}; it has no {CONFIG_FILE}.")


def _download(repository: str, subfolder: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    below = f"{subfolder.rstrip('/')}/" if subfolder else "**/"
    try:
        wanted = [CONFIG_FILE, WEIGHTS_FILE, f"{below}{CONFIG_FILE}", f"{below}{WEIGHTS_FILE}"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"a layer must be a local folder or a hub repository; {repository!r} is no folder here and could not be "
            f"fetched from the hub ({type(error).__name__}). Check the spelling, the network and your access."
        ) from error


def _read_config(path: Path) -> Mapping[str, object]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; it does not parse ({error}). Restore it from its source.") from error
    if not isinstance(config, dict) or cast(dict[str, object], config).get("format") != "mxd":
        raise ValueError(f'{path} must describe an mxd layer ("format": "mxd"); this is some other configuration.')
    config = cast(dict[str, object], config)
    known = {"format", "format_version", "kind", "layer", "provenance", "weights_sha256"}
    _require_fields(path, "the top level", config, known)
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} must have format version {FORMAT_VERSION}; it has {config['format_version']}. "
            "Load it with the version of mxd that wrote it."
        )
    return config


def _require_fields(path: Path, place: str, found: Mapping[str, object], known: set[str]) -> None:
    unknown, missing = sorted(found.keys() - known), sorted(known - found.keys())
    if unknown:
        raise ValueError(
            f"{path} has unknown keys in {place}: {', '.join(unknown)}; known are {', '.join(sorted(known))}. "
            "A newer mxd may have written it; remove them or upgrade."
        )
    if missing:
        raise ValueError(f"{path} must have every key in {place}; {', '.join(missing)} are missing.")


def _require_types(path: Path, config: type, found: Mapping[str, object]) -> None:
    for field in fields(config):
        if field.type in (int, bool) and type(found[field.name]) is not field.type:
            raise ValueError(f"{path} must give {field.name} as {field.type.__name__}; got {found[field.name]!r}.")


def _read_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must lie beside {CONFIG_FILE}; it is missing. Restore it from its source.")
    if _sha256(path) != sha256:
        raise ValueError(
            f"{path} must have the checksum that {CONFIG_FILE} names; it is truncated or was altered. "
            "Restore it from its source."
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file; it does not parse ({error}).") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path} must hold finite weights; {name} has NaN or infinite entries. Train it anew.")
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
