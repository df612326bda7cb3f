"""The trained students of a run, as they lie on disk."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from mxd.checkpoint import Provenance, layer_folder, load_checkpoint
from mxd.evaluation.faithfulness import Candidate
from mxd.evaluation.rows import TOGETHER
from mxd.layers import TopK
from mxd.runs.run import CONFIGURATION_FILE
from mxd.settings import StudentSettings, settings_of


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
    settings: StudentSettings
    """What may set it apart from its siblings."""

    @property
    def as_trained(self) -> bool:
        """Whether it has the number of active latents that it was trained with."""
        return self.candidate.network.config.k == self.k_trained

    def at(self, ks: Collection[int]) -> "Iterator[TrainedStudent]":
        """Yield the same layer with other numbers of active latents, which share its weights; none but for top-k.

        Raises:
            ValueError: If the layer has fewer latents.
        """
        for k in sorted(set(ks) - {self.k_trained}) if self.settings.selection == TopK.name else ():
            network = copy.copy(self.candidate.network)
            network.config = replace(cast(Any, network.config), k=k)
            name = f"{self.candidate.name}-at{k}"
            candidate = Candidate(name=name, layer=self.candidate.layer, network=network)
            yield replace(self, id=f"{self.id}-at{k}", candidate=candidate)


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


def chosen_students(run: Path, described: Sequence[Mapping[str, Any]], wanted: Collection[str] = ()) -> list[int]:
    """Return the places in a run's list of students of those that are wanted.

    Args:
        run: The run's folder, for messages.
        described: The `students` of its run.json.
        wanted: Ids, or `<layer>/<id>`; all where empty.

    Raises:
        ValueError: If the run has no such student, or a description lacks its layer or id.
    """
    places = student_places(run, described)
    names = {f"{layer}/{id}": id for layer, id in places}
    unknown = [name for name in wanted if name not in names and name not in names.values()]
    if unknown:
        raise ValueError(f"{run} has no student {', '.join(unknown)}; its students are {', '.join(names)}.")
    return [number for number, (layer, id) in enumerate(places) if not wanted or {f"{layer}/{id}", id} & set(wanted)]


def load_students(
    run: Path, described: Sequence[Mapping[str, Any]], wanted: Collection[str] = (), ks: Collection[int] = ()
) -> list[TrainedStudent]:
    """Return a run's students in the order of its run.json.

    Args:
        run: The run's folder.
        described: The `students` of its run.json.
        wanted: Ids, or `<layer>/<id>`; all where empty.
        ks: Numbers of active latents at which to return each top-k student too, after all.

    Raises:
        ValueError: If the run has no such student, one has fewer latents, none is top-k for `ks`, a layer is damaged,
            or a description lacks its layer or id.
    """
    students: list[TrainedStudent] = []
    for number in chosen_students(run, described, wanted):
        layer, id = described[number]["layer"], described[number]["id"]
        name = f"{layer}/{id}"
        checkpoint = load_checkpoint(layer_folder(run, name))
        candidate = Candidate(name=name, layer=layer, network=checkpoint.layer)
        plan = described[number]
        students.append(
            TrainedStudent(
                id=id,
                candidate=candidate,
                provenance=checkpoint.provenance,
                k_trained=checkpoint.layer.config.k,
                settings=settings_of(
                    checkpoint.layer.config,
                    l1_coefficient=plan.get("l1_coefficient"),
                    random_k=bool(plan.get("random_k")),
                    init=checkpoint.provenance.init,
                    shared_penalty=plan.get("shared_penalty"),
                ),
            )
        )
    if ks and not any(student.settings.selection == TopK.name for student in students):
        raise ValueError(f"k needs a student with selection topk, of which {run} has none here; leave it out.")
    return students + [other for student in students for other in student.at(ks)]


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
