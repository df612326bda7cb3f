"""The training loop: any number of students on one stream of activations."""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from mxd.atomic import JSON
from mxd.data.activations import ActivationBatch, ActivationPosition, StreamState
from mxd.runs.faults import TrainingFault, TrainingInterrupted
from mxd.runs.metrics_log import MetricsLog, MetricsSink, Mirror
from mxd.runs.progress import TrainingProgress
from mxd.runs.run import METRICS_FILE, SNAPSHOTS
from mxd.runs.signals import Stopped, StopRequest, interruptible
from mxd.runs.snapshots import SnapshotError, load_newest_snapshot, save_snapshot
from mxd.training.optimizer import Schedule
from mxd.training.student import Student, read_metrics

logger = logging.getLogger(__name__)

LOG_EVERY = 20
"""Steps between two lines of metrics.jsonl."""


SinkOpener = Callable[[int], MetricsSink]
"""Opens a sink when training begins; it is told the first step that will be logged."""


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
        snapshot_every: Seconds between snapshots; when they are taken changes nothing else. There is one of the last
            step too.
        sinks: Where else metrics go; opened at the start and closed at the end. One that fails is dropped.

    Raises:
        TrainingFault: If an activation, a loss or a weight is not finite, the stream breaks off, or anything else fails
            after the first step. What fails before is raised as it is.
        TrainingInterrupted: If SIGINT or SIGTERM arrived; a snapshot was written first, unless no step was made. While
            a batch is fetched a signal does not wait for it.
        SnapshotError: If a snapshot cannot be written; those before it stay.
    """
    loop = _Loop(students, stream, run, schedule.steps)
    loop.resume()
    first, last_snapshot = loop.done, time.monotonic()
    with ExitStack() as stack:
        stop = stack.enter_context(interruptible())
        log = stack.enter_context(MetricsLog(run / METRICS_FILE, first_step=first + 1))
        mirrors = [stack.enter_context(closing(Mirror(open_sink(first + 1)))) for open_sink in sinks]
        names = [student.name for student in students]
        progress = stack.enter_context(
            TrainingProgress(schedule.steps * batch_tokens, names, "Training", tokens_at_start=first * batch_tokens)
        )
        for step, batch in enumerate(loop.batches(stop), start=first):
            with loop.faults_named():
                _step(students, step, batch, schedule.factor(step), autocast)
                loop.done, tokens, is_last = step + 1, (step + 1) * batch_tokens, step + 1 == schedule.steps
                was_asked = stop.requested is not None
                snapshot_due = was_asked or is_last or time.monotonic() - last_snapshot >= snapshot_every
                log_due = loop.done % LOG_EVERY == 0 or is_last
                if log_due or snapshot_due:
                    loop.require_finite(state=snapshot_due)
                if log_due:
                    metrics = read_metrics(students, tokens)
                    record = {"step": loop.done, "tokens": tokens, "seconds": log.seconds(), "students": metrics}
                    for sink in (log, *mirrors):
                        sink.log(record)
                    progress.update(tokens, metrics)
                if snapshot_due:
                    loop.save()
                    last_snapshot = time.monotonic()
                if was_asked and not is_last:
                    raise loop.interruption(stop)


def _step(
    students: Sequence[Student], step: int, batch: ActivationBatch, lr_factor: float, autocast: torch.dtype | None
) -> None:
    for student in students:
        rows = batch.layers[student.layer]
        student.step(
            step, rows.x.float(), rows.target.float(), batch.is_content, lr_factor=lr_factor, autocast=autocast
        )


class _Loop:
    """How far a run has come, and what is kept of it."""

    def __init__(self, students: Sequence[Student], stream: ActivationSource, run: Path, steps: int) -> None:
        self.students = students
        self.stream = stream
        self.snapshots = run / SNAPSHOTS
        self.steps = steps
        self.done = 0
        """Steps that all students have made."""
        self.kept = 0
        """The step of the newest snapshot, written or read; 0 where there is none."""

    def resume(self) -> None:
        """Put the newest snapshot's state back, if there is one."""
        snapshot = load_newest_snapshot(self.snapshots)
        if snapshot is None:
            return
        for student in self.students:
            prefix = f"{student.name}/"
            tensors = {name: value for name, value in snapshot.tensors.items() if name.startswith(prefix)}
            student.restore({name.removeprefix(prefix): value for name, value in tensors.items()})
        self.stream.restore(ActivationPosition.from_json(cast(StreamState, snapshot.state["stream"])))
        self.done = self.kept = snapshot.step

    def batches(self, stop: StopRequest) -> Iterator[ActivationBatch]:
        """Yield the stream's batches; where it breaks off or a signal ends the waiting, keep what has been learnt."""
        batches = iter(self.stream)
        while True:
            position = self.stream.state()
            try:
                # After the last step nothing is left to stop.
                with stop.at_once() if self.done < self.steps else nullcontext():
                    batch = next(batches)
            except StopIteration:
                return
            except Stopped:
                self._keep(position)
                raise self.interruption(stop) from None
            # Whatever a network, a disk or a row of text may raise: between two steps the students are whole.
            except Exception as error:
                if self.done == 0:
                    raise
                self._keep(position)
                raise TrainingFault(
                    f"the stream of activations must go on; it broke off after step {self.done:,} ({error}). "
                    "A snapshot holds everything until then: remove the cause, then continue with --resume."
                ) from error
            yield batch

    def save(self) -> None:
        """Write a snapshot of what `require_finite` has found good."""
        try:
            self._save(self.stream.state())
        except SnapshotError as error:
            if self.done < self.steps:
                raise
            # It would only spare the last steps a repetition, should saving the layers fail too.
            logger.warning("Training has ended, and goes on to save what it has trained: %s", error)

    def interruption(self, stop: StopRequest) -> TrainingInterrupted:
        """Return what is raised where a signal asked for it."""
        return TrainingInterrupted(f"{stop.requested} after step {self.done:,} of {self.steps:,}")

    @contextmanager
    def faults_named(self) -> Generator[None, None, None]:
        """Say of whatever breaks a step from what snapshot to go on; before the first one there is nothing to lose."""
        try:
            yield
        except (TrainingFault, TrainingInterrupted, SnapshotError):
            raise
        # An accelerator that failed, memory that ran out, a full disk: the students may stand between two steps.
        except Exception as error:
            if self.done == 0:
                raise
            kept = f"The snapshot of step {self.kept:,} in {self.snapshots} is intact"
            raise TrainingFault(
                f"training must go on; it broke off after step {self.done:,} ({str(error) or type(error).__name__}). "
                f"{kept if self.kept else 'No snapshot was due before it'}: remove the cause, then continue with "
                f"--resume{'' if self.kept else ', which begins anew'}."
            ) from error

    def require_finite(self, *, state: bool) -> None:
        """Check every loss so far, and the weights and moments too where they are about to be kept."""
        # Read from the device once.
        bad_steps = torch.stack([student.first_bad_step for student in self.students]).tolist()
        for student, before_bad in zip(self.students, bad_steps, strict=True):
            bad_step = before_bad + 1
            what, remedy = "its loss", "lower its learning rate"
            if bad_step > 0 and student.first_bad_input:
                what, remedy = (
                    f"an activation of layer {student.layer}",
                    "run the model in a wider type (--model-dtype)",
                )
            elif bad_step == 0 and state and not student.is_finite():
                bad_step, what = self.done, "a weight or its gradient"
            if bad_step == 0:
                continue
            kept = f"The snapshot of step {self.kept:,} in {self.snapshots} is from"
            raise TrainingFault(
                f"{student.name} must have finite numbers; {what} was NaN or infinite at step {bad_step:,}. "
                f"{kept if self.kept else 'No snapshot was due'} before it: {remedy} and train anew."
            )

    def _keep(self, position: ActivationPosition) -> None:
        """Write a snapshot between two steps, unless there is one of this step or no step was made."""
        if self.done > self.kept:
            # What broke the stream, an accelerator perhaps, may keep this from being written too.
            with self.faults_named():
                self.require_finite(state=True)
                self._save(position)

    def _save(self, position: ActivationPosition) -> None:
        state: dict[str, JSON] = {"stream": cast(JSON, position.to_json())}
        save_snapshot(self.snapshots, self.done, _tensors(self.students), state)
        self.kept = self.done


def _tensors(students: Sequence[Student]) -> dict[str, Tensor]:
    return {f"{student.name}/{name}": tensor for student in students for name, tensor in student.tensors().items()}
