"""The training loop: any number of students on one stream of activations."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from mxd.atomic import JSON
from mxd.data.activations import ActivationBatch, ActivationPosition, StreamState
from mxd.runs.metrics_log import MetricsLog, MetricsSink
from mxd.runs.progress import TrainingProgress
from mxd.runs.signals import interruptible
from mxd.runs.snapshots import load_newest_snapshot, save_snapshot
from mxd.training.optimizer import Schedule
from mxd.training.student import Student

LOG_EVERY = 20
"""Steps between two lines of metrics.jsonl."""


class TrainingFault(RuntimeError):
    """Training stopped because a number was not finite; the last good snapshot is intact."""


class TrainingInterrupted(RuntimeError):
    """Training stopped because a signal asked for it; a snapshot holds everything."""


class ActivationSource(Protocol):
    """What the loop needs of a stream of activations."""

    num_batches: int

    def __iter__(self) -> Iterator[ActivationBatch]: ...

    def state(self) -> ActivationPosition:
        """The position of the next batch."""
        ...

    def restore(self, position: ActivationPosition) -> None:
        """Go to a position that `state` gave."""
        ...


def train(
    students: Sequence[Student],
    stream: ActivationSource,
    run: Path,
    *,
    batch_tokens: int,
    schedule: Schedule,
    autocast: torch.dtype | None = None,
    snapshot_every: float = 600.0,
    sinks: Sequence[MetricsSink] = (),
) -> None:
    """Train all students on the stream, from the run's newest snapshot if it has one, to the stream's end.

    Interrupted at any moment and called again with the same arguments it ends with the same weights, bit for bit, on
    the same machine.

    Args:
        students: What to train, in place.
        stream: Batches of every student's layer.
        run: Folder for `metrics.jsonl` and `snapshots/`.
        batch_tokens: Tokens of each batch.
        schedule: Learning rate over the steps.
        autocast: Type of the matrix products; None computes in the weights' own.
        snapshot_every: Seconds between snapshots; when they are taken changes nothing else.
        sinks: Where else metrics go.

    Raises:
        TrainingFault: If an activation or a loss is not finite.
        TrainingInterrupted: If SIGINT or SIGTERM arrived; a snapshot was written first.
        OSError: If a snapshot cannot be written; the ones before it stay.
    """
    first = _resume(students, stream, run)
    snapshots, last_snapshot, started = run / "snapshots", time.monotonic(), time.monotonic()
    with ExitStack() as stack:
        stop = stack.enter_context(interruptible())
        log = stack.enter_context(MetricsLog(run / "metrics.jsonl", first_step=first + 1))
        names = [student.name for student in students]
        progress = stack.enter_context(
            TrainingProgress(schedule.steps * batch_tokens, names, "Training", tokens_at_start=first * batch_tokens)
        )
        for step, batch in enumerate(stream, start=first):
            for student in students:
                rows = batch.layers[student.layer]
                student.step(
                    step,
                    rows.x.float(),
                    rows.target.float(),
                    batch.is_content,
                    lr_factor=schedule.factor(step),
                    autocast=autocast,
                )

            done, tokens = step + 1, (step + 1) * batch_tokens
            snapshot_due = stop.requested or time.monotonic() - last_snapshot > snapshot_every
            if done % LOG_EVERY == 0 or done == schedule.steps or snapshot_due:
                _require_finite(students, batch, run)
            if done % LOG_EVERY == 0 or done == schedule.steps:
                metrics = {student.name: student.read_metrics(tokens) for student in students}
                record = {"step": done, "tokens": tokens, "seconds": round(time.monotonic() - started, 3)}
                for sink in (log, *sinks):
                    sink.log(record | {"students": metrics})
                progress.update(tokens, metrics)
            if snapshot_due:
                save_snapshot(snapshots, done, _tensors(students), _position(stream))
                last_snapshot = time.monotonic()
            if stop.requested and done < schedule.steps:
                raise TrainingInterrupted(f"{stop.requested} after step {done:,} of {schedule.steps:,}")


def _resume(students: Sequence[Student], stream: ActivationSource, run: Path) -> int:
    """Put the newest snapshot's state back and return its step; 0 where there is none."""
    snapshot = load_newest_snapshot(run / "snapshots")
    if snapshot is None:
        return 0
    for student in students:
        prefix = f"{student.name}/"
        student.restore(
            {name.removeprefix(prefix): value for name, value in snapshot.tensors.items() if name.startswith(prefix)}
        )
    stream.restore(ActivationPosition.from_json(cast(StreamState, snapshot.state["stream"])))
    return snapshot.step


def _tensors(students: Sequence[Student]) -> dict[str, Tensor]:
    return {f"{student.name}/{name}": tensor for student in students for name, tensor in student.tensors().items()}


def _position(stream: ActivationSource) -> Mapping[str, JSON]:
    return {"stream": cast(JSON, stream.state().to_json())}


def _require_finite(students: Sequence[Student], batch: ActivationBatch, run: Path) -> None:
    for student in students:
        bad_step = int(student.first_bad_step)
        if bad_step < 0:
            continue
        rows = batch.layers[student.layer]
        finite = bool(torch.isfinite(rows.x).all() and torch.isfinite(rows.target).all())
        what = "its loss" if finite else f"an activation of layer {student.layer}"
        remedy = "lower its learning rate" if finite else "run the model in a wider type (--model-dtype float32)"
        raise TrainingFault(
            f"{student.name} must have finite numbers; {what} was NaN or infinite at step {bad_step:,}. "
            f"The last snapshot in {run / 'snapshots'} is from before it: {remedy} and train anew."
        )
