"""The trained students of a run, as they lie on disk."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxd.checkpoint import Provenance, load_checkpoint
from mxd.evaluation.faithfulness import Candidate
from mxd.evaluation.rows import TOGETHER
from mxd.runs.run import CONFIGURATION_FILE


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedStudent:
    """A layer of a run, and where it belongs."""

    id: str
    """Its name within its layer, such as `mxd-k32`."""
    candidate: Candidate
    """The layer, named `<layer>/<id>`."""
    provenance: Provenance
    """How it came about."""


def student_places(run: Path, described: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Return the layer and the id of each of a run's students.

    Args:
        run: The run's folder, for messages.
        described: The `students` of its run.json.

    Raises:
        ValueError: If a description lacks its layer or id.
    """
    for number, plan in enumerate(described):
        lacking = [field for field, kind in (("layer", int), ("id", str)) if not isinstance(plan.get(field), kind)]
        if lacking:
            raise ValueError(
                f"Every student in {run / CONFIGURATION_FILE} must have its layer, a number, and id, a text; "
                f"students.{number} lacks {' and '.join(lacking)}; restore the file from a copy."
            )
    return [(plan["layer"], plan["id"]) for plan in described]


def load_students(
    run: Path, described: Sequence[Mapping[str, Any]], wanted: Collection[str] = ()
) -> list[TrainedStudent]:
    """Return a run's students in the order of its run.json.

    Args:
        run: The run's folder.
        described: The `students` of its run.json.
        wanted: Ids, or `<layer>/<id>`; all where empty.

    Raises:
        ValueError: If the run has no such student, a layer is damaged, or a description lacks its layer or id.
    """
    places = student_places(run, described)
    names = {f"{layer}/{id}": id for layer, id in places}
    unknown = [name for name in wanted if name not in names and name not in names.values()]
    if unknown:
        raise ValueError(f"{run} has no student {', '.join(unknown)}; its students are {', '.join(names)}.")
    students: list[TrainedStudent] = []
    for layer, id in places:
        name = f"{layer}/{id}"
        if wanted and name not in wanted and id not in wanted:
            continue
        checkpoint = load_checkpoint(run / "layers" / name)
        candidate = Candidate(name=name, layer=layer, network=checkpoint.layer)
        students.append(TrainedStudent(id=id, candidate=candidate, provenance=checkpoint.provenance))
    return students


def settings_together(run: Path, places: Sequence[tuple[int, str]]) -> dict[str, list[str]]:
    """Return which students, as `<layer>/<id>`, stand in a model all at once, by the ids of their rows.

    Each id that every layer has is one setting, `together/<id>`; where there is none, but one student a layer, they are
    `together`.

    Args:
        run: Whose students they are, for messages.
        places: The layer and the id of each.

    Raises:
        ValueError: If there is one layer alone, or several students a layer and no id that every layer has.
    """
    layers = sorted({layer for layer, _ in places})
    if len(layers) == 1:
        raise ValueError(
            f"together needs students of several layers; those of {run} are all of layer {layers[0]}. Leave it out."
        )
    by_id: dict[str, list[str]] = {}
    for layer, id in places:
        by_id.setdefault(id, []).append(f"{layer}/{id}")
    everywhere = {f"{TOGETHER}/{id}": members for id, members in by_id.items() if len(members) == len(layers)}
    if everywhere:
        return everywhere
    if len(places) > len(layers):
        raise ValueError(
            f"together needs students of the same name on all of the layers {', '.join(map(str, layers))}, or one "
            f"student a layer; those of {run} are not so. Leave it out, or choose some for mxd evaluate, as in "
            "--student 0/mxd-k16 1/mxd-k32."
        )
    return {TOGETHER: [f"{layer}/{id}" for layer, id in places]}
