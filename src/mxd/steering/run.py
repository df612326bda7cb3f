"""Steering the latents of a run's students, with what is known already."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mxd.atomic import JSON
from mxd.edits import edits_of
from mxd.evaluation.faithfulness import Candidate
from mxd.evaluation.opening import OpenedRun, open_run, read_finished_run
from mxd.evaluation.students import load_students
from mxd.models import fingerprint
from mxd.steering.experiment import Experiment, Intervention, SteeredRow, Unsteered
from mxd.steering.results import RowLog, SteeringResult, row_key
from mxd.steering.sampling import Sampling

Advance = Callable[[int, int, str], None]
"""Told of each latent that is done: how many are, of how many, and of which student."""


def steer_run(
    run: Path,
    *,
    students: Sequence[str],
    latents: Sequence[int],
    sampling: Sampling,
    intervention: Intervention,
    log: Path,
    together: bool = False,
    text: Sequence[str] = (),
    tokens: int | None = None,
    device: str | None = None,
    model: str | None = None,
    advance: Advance = lambda done, total, student: None,
) -> SteeringResult:
    """Steer some latents of a run's students, one at a time or at once, and score the texts without a judge.

    Args:
        run: Folder of a finished run.
        students: Ids, or `<layer>/<id>`; all where empty.
        latents: Their numbers, the same for each student.
        sampling: How texts are sampled.
        intervention: What is done to each latent.
        together: Whether all are steered at once, but for those without a unit.
        log: File of the rows; those that are there, made in the same way, are not made again.
        text: Other held-out text than the run's own.
        tokens: Tokens of it at most.
        device: Where to run; the run's own where None.
        model: Where the model is now; where the run found it if None.
        advance: Told of progress.

    Raises:
        ValueError: If the run is not finished, has no such student, or a student no such latent.
    """
    description = read_finished_run(run)
    chosen = [student.candidate for student in load_students(run, description["students"], students)]
    opened = open_run(run, description, text, tokens, device, model)
    known, rows = RowLog(log), list[SteeredRow]()
    unsteered: dict[str, Unsteered] = {}
    skipped: dict[str, list[int]] = {}
    done, total = 0, len(chosen) * (1 if together else len(latents))
    for student in chosen:
        student.network.to(opened.language_model.device)
        experiment = Experiment(opened.language_model, student, opened.text, sampling, intervention, latents)
        unsteered[student.name] = experiment.unsteered
        skipped[student.name] = experiment.without_unit(latents)
        able = tuple(latent for latent in latents if latent not in skipped[student.name])
        groups: Sequence[int | tuple[int, ...]] = [able] * bool(able) if together else able
        for number, group in enumerate(groups, start=1):
            rows.append(_row(experiment, group, _key(opened, student, group, sampling, intervention), known))
            advance(done + number, total, student.name)
        done += total // len(chosen)
        advance(done, total, student.name)
    return SteeringResult(
        settings=_settings(opened, latents, sampling, intervention),
        rows=rows,
        unsteered=unsteered,
        skipped=skipped,
    )


def _row(experiment: Experiment, group: int | tuple[int, ...], key: str, known: RowLog) -> SteeredRow:
    row = known.find(key)
    if row is None:
        (row,) = experiment.rows([group])
        known.add(key, row)
    return row


def _key(
    opened: OpenedRun, student: Candidate, latent: int | tuple[int, ...], sampling: Sampling, intervention: Intervention
) -> str:
    parameter = next(student.network.parameters())
    return row_key(
        on=_read(opened),
        student=student.name,
        layer=fingerprint(student.network),
        edits=[edit.to_json() for edit in edits_of(student.network)],
        latent=latent,
        sampling=asdict(sampling),
        intervention=asdict(intervention),
        computed=f"{parameter.device.type} {parameter.dtype}",
    )


def _read(opened: OpenedRun) -> dict[str, JSON]:
    """Return what text is read by which model; the edits of each student are named by its rows."""
    return {name: value for name, value in asdict(opened.identity).items() if name != "edits"}


def _settings(
    opened: OpenedRun, latents: Sequence[int], sampling: Sampling, intervention: Intervention
) -> dict[str, JSON]:
    return {
        "model": opened.language_model.id,
        "text": opened.text_name,
        "identity": _read(opened),
        "latents": list(latents),
        "sampling": asdict(sampling),
        "intervention": asdict(intervention),
    }
