"""Layers written as other tools read them: single ones, and those of a run."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn

from mxd.atomic import JSON
from mxd.edits import edits_of
from mxd.evaluation.opening import load_run_outline, read_finished_run
from mxd.evaluation.students import load_students
from mxd.hub import is_of_the_hub
from mxd.interop.card import CARD_FILE, card
from mxd.interop.circuit_tracer import Member, require_circuit_tracer, require_whole_set, write_circuit_tracer
from mxd.interop.files import fill_folder, require_new_folder, write_text
from mxd.interop.places import Place, place_of
from mxd.interop.plain import FORMATS, DoesNotFit, Format, PlainLayer, plain_layer
from mxd.interop.saelens import require_saelens, write_saelens
from mxd.interop.sparsify import require_sparsify, write_sparsify
from mxd.layers import SparseLayer


class Prepared(NamedTuple):
    """A layer that fits a format."""

    layer: PlainLayer
    """What it computes."""
    place: Place
    """Where it belongs."""
    about: Mapping[str, JSON]
    """What else is known of it, for people."""


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
        ValueError: If the folder holds something, a layer does not know its block, two are of one block, or there is
            no such format.
    """
    folder = Path(folder)
    require_new_folder(folder)
    prepared = [_prepare(layer, model, form) for layer in layers]
    _require_group(prepared, form)
    return fill_folder(folder, lambda place: _write({"": prepared}, place, form))


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
        ValueError: If the run is not finished, has no such student, or the folder holds something.
    """
    run, folder = Path(run), Path(folder)
    require_new_folder(folder)
    description = read_finished_run(run)
    outline = load_run_outline(run, description, model)
    groups: dict[str, list[Prepared]] = {}
    left_out: list[LeftOut] = []
    for student in load_students(run, description["students"], students):
        name = student.candidate.name
        if Path(student.id).name != student.id:
            raise ValueError(f"A student's id must be the name of a folder; {run} has {student.id!r}.")
        try:
            found = _prepare(student.candidate.network, outline, form)
        except DoesNotFit as error:
            left_out.append(LeftOut(name, str(error)))
        else:
            groups.setdefault(student.id, []).append(found)
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
    return Exported(fill_folder(folder, lambda place: _write(groups, place, form)), left_out)


def _prepare(layer: SparseLayer, model: nn.Module, form: Format) -> Prepared:
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {form!r}.")
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
        require_whole_set([Member(one.layer, one.place) for one in members])


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
                write_circuit_tracer([Member(one.layer, one.place) for one in members], about, target)
    abouts = {id: [one.about for one in members] for id, members in groups.items()}
    write_text(folder / CARD_FILE, card(form, abouts))


def _about(layer: SparseLayer, place: Place) -> dict[str, JSON]:
    """Return what is known of a layer, with no folder of this machine in it."""
    known = layer.provenance
    name = known.model
    if name is not None and not is_of_the_hub(known):
        name = Path(name).name
    config = cast("Mapping[str, Any]", asdict(cast(Any, layer.config)))
    return {
        **asdict(known),
        "model": name,
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


def _common(abouts: Iterable[Mapping[str, JSON]]) -> dict[str, JSON]:
    """Return what is the same of all layers, and what is not as a list in their order."""
    together: dict[str, list[JSON]] = {}
    for about in abouts:
        for key, value in about.items():
            together.setdefault(key, []).append(value)
    return {
        key: values[0] if all(value == values[0] for value in values) else values for key, values in together.items()
    }
