"""The trained students of a run, as they lie on disk."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxd.checkpoint import Provenance, load_checkpoint
from mxd.evaluation.faithfulness import Candidate
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
    for number, plan in enumerate(described):
        lacking = [field for field, kind in (("layer", int), ("id", str)) if not isinstance(plan.get(field), kind)]
        if lacking:
            raise ValueError(
                f"Every student in {run / CONFIGURATION_FILE} must have its layer, a number, and id, a text; "
                f"students.{number} lacks {' and '.join(lacking)}; restore the file from a copy."
            )
    names = {f"{plan['layer']}/{plan['id']}": plan["id"] for plan in described}
    unknown = [name for name in wanted if name not in names and name not in names.values()]
    if unknown:
        raise ValueError(f"{run} has no student {', '.join(unknown)}; its students are {', '.join(names)}.")
    students: list[TrainedStudent] = []
    for plan in described:
        name = f"{plan['layer']}/{plan['id']}"
        if wanted and name not in wanted and plan["id"] not in wanted:
            continue
        checkpoint = load_checkpoint(run / "layers" / name)
        candidate = Candidate(name=name, layer=plan["layer"], network=checkpoint.layer)
        students.append(TrainedStudent(id=plan["id"], candidate=candidate, provenance=checkpoint.provenance))
    return students


def require_one_per_layer(students: Sequence[TrainedStudent]) -> None:
    """Check that students can stand in a model all at once.

    Raises:
        ValueError: If two of them replace the same MLP.
    """
    layers = [student.candidate.layer for student in students]
    doubled = sorted({layer for layer in layers if layers.count(layer) > 1})
    if doubled:
        raise ValueError(
            f"together needs one student a layer; layer {', '.join(map(str, doubled))} has several. "
            "Choose with --student, as in --student mxd-k32."
        )
