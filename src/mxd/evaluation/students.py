"""The trained students of a run, as they lie on disk."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from mxd.checkpoint import Provenance, load_checkpoint
from mxd.evaluation.faithfulness import Candidate
from mxd.layers import TopK
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
    k_trained: int
    """Number of active latents that it was trained with."""
    shared_penalty: float | None = None
    """What it was charged for the variance that its shared expert carries."""
    l1_coefficient: float | None = None
    """Weight of the L1 penalty that it was trained with, if any."""
    random_k: bool | None = None
    """Whether its training drew K anew each step; None where its selection is not top-k."""

    def at(self, ks: Collection[int]) -> "Iterator[TrainedStudent]":
        """Yield the same layer with other numbers of active latents, which share its weights; none but for top-k.

        Raises:
            ValueError: If the layer has fewer latents.
        """
        for k in ks if self.random_k is not None else ():
            if k != self.k_trained:
                network = copy.copy(self.candidate.network)
                network.config = replace(cast(Any, network.config), k=k)
                name = f"{self.candidate.name}-at{k}"
                candidate = Candidate(name=name, layer=self.candidate.layer, network=network)
                yield replace(self, id=f"{self.id}-at{k}", candidate=candidate)


def load_students(
    run: Path, described: Sequence[Mapping[str, Any]], wanted: Collection[str] = (), ks: Collection[int] = ()
) -> list[TrainedStudent]:
    """Return a run's students in the order of its run.json.

    Args:
        run: The run's folder.
        described: The `students` of its run.json.
        wanted: Ids, or `<layer>/<id>`; all where empty.
        ks: Numbers of active latents at which to return each of them too, after all.

    Raises:
        ValueError: If the run has no such student, one has fewer latents, a layer is damaged, or a description lacks
            its layer or id.
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
        students.append(
            TrainedStudent(
                id=plan["id"],
                candidate=candidate,
                provenance=checkpoint.provenance,
                k_trained=checkpoint.layer.config.k,
                shared_penalty=plan.get("shared_penalty") or None,
                l1_coefficient=plan.get("l1_coefficient") or None,
                random_k=bool(plan.get("random_k")) if checkpoint.layer.selection.name == TopK.name else None,
            )
        )
    return students + [other for student in students for other in student.at(ks)]


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
