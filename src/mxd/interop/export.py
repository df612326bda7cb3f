"""Layers written as other tools read them: single ones, and those of a run."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, cast

from torch import nn

from mxd.atomic import JSON, filled_folder, require_new_folder
from mxd.checkpoint import layer_folder, load_layer, saved_kind
from mxd.data.text import is_hub_dataset
from mxd.edits import edits_of
from mxd.evaluation.opening import load_run_outline, read_finished_run
from mxd.evaluation.students import chosen_students
from mxd.hub import CARD_FILE, is_of_the_hub
from mxd.interop.card import card
from mxd.interop.circuit_tracer import require_circuit_tracer, require_whole_set, write_circuit_tracer
from mxd.interop.files import write_text
from mxd.interop.places import Place, Prepared, place_of
from mxd.interop.plain import FORMATS, DoesNotFit, Format, plain_layer, require_plain_kind
from mxd.interop.saelens import require_saelens, write_saelens
from mxd.interop.sparsify import require_sparsify, write_sparsify
from mxd.layers import SparseLayer
from mxd.models import require_model
from mxd.printable import printable


class LeftOut(NamedTuple):
    """A student that a format has no place for."""

    student: str
    """Its name, `<layer>/<id>`."""
    reason: str
    """Why, and what would fit."""


class Exported(NamedTuple):
    """What was written of a run, and what was not."""

    files: list[Path]
    """The files."""
    left_out: list[LeftOut]
    """Students that do not fit, where all were asked for that do."""


def export_layers(layers: Sequence[SparseLayer], folder: str | Path, form: Format, *, model: nn.Module) -> list[Path]:
    """Write layers of one language model as another tool reads them; return the files.

    The folder is there whole, or not at all. Edits are written into the weights where these can hold them.

    Args:
        layers: At most one for each block; each remembers its own (`layer.provenance`).
        folder: Where to write; it must not exist, or be empty.
        form: `sparsify`, `saelens` or `circuit-tracer`, which needs a layer for every block.
        model: The Hugging Face model; of its weights nothing is read, so `mxd.models.load_outline` will do.

    Raises:
        DoesNotFit: If the format has no place for a layer: a ValueError that says why and what would fit.
        TypeError: If the model is none of PyTorch's, or these are no layers.
        ValueError: If the folder holds something or is a link, a layer does not know its block or has weights that are
            not finite, two are of one block, or there is no such format.
    """
    folder = Path(folder)
    _require_format(form)
    require_model(model)
    _require_layers(layers)
    require_new_folder(folder, "An export")
    prepared = [_prepare(layer, model, form) for layer in layers]
    _require_group(prepared, form)
    return _write_whole({"": prepared}, folder, form)


def export_run(
    run: str | Path,
    folder: str | Path,
    form: Format,
    *,
    students: Collection[str] = (),
    model: str | None = None,
) -> Exported:
    """Write students of a run as another tool reads them, those of one id in a folder that is called so.

    Args:
        run: Folder of a finished run.
        folder: Where to write; it must not exist, or be empty.
        form: `sparsify`, `saelens` or `circuit-tracer`.
        students: Ids such as `transcoder-k32` or `8/transcoder-k32`; all that fit where empty.
        model: Where the language model is now, if it is not where the run found it; only its config.json is read.

    Raises:
        DoesNotFit: If the format has no place for a student that was named, or for any.
        FileNotFoundError: If the model or a file of a layer is missing.
        ValueError: If the run is not finished, has no such student or one whose id names no folder or whose layer is of
            another block, the layer is damaged, or the folder holds something or is a link.
    """
    run, folder = Path(run), Path(folder)
    _require_format(form)
    require_new_folder(folder, "An export")
    description = read_finished_run(run)
    chosen = [description["students"][number] for number in chosen_students(run, description["students"], students)]
    for student in chosen:
        _require_own_folder(run, student["id"])
    outline = load_run_outline(run, description, model)
    groups: dict[str, list[Prepared]] = {}
    left_out: list[LeftOut] = []
    for student in chosen:
        block, id = cast(int, student["layer"]), cast(str, student["id"])
        saved = layer_folder(run, f"{block}/{id}")
        try:
            # Before it is loaded: of most runs, what fits is the smaller part.
            require_plain_kind(saved_kind(saved).layer, form)
            found = _prepare(_load_of_block(saved, block), outline, form)
        except DoesNotFit as error:
            left_out.append(LeftOut(f"{block}/{id}", str(error)))
        else:
            groups.setdefault(id, []).append(found)
    for id, members in list(groups.items()):
        try:
            _require_group(members, form)
        except DoesNotFit as error:
            left_out += [LeftOut(f"{one.place.block}/{id}", str(error)) for one in members]
            del groups[id]
    if left_out and (students or not groups):
        # Where nothing was named, the last came closest to fitting.
        told = left_out[0 if students else -1]
        nothing = "" if students else f"Nothing of {run} fits {form}. "
        raise DoesNotFit(f"{nothing}{told.student} cannot be exported: {told.reason}")
    return Exported(_write_whole(groups, folder, form), left_out)


def _require_format(form: str) -> None:
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {form!r}.")


def _require_layers(layers: object) -> None:
    if isinstance(layers, SparseLayer) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a list of layers, such as [layer]; got {type(layers).__name__}.")
    strangers = [one for one in cast("Sequence[object]", layers) if not isinstance(one, SparseLayer)]
    if strangers:
        raise TypeError(
            f"layers must be a list of sparse layers; got one with {strangers[0]!r:.60}. Load layers with mxd.load."
        )


def _require_own_folder(run: Path, id: str) -> None:
    """Check that a student's files can be in a folder of its name, beside the page and no other place."""
    is_plain = printable(id) == id and not set(id) & set("/\\") and id.casefold() != CARD_FILE.casefold()
    if not is_plain or id in ("", ".", ".."):
        raise ValueError(f"A student's id must be the name of a folder; {run} has {id!r:.60}. Restore its run.json.")


