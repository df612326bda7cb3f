"""The training loop: any number of students on one stream of activations."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

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


SinkOpener = Callable[[int], MetricsSink]
"""Opens a sink when training begins; it is told the first step that will be logged."""


class TrainingFault(RuntimeError):
    """Training stopped because a number was not finite or the disk failed; the last good snapshot is intact."""


class TrainingInterrupted(RuntimeError):
    """Training stopped because a signal asked for it; a snapshot holds everything."""


@runtime_checkable
class ActivationSource(Protocol):
    """What the loop needs of a stream of activations."""

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
    sinks: Sequence[SinkOpener] = (),
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
        sinks: Where else metrics go; opened at the start and closed at the end.

    Raises:
        TrainingFault: If an activation, a loss or a weight is not finite, or the stream breaks off.
        TrainingInterrupted: If SIGINT or SIGTERM arrived; a snapshot was written first.
        OSError: If metrics or a snapshot cannot be written; the snapshots before it stay.
    """
    first = _resume(students, stream, run)
    snapshots, last_snapshot, started = run / "snapshots", time.monotonic(), time.monotonic()
    with ExitStack() as stack:
        stop = stack.enter_context(interruptible())
        logs: list[MetricsSink] = [stack.enter_context(MetricsLog(run / "metrics.jsonl", first_step=first + 1))]
        for open_sink in sinks:
            logs.append(open_sink(first + 1))
            stack.callback(logs[-1].close)
        names = [student.name for student in students]
        progress = stack.enter_context(
            TrainingProgress(schedule.steps * batch_tokens, names, "Training", tokens_at_start=first * batch_tokens)
        )
        for step, batch in enumerate(_batches(stream, students, run, first), start=first):
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
            snapshot_due = stop.requested is not None or time.monotonic() - last_snapshot >= snapshot_every
            if done % LOG_EVERY == 0 or done == schedule.steps or snapshot_due:
                _require_finite(students, run, done, state=snapshot_due or done == schedule.steps)
            if done % LOG_EVERY == 0 or done == schedule.steps:
                metrics = {student.name: student.read_metrics(tokens) for student in students}
                record = {"step": done, "tokens": tokens, "seconds": round(time.monotonic() - started, 3)}
                for log in logs:
                    log.log(record | {"students": metrics})
                progress.update(tokens, metrics)
            if snapshot_due:
                save_snapshot(snapshots, done, _tensors(students), _position(stream))
                last_snapshot = time.monotonic()
            if stop.requested is not None and done < schedule.steps:
                raise TrainingInterrupted(f"{stop.requested} after step {done:,} of {schedule.steps:,}")


def _batches(stream: ActivationSource, students: Sequence[Student], run: Path, first: int) -> Iterator[ActivationBatch]:
    """Yield the stream's batches; where it breaks off after some steps, keep what they have learnt."""
    batches, done = iter(stream), first
    while True:
        position = _position(stream)
        try:
            batch = next(batches)
        except StopIteration:
            return
        # Whatever a network, a disk or a row of text may raise: between two steps the students are whole.
        except Exception as error:
            if done == 0:
                raise
            save_snapshot(run / "snapshots", done, _tensors(students), position)
            raise TrainingFault(
                f"the stream of activations must go on; it broke off after step {done:,} ({error}). "
                "A snapshot holds everything until then: remove the cause, then continue with --resume."
            ) from error
        yield batch
        done += 1


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


def _require_finite(students: Sequence[Student], run: Path, done: int, *, state: bool) -> None:
    """Check every loss so far, and the weights and moments too where they are about to be kept."""
    for student in students:
        bad_step = int(student.first_bad_step) + 1
        what, remedy = "its loss", "lower its learning rate"
        if bad_step > 0 and student.first_bad_input:
            what, remedy = f"an activation of layer {student.layer}", "run the model in a wider type (--model-dtype)"
        elif bad_step == 0 and state and not student.is_finite():
            bad_step, what = done, "a weight or its gradient"
        if bad_step == 0:
            continue
        snapshots = run / "snapshots"
        kept = f"The last snapshot in {snapshots} is from" if any(snapshots.glob("[0-9]*")) else "No snapshot was due"
        raise TrainingFault(
            f"{student.name} must have finite numbers; {what} was NaN or infinite at step {bad_step:,}. "
            f"{kept} before it: {remedy} and train anew."
        )
