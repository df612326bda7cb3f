"""A layer as a folder: `config.json`, `model.safetensors` and its edits, if any. Nothing is ever unpickled.

`config.json` holds everything that is not a tensor: the kind, its configuration, where the layer belongs (model,
revision, block, module path) and the weights' checksum. `edits.json` holds what is done to every code of the layer
(`mxd.edits`), and the checksum of the weights that it is meant for. Tensors are stored `(in, out)` and row-contiguous,
whatever their layout in memory.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Literal, cast, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mxd.atomic import file_sha256, json_text, sync_folder, write_json_atomically, write_together
from mxd.edits import Edit, edits_of, with_edits
from mxd.layers import LAYERS, LayerKind, Provenance, SparseLayer, field_types, require_kind, require_kind_of

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
EDITS_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
EDITS_FILE = "edits.json"
LAYER_FILES = (CONFIG_FILE, WEIGHTS_FILE, EDITS_FILE)
"""Everything that makes up a layer; the last is there if it is edited."""
LAYERS_FOLDER = "layers"
"""The folder of a run that holds its layers, as `<layer>/<id>`."""
LATER_FIELDS: Mapping[str, object] = {"selection": "topk", "shared_expert": False}
"""What layers do whose config.json was written before these keys of `layer` existed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A layer together with where it belongs."""

    layer: SparseLayer
    """The layer, in evaluation mode."""
    provenance: Provenance
    """Where it belongs, which the layer itself remembers too."""
    weights_sha256: str
    """SHA-256 of the file of its weights, which edits leave as it is."""


def save_layer(layer: SparseLayer, folder: str | Path, provenance: Provenance | None = None) -> None:
    """Write a layer's two files, and a third if it is edited; a layer that was there stays whole until all are written.

    Equal layers give equal bytes. Edits of a layer that was there are removed.

    Args:
        layer: The layer; it is moved to the CPU for writing and stays as it is.
        folder: Where to write; made where it does not exist.
        provenance: Where the layer belongs; what the layer itself says of that where None. Of a layer that was loaded
            and whose weights have changed since, that is its place only, and not how the loaded weights came about.

    Raises:
        ValueError: If the folder could not be loaded: the layer's kind is not registered or another class's, or its
            weights have several types.
        OSError: If the folder cannot be written.
    """
    require_kind_of(layer)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.state_dict().items()}
    require_one_dtype(layer.kind, tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save(tensors)
    sha256 = hashlib.sha256(weights).hexdigest()
    config = {
        "format": "mxd",
        "format_version": FORMAT_VERSION,
        "kind": layer.kind,
        "layer": asdict(layer.config),  # pyright: ignore[reportArgumentType]  # every config is a dataclass
        "provenance": asdict(_remembered(layer, sha256, folder) if provenance is None else provenance),
        "weights_sha256": sha256,
    }
    files = {folder / WEIGHTS_FILE: weights, folder / CONFIG_FILE: json_text(config).encode()}
    edits = edits_of(layer)
    if edits:
        files[folder / EDITS_FILE] = json_text(_edits_content(edits, sha256)).encode()
    write_together(files)
    if not edits:
        (folder / EDITS_FILE).unlink(missing_ok=True)


def _remembered(layer: SparseLayer, sha256: str, folder: Path) -> Provenance:
    """Return what a layer says of its provenance that is still true of its weights."""
    known = layer.provenance
    if layer.loaded_sha256 in (None, sha256) or known == known.place:
        return known
    logger.warning(
        "The weights of this %s have changed since they were loaded: %s keeps the block and the model that it belongs "
        "to, and not what it was trained on. Pass provenance= to say that.",
        layer.kind,
        folder / CONFIG_FILE,
    )
    return known.place


def save_edits(folder: str | Path, *groups: Sequence[Edit]) -> None:
    """Write which edits are in force in a saved layer, in place of those that were; its other files stay as they are.

    Args:
        folder: As `load_layer` takes it.
        groups: What is done to every code, in groups of edits that came together and are taken back together; none
            undoes everything, and the layer is again as it was trained.

    Raises:
        FileNotFoundError: As `load_layer`.
        ValueError: As `load_layer`; if an edit is for chosen positions, or for a latent that the layer has not.
    """
    folder = _layer_folder(Path(folder))
    edits = list(chain(*groups))
    with_edits(load_layer(folder), edits)
    if edits:
        sha256 = cast(str, _read_config(folder / CONFIG_FILE)["weights_sha256"])
        sizes = [len(group) for group in groups if group]
        write_json_atomically(folder / EDITS_FILE, {**_edits_content(edits, sha256), "groups": sizes})
    else:
        (folder / EDITS_FILE).unlink(missing_ok=True)
        sync_folder(folder)


def saved_edits(folder: str | Path) -> list[tuple[Edit, ...]]:
    """Return the edits that are in force in a saved layer, in the groups in which `save_edits` got them.

    Raises:
        FileNotFoundError: As `load_layer`.
        ValueError: If the layer's edits.json or config.json is damaged, or they are not meant for each other.
    """
    folder = _layer_folder(Path(folder))
    sha256 = cast(str, _read_config(folder / CONFIG_FILE)["weights_sha256"])
    return _read_edits(folder / EDITS_FILE, sha256)


def layer_folder(run: Path, name: str) -> Path:
    """Return the folder of a student of a run, whether it is there or not; its name is `<layer>/<id>`."""
    return run / LAYERS_FOLDER / name


def layer_folders(run: Path, file: str = CONFIG_FILE) -> list[Path]:
    """Return the folders of a run's layers that hold this file, in the order of their names."""
    return sorted(found.parent for found in run.glob(f"{LAYERS_FOLDER}/*/*/{file}"))