def _load_of_block(folder: Path, block: int) -> SparseLayer:
    layer = load_layer(folder)
    known = layer.provenance.layer
    if known != block:
        raise ValueError(
            f"{folder} must hold a layer of block {block}, as run.json says; it holds one of "
            f"{'an unknown block' if known is None else f'block {known}'}. Restore both from the same run."
        )
    return layer


def _prepare(layer: SparseLayer, model: nn.Module, form: Format) -> Prepared:
    plain, place = plain_layer(layer, form), place_of(layer, model)
    match form:
        case "sparsify":
            require_sparsify(plain, place)
        case "saelens":
            require_saelens(plain, place)
        case "circuit-tracer":
            require_circuit_tracer(plain, place)
    return Prepared(plain, place, _about(layer, place))


def _require_group(members: Sequence[Prepared], form: Format) -> None:
    if not members:
        raise ValueError("An export must be of at least one layer; got none.")
    blocks = [one.place.block for one in members]
    twice = [block for block in set(blocks) if blocks.count(block) > 1]
    if twice:
        raise ValueError(f"An export must have one layer a block; got several of block {twice[0]}.")
    if form == "circuit-tracer":
        require_whole_set(members)


def _write_whole(groups: Mapping[str, Sequence[Prepared]], folder: Path, form: Format) -> list[Path]:
    with filled_folder(folder) as partial:
        _write(groups, partial, form)
        names = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
    return [folder / name for name in names]


def _write(groups: Mapping[str, Sequence[Prepared]], folder: Path, form: Format) -> None:
    for id, members in groups.items():
        target = folder / id
        target.mkdir(exist_ok=True)
        match form:
            case "sparsify":
                for one in members:
                    write_sparsify(one.layer, one.place, one.about, target)
            case "saelens":
                for one in members:
                    write_saelens(one.layer, one.place, one.about, target)
            case "circuit-tracer":
                about = _common([one.about for one in members])
                write_circuit_tracer(members, about, target)
    abouts = {id: [one.about for one in members] for id, members in groups.items()}
    write_text(folder / CARD_FILE, card(form, abouts))


def _about(layer: SparseLayer, place: Place) -> dict[str, JSON]:
    """Return what is known of a layer, with no folder of this machine in it."""
    known = layer.provenance
    name, text = known.model, known.text
    if name is not None and not is_of_the_hub(known):
        name = _base_name(name)
    if text is not None and not is_hub_dataset(text):
        text = ", ".join(map(_base_name, text.split(", ")))
    config = cast("Mapping[str, Any]", asdict(cast(Any, layer.config)))
    return {
        **asdict(known),
        "model": name,
        "text": text,
        "layer": place.block,
        "module_path": place.path,
        "kind": layer.kind,
        "selection": config["selection"],
        "k": layer.config.k,
        "num_latents": layer.config.num_latents,
        # An edited row has another length.
        "normalize_decoder": bool(config.get("normalize_decoder", False)) and not edits_of(layer),
        "edits": [edit.to_json() for edit in edits_of(layer)],
    }


def _base_name(path: str) -> str:
    # Which knows both kinds of slash; a run may have been trained elsewhere.
    return PureWindowsPath(path).name


def _common(abouts: Iterable[Mapping[str, JSON]]) -> dict[str, JSON]:
    """Return what is the same of all layers, and what is not as a list in their order."""
    together: dict[str, list[JSON]] = {}
    for about in abouts:
        for key, value in about.items():
            together.setdefault(key, []).append(value)
    return {
        key: values[0] if all(value == values[0] for value in values) else values for key, values in together.items()
    }
