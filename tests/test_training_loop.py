"""What the training loop keeps and says when something goes wrong: streams, signals, steps, sinks."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor

from mxd.atomic import JSON
from mxd.data.activations import ActivationBatch, ActivationPosition, ActivationRows, ActivationStream
from mxd.data.prefetch import Prefetch
from mxd.data.tokens import LocalTokens, TokenPosition
from mxd.layers import SparseLayerOutput, Transcoder, TranscoderConfig
from mxd.models import MlpPair
from mxd.runs.faults import TrainingFault, TrainingInterrupted
from mxd.runs.metrics_log import read_metrics
from mxd.runs.snapshots import SnapshotError
from mxd.training import train as training
from mxd.training.optimizer import Schedule
from mxd.training.student import Student, StudentConfig, distillation
from mxd.training.train import ActivationSource, train

STEPS, BATCH, WIDTH, CONTEXT = 24, 32, 8, 4
Loss = Callable[[SparseLayerOutput, Tensor], Tensor]


def student(loss: Loss = distillation) -> Student:
    config = TranscoderConfig(d_in=WIDTH, d_out=WIDTH, num_latents=32, k=4)
    network = Transcoder(config, torch.Generator().manual_seed(0))
    return Student("a", 0, network, StudentConfig(lr=1e-2), loss=loss)


class Numbers(Iterator[ActivationBatch]):
    """Batches that are functions of their number; one may be infinite, and at one the source breaks."""

    def __init__(self, *, breaks_at: int | None = None, infinite_at: int | None = None) -> None:
        self.number = 0
        self.breaks_at = breaks_at
        self.infinite_at = infinite_at

    def state(self) -> ActivationPosition:
        return ActivationPosition(0, self.number, TokenPosition(0, 0))

    def restore(self, position: ActivationPosition) -> None:
        self.number = position.batch

    def __next__(self) -> ActivationBatch:
        if self.number == STEPS:
            raise StopIteration
        if self.number == self.breaks_at:
            raise ConnectionError("the network is gone")
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(self.number))
        target = x.sin() if self.number != self.infinite_at else x * torch.inf
        self.number += 1
        return ActivationBatch({0: ActivationRows(x, target)}, torch.ones(BATCH, dtype=torch.bool))


def go(run: Path, stream: ActivationSource, one: Student | None = None, *, snapshot_every: float = 600.0) -> Student:
    """Train one student to the end, and return it."""
    run.mkdir(exist_ok=True)
    one = student() if one is None else one
    schedule = Schedule(steps=STEPS, warmup_steps=0)
    train([one], stream, run, batch_tokens=BATCH, schedule=schedule, snapshot_every=snapshot_every)
    return one


def kept(run: Path) -> dict[int, bytes]:
    return {int(path.parent.name): path.read_bytes() for path in run.glob("snapshots/[0-9]*/tensors.safetensors")}


def assert_equal(one: Student, other: Student) -> None:
    weights, others = one.network.state_dict(), other.network.state_dict()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def test_a_stream_that_breaks_off_leaves_no_weights_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(TrainingFault, match=r"layer 0 was NaN or infinite at step 4\. No snapshot was due before it"):
        go(tmp_path, Numbers(infinite_at=3, breaks_at=7))
    assert kept(tmp_path) == {}
    with pytest.raises(
        TrainingFault, match=r"broke off after step 5 .the network is gone.*A snapshot holds everything"
    ):
        go(tmp_path, Numbers(breaks_at=5))
    before = kept(tmp_path)
    assert list(before) == [5]
    stamp = next(tmp_path.glob("snapshots/*/state.json")).stat().st_mtime_ns
    with pytest.raises(TrainingFault, match="broke off after step 5 "):
        go(tmp_path, Numbers(breaks_at=5))
    assert next(tmp_path.glob("snapshots/*/state.json")).stat().st_mtime_ns == stamp
    with pytest.raises(
        TrainingFault, match=r"infinite at step 8\. The snapshot of step 5 in .*snapshots is from before"
    ):
        go(tmp_path, Numbers(infinite_at=7, breaks_at=9))
    assert kept(tmp_path) == before
    (path,) = tmp_path.glob("snapshots/*/tensors.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())


class Slow:
    """Gives activations, but stalls before those of one call; while it does, a signal arrives."""

    def __init__(self, call: int | None) -> None:
        self.call = call
        self.calls = 0

    def __call__(self, first: int, contexts: Int[Tensor, "n context"]) -> Mapping[int, MlpPair]:
        self.calls += 1
        if self.calls == self.call:
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            deadline = time.monotonic() + STALL
            while time.monotonic() < deadline and not done_waiting.is_set():
                time.sleep(0.01)
        x = torch.nn.functional.one_hot(contexts % WIDTH, WIDTH).float() + 0.01 * contexts[..., None]
        return {0: MlpPair(x, x.sin())}


STALL = 20.0
done_waiting = threading.Event()


def activations(slow_call: int | None = None) -> ActivationStream:
    """Blocks of four batches, each from two calls."""
    tokens = LocalTokens(np.arange(997), context=CONTEXT, bos=None, seed=0)
    return ActivationStream(
        Slow(slow_call),
        tokens,
        widths={0: (WIDTH, WIDTH)},
        batch_tokens=BATCH,
        buffer_tokens=4 * BATCH,
        total_tokens=STEPS * BATCH,
        forward_contexts=2 * BATCH // CONTEXT,
        special_ids=(),
        seed=0,
    )


@pytest.fixture
def stalling() -> Iterator[None]:
    done_waiting.clear()
    yield
    done_waiting.set()


@pytest.mark.parametrize(("slow_call", "steps"), [(1, 0), (2, 0), (6, 8)])
@pytest.mark.usefixtures("stalling")
def test_a_signal_ends_the_wait_for_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_call: int, steps: int
) -> None:
    stream, began = activations(slow_call), time.monotonic()
    with monkeypatch.context() as patch:
        # A hub that stalls must not be asked to go back, either.
        patch.delattr(LocalTokens, "restore")
        with pytest.raises(TrainingInterrupted, match=f"SIGTERM after step {steps} of {STEPS}"):
            go(tmp_path / "run", stream)
    assert time.monotonic() - began < STALL
    assert list(kept(tmp_path / "run")) == ([steps] if steps else [])
    # The same stream, which goes on where the wait began.
    assert_equal(go(tmp_path / "run", stream), go(tmp_path / "uninterrupted", activations()))


@pytest.mark.usefixtures("stalling")
def test_a_signal_ends_the_wait_for_another_threads_activations(tmp_path: Path) -> None:
    began = time.monotonic()
    with closing(Prefetch(activations(6))) as stream:
        # The other thread is ahead by a few batches, and some of them may still be trained on.
        with pytest.raises(TrainingInterrupted, match=rf"SIGTERM after step [4-8] of {STEPS}"):
            go(tmp_path / "run", stream)
        assert time.monotonic() - began < STALL
        done_waiting.set()
    with closing(Prefetch(activations())) as stream:
        resumed = go(tmp_path / "run", stream)
    assert_equal(resumed, go(tmp_path / "uninterrupted", activations()))


def test_a_signal_behind_the_last_batch_does_not_stop_what_is_finished(tmp_path: Path) -> None:
    def loss(output: SparseLayerOutput, target: Tensor) -> Tensor:
        losses.append(None)
        if len(losses) == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return distillation(output, target)

    losses: list[None] = []
    go(tmp_path, Numbers(), student(loss))
    assert list(kept(tmp_path)) == [STEPS]


@pytest.mark.parametrize(
    ("step", "snapshot_every", "said"),
    [
        (
            5,
            0.0,
            r"after step 5 \(CUDA error: launch failure\)\. The snapshot of step 5 in .* is intact: remove the cause",
        ),
        (5, 600.0, r"after step 5 .*No snapshot was due before it: .*continue with --resume, which begins anew\."),
    ],
)
def test_what_fails_within_a_step_names_the_snapshot_to_go_on_from(
    tmp_path: Path, step: int, snapshot_every: float, said: str
) -> None:
    def loss(output: SparseLayerOutput, target: Tensor) -> Tensor:
        if len(losses) == step:
            raise RuntimeError("CUDA error: launch failure")
        losses.append(None)
        return distillation(output, target)

    losses: list[None] = []
    with pytest.raises(TrainingFault, match=said):
        go(tmp_path, Numbers(), student(loss), snapshot_every=snapshot_every)
    assert_equal(go(tmp_path, Numbers()), go(tmp_path / "uninterrupted", Numbers()))


def test_a_stream_that_breaks_off_with_the_accelerator_is_a_fault_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(student: Student) -> bool:
        raise RuntimeError("CUDA error: launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(Student, "is_finite", broken)
        with pytest.raises(TrainingFault, match=r"after step 5 \(CUDA error.*No snapshot was due before it"):
            go(tmp_path, Numbers(breaks_at=5))


def test_what_fails_before_the_first_step_is_raised_as_it_is(tmp_path: Path) -> None:
    def loss(output: SparseLayerOutput, target: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$") as caught:
        go(tmp_path, Numbers(), student(loss))
    assert not isinstance(caught.value, TrainingFault)


class Gone:
    """A mirror whose network is gone."""

    def __init__(self) -> None:
        self.records = 0

    def log(self, record: Mapping[str, JSON]) -> None:
        self.records += 1
        raise ConnectionError("wandb is gone")

    def close(self) -> None:
        raise ConnectionError("wandb is still gone")


def test_a_sink_that_fails_is_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone, schedule = Gone(), Schedule(steps=STEPS, warmup_steps=0)
    train([student()], Numbers(), tmp_path, batch_tokens=BATCH, schedule=schedule, sinks=[lambda first_step: gone])
    assert gone.records == 1
    assert caplog.text.count("Gone failed and gets no more records") == 1
    assert "still gone" not in caplog.text
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [20, 24]


def test_seconds_go_on_counting_in_a_resumed_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingFault, match="after step 22"):
        go(tmp_path, Numbers(breaks_at=22))
    path = tmp_path / "metrics.jsonl"
    (record,) = read_metrics(path)
    path.write_text(path.read_text().replace(f'"seconds": {record["seconds"]}', '"seconds": 5000.5'))
    go(tmp_path, Numbers())
    seconds = [record["seconds"] for record in read_metrics(path)]
    assert seconds[0] == 5000.5
    assert isinstance(seconds[1], float)
    assert 5000.5 <= seconds[1] < 5100


def test_a_last_snapshot_that_cannot_be_written_does_not_keep_layers_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise SnapshotError("no room")

    monkeypatch.setattr(training, "save_snapshot", full)
    go(tmp_path, Numbers())
    assert "goes on to save what it has trained: no room" in caplog.text
    with pytest.raises(SnapshotError):
        go(tmp_path, Numbers(), snapshot_every=0.0)