def edits_digest(run: Path) -> str | None:
    """Return a digest of the edits in force in a run's layers; None where no layer is edited.

    What is measured of a run holds for its layers as edited: equal digests mean the same edits of the same layers,
    each in the same order. The layers themselves are not loaded.

    Args:
        run: A run's folder, with `layers/BLOCK/STUDENT`.

    Raises:
        ValueError: If an edits.json, or the config.json beside it, is damaged, or they are not meant for each other.
    """
    found = {
        folder.relative_to(run).as_posix(): [edit.to_json() for edit in chain(*saved_edits(folder))]
        for folder in layer_folders(run, EDITS_FILE)
    }
    edited = {place: edits for place, edits in found.items() if edits}
    return hashlib.sha256(json.dumps(edited, sort_keys=True).encode()).hexdigest() if edited else None


def _edits_content(edits: Sequence[Edit], weights_sha256: str) -> dict[str, object]:
    return {
        "format": "mxd-edits",
        "format_version": EDITS_VERSION,
        "weights_sha256": weights_sha256,
        "edits": [edit.to_json() for edit in edits],
    }


def _read_edits(path: Path, weights_sha256: str) -> list[tuple[Edit, ...]]:
    if not path.is_file():
        return []
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; it does not parse ({error}). Restore or remove it.") from error
    found = cast(Mapping[str, object], content if isinstance(content, dict) else {})
    known = {"format", "format_version", "weights_sha256", "edits"}
    _require_fields(path, "the top level", found, known | ({"groups"} & found.keys()))
    if (found["format"], found["format_version"]) != ("mxd-edits", EDITS_VERSION):
        raise ValueError(
            f"{path} must be edits of version {EDITS_VERSION}; it is {found['format']} {found['format_version']}. "
            "Load the layer with the version of mxd that wrote it, or remove the file."
        )
    if found["weights_sha256"] != weights_sha256:
        raise ValueError(
            f"{path} must be meant for the weights beside it; it is for others. Restore those, or remove the file."
        )
    try:
        edits = [Edit.from_json(edit) for edit in cast(Sequence[object], found["edits"])]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must list edits; {error} Restore or remove it.") from error
    # What save_layer writes has no groups: there each edit is one by itself.
    sizes = found.get("groups", [1] * len(edits))
    whole = isinstance(sizes, list) and all(type(size) is int and size > 0 for size in cast("list[object]", sizes))
    if not whole or sum(cast("list[int]", sizes)) != len(edits):
        raise ValueError(
            f"{path} must give groups as numbers of edits that sum to {len(edits)}; got {str(sizes)[:100]}. Restore it."
        )
    following = iter(edits)
    return [tuple(islice(following, size)) for size in cast("list[int]", sizes)]


def load_layer(path: str | Path) -> SparseLayer:
    """Return a layer from a local folder, in evaluation mode, on the CPU, in the type it was saved in, with its edits.

    Args:
        path: A folder that `save_layer` wrote, such as `RUN/layers/8/mxd-k32`, or a run with a single layer.

    Raises:
        FileNotFoundError: If there is no such folder, or a file is missing in it.
        ValueError: If a file is damaged, is not what its checksum says, has unknown keys or non-finite weights.
    """
    return load_checkpoint(path).layer


