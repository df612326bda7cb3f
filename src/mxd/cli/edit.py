"""`mxd edit`: edits of latents that stay with a layer."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from mxd.atomic import JSON, is_new_or_empty
from mxd.checkpoint import load_checkpoint, save_edits, save_layer, saved_edits
from mxd.cli.numbers import parse_latents
from mxd.cli.output import notes, print_json
from mxd.edits import Edit, fold_edits, with_edits
from mxd.layers import SparseLayer
from mxd.steering.edit_run import LayerToEdit, find_layer, measure_edits, units_of
from mxd.steering.experiment import Intervention, OperationName, Unit
from mxd.steering.side_effects import Effect


def edit(
    run: Annotated[Path, tyro.conf.Positional],
    student: str,
    latents: tuple[str, ...] = (),
    operation: OperationName | None = None,
    strength: float | None = None,
    unit: Unit | None = None,
    undo: bool = False,
    undo_all: bool = False,
    concept: tuple[str, ...] = (),
    text: tuple[str, ...] = (),
    tokens: int | None = None,
    device: str | None = None,
    model: str | None = None,
    export: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Edit latents of one layer for good, or undo it, and say what that does to the model's predictions.

    Writes edits.json beside the layer, whose weights stay as they are: whatever loads it (mxd.load, mxd evaluate)
    applies its edits from then on. Without an operation, shows the edits that are there and what they do.

    Args:
        run: Folder of a finished run.
        student: Id of the student, such as mxd-k32 or 8/mxd-k32.
        latents: Numbers of latents, and spans such as 0-99.
        operation: What to do to their values, after what is done to them already.
        strength: What is set or added, the factor of scale, or the bound that clamp keeps values below.
        unit: What the strength of set, add and clamp is given in (see mxd steer); value by default.
        undo: Take back what the last command did.
        undo_all: Take back all edits.
        concept: Text that has the concept that is edited, to measure the loss on; .txt, .jsonl and so on.
        text: Other held-out text than the run's own.
        tokens: Tokens of it, at most.
        device: Where to run; where the run was trained by default; `auto` takes the first accelerator.
        model: Where the language model is now (a folder or hub id), if it is not where the run found it.
        export: Folder for a layer without edits whose weights do what the edits do, where the algebra allows.
        json_: Print edits and effects as one JSON object.
    """
    _require_one_request(operation, strength, unit, latents, undo=undo, undo_all=undo_all)
    place = find_layer(run, student, model)
    groups = saved_edits(place.folder)
    kept = groups[:-1] if undo else [] if undo_all else groups
    if operation is not None:
        done = Intervention(operation=operation, strength=1.0 if strength is None else strength, unit=unit or "value")
        kept = [*groups, _new_edits(place, done, parse_latents(latents), text, tokens, device)]
    before, after = list(chain(*groups)), list(chain(*kept))
    effects: list[Effect] = []
    plain = None if export is None else _plain(place, after, export)
    if before or after:
        # Where nothing changes, what is shown is what the edits do.
        compared = () if after == before else before
        effects = measure_edits(place, compared, after, concept=concept, text=text, tokens=tokens, device=device)
    # First what can fail for want of a place, so that the edits stay as they were if it does.
    if export is not None and plain is not None:
        save_layer(plain, export, load_checkpoint(place.folder).provenance)
    if after != before:
        save_edits(place.folder, *kept)
    _show(_Report(place.candidate.name, after, effects), notes(), as_json=json_)
    _show_written(place.folder if after != before else None, bool(after), export, notes())


def _require_one_request(
    operation: OperationName | None,
    strength: float | None,
    unit: Unit | None,
    latents: Sequence[str],
    *,
    undo: bool,
    undo_all: bool,
) -> None:
    if (operation is not None) + undo + undo_all > 1:
        raise ValueError("operation, undo and undo-all exclude each other; give one of them.")
    if (operation is None) != (not latents):
        raise ValueError("An edit needs both --latents and --operation; got one of them.")
    if operation not in (None, "ablate") and strength is None:
        raise ValueError(f"{operation} needs --strength; got none.")
    if operation in (None, "ablate") and strength is not None:
        raise ValueError(f"strength must stand beside an --operation that has one; {_beside(operation)}; leave it out.")
    if operation in (None, "ablate", "scale") and unit is not None:
        raise ValueError(
            f"unit must stand beside an --operation whose strength has one; {_beside(operation)}; leave it out."
        )


def _beside(operation: OperationName | None) -> str:
    return "got none" if operation is None else f"got {operation}"


class _Report(NamedTuple):
    student: str
    edits: Sequence[Edit]
    effects: Sequence[Effect]

    def to_json(self) -> JSON:
        effects = [effect._asdict() for effect in self.effects]
        return {"student": self.student, "edits": [one.to_json() for one in self.edits], "effects": effects}


def _show(report: _Report, console: Console, *, as_json: bool) -> None:
    if as_json:
        print_json(report.to_json())
        return
    for one in report.edits:
        console.print(_told(one))
    if not report.edits:
        console.print(f"{report.student} has no edits.")
    if report.effects:
        Console().print(_table(report.effects))


def _show_written(changed: Path | None, has_edits: bool, export: Path | None, console: Console) -> None:
    if changed is not None:
        console.print(f"{'Wrote' if has_edits else 'Removed'} {changed}/edits.json.")
    if export is not None:
        console.print(f"Wrote a layer with the edits in its weights to {export}.")


def _new_edits(
    place: LayerToEdit,
    done: Intervention,
    latents: Sequence[int],
    text: Sequence[str],
    tokens: int | None,
    device: str | None,
) -> tuple[Edit, ...]:
    if not done.needs_unit:
        return (Edit(latents=tuple(latents), operation=done.operation_at(1.0)),)
    units = units_of(place, latents, text=text, tokens=tokens, device=device)
    return tuple(Edit(latents=(latent,), operation=done.operation_at(unit)) for latent, unit in units.items())


def _plain(place: LayerToEdit, edits: Sequence[Edit], target: Path) -> SparseLayer:
    if not is_new_or_empty(target):
        raise ValueError(f"export needs a new or empty folder; {target} holds something. Name another.")
    return fold_edits(with_edits(place.candidate.network, edits))


def _told(one: Edit) -> str:
    numbers = ", ".join(map(str, one.latents[:12])) + (" …" if len(one.latents) > 12 else "")
    how = {name: value for name, value in asdict(one.operation).items() if value is not None}
    return f"{one.operation.name} {numbers}" + "".join(f", {name} {value:g}" for name, value in how.items())


def _table(effects: Sequence[Effect]) -> Table:
    table = Table("predicted behind", title="Cross-entropy, nats a token", title_justify="left")
    for name in ("tokens", "original model", "before", "after", "change", "KL(before ‖ after)"):
        table.add_column(name, justify="right")
    for one in effects:
        losses = (one.original, one.before, one.after)
        change = f"{one.after - one.before:+.4f}"
        table.add_row(one.group, f"{one.tokens:,}", *(f"{loss:.4f}" for loss in losses), change, f"{one.kl:.4f}")
    return table