def saved_kind(path: str | Path) -> LayerKind:
    """Return the classes of a saved layer's kind, as its config.json names it, without loading the layer.

    Raises:
        FileNotFoundError: As `load_layer`.
        ValueError: If config.json is damaged, or the kind is not registered.
    """
    folder = _layer_folder(Path(path))
    return _kind_of(folder, _read_config(folder / CONFIG_FILE))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Return a layer with its provenance; see `load_layer`."""
    folder = _layer_folder(Path(path))
    config = _read_config(folder / CONFIG_FILE)
    layer_kind = _kind_of(folder, config)
    known = {field.name for field in fields(layer_kind.config)}
    layer_fields = {name: LATER_FIELDS[name] for name in LATER_FIELDS if name in known}
    layer_fields |= cast(dict[str, object], config["layer"])
    places = {"layer": (layer_kind.config, layer_fields), "provenance": (Provenance, config["provenance"])}
    for place, (described, found) in places.items():
        found = cast(Mapping[str, object], found)
        _require_fields(folder / CONFIG_FILE, place, found, {field.name for field in fields(described)})
        _require_types(folder / CONFIG_FILE, described, found)
    provenance_fields = cast(dict[str, object], config["provenance"])
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
    provenance = Provenance(**provenance_fields)  # pyright: ignore[reportArgumentType]
    layer.provenance, layer.loaded_sha256 = provenance, cast(str, config["weights_sha256"])
    edits = list(chain(*_read_edits(folder / EDITS_FILE, cast(str, config["weights_sha256"]))))
    try:
        layer = with_edits(layer.eval(), edits)
    except ValueError as error:
        raise ValueError(f"{folder / EDITS_FILE} must fit the layer; {error}") from error
    return Checkpoint(layer=layer, provenance=provenance, weights_sha256=cast(str, config["weights_sha256"]))


def _kind_of(folder: Path, config: Mapping[str, object]) -> LayerKind:
    if config["kind"] not in LAYERS:
        raise ValueError(
            f"{folder / CONFIG_FILE} must be of a kind that is registered, {', '.join(LAYERS)}; it is of "
            f"{config['kind']!r}. Import what registers that (mxd.register_kind) before, or upgrade mxd."
        )
    return require_kind(cast(str, config["kind"]))


def _layer_folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(
            f"a layer must be a local folder; there is none at {path}. Check the path, or fetch a layer from the "
            "hub with mxd.from_pretrained."
        )
    if (path / CONFIG_FILE).is_file():
        return path
    beside = sorted(config.parent for config in path.glob(f"*/{CONFIG_FILE}"))
    layers = [folder.relative_to(path).as_posix() for folder in layer_folders(path) or beside]
    if len(layers) == 1:
        return path / layers[0]
    if layers:
        raise ValueError(f"{path} holds several layers; name one of them: {', '.join(layers)}.")
    raise FileNotFoundError(f"{path} must hold a layer's {CONFIG_FILE} and {WEIGHTS_FILE}; it has no {CONFIG_FILE}.")


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
    for name, kind in {"kind": str, "layer": dict, "provenance": dict, "weights_sha256": str}.items():
        if not isinstance(config[name], kind):
            raise ValueError(
                f"{path} must give {name} as {kind.__name__}; got {config[name]!r}. Restore it from its source."
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


def _require_types(path: Path, described: type, found: Mapping[str, object]) -> None:
    for name, wanted in field_types(described).items():
        value, allowed = found[name], get_args(wanted) or (wanted,)
        # A field is a choice of names, a type, or a type or None; bool is an int to Python, and no number here.
        compared = value if get_origin(wanted) is Literal else type(value)
        whole = compared is int and float in allowed
        if not whole and not any(compared == one for one in allowed):
            names = ", ".join(one.__name__ if isinstance(one, type) else repr(one) for one in allowed)
            raise ValueError(
                f"{path} must give {name} as {'one of ' * (len(allowed) > 1)}{names}; got {value!r}. "
                "Restore it from its source."
            )


def _read_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must lie beside {CONFIG_FILE}; it is missing. Restore it from its source.")
    if file_sha256(path) != sha256:
        raise ValueError(
            f"{path} must have the checksum that {CONFIG_FILE} names; it is truncated or was altered. "
            "Restore it from its source."
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file; it does not parse ({error}).") from error
    require_one_dtype(str(path), tensors)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path} must hold finite weights; {name} has NaN or infinite entries. Train it anew.")
    return tensors


def require_one_dtype(where: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that weights are of one floating-point type.

    Args:
        where: What has them, for the message.
        tensors: The weights by their names.

    Raises:
        ValueError: If they are not.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{where} must have weights of one floating-point type; got {found}. Convert them with .to().")
