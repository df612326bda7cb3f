"""Training on the tiny model in the test's own process, as `mxd train` and from Python."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mxd.data.activations import ActivationBatch, ActivationStream
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from tests.tiny_run import KINDS, Ended, command

STEPS = 30
BLOCK = 8
"""Steps of a block of the shuffle buffer."""


def arguments_of(model: Path, text: Path) -> list[str]:
    return [
        *("train", "--model", str(model), "--text", str(text), "--layer", "0", "1", "--kind", "mxd", "topk-sae"),
        *("--k", "4", "--num-latents", "24", "--tokens", str(STEPS * 32), "--batch-tokens", "32", "--lr", "0.01"),
        *("--context", "16", "--buffer-tokens", str(BLOCK * 32), "--threads", "1", "--snapshot-every", "0"),
        *("--device", "cpu"),
    ]


def kept(run: Path) -> list[int]:
    """Return the steps of a run's snapshots."""
    return sorted(int(path.name) for path in (run / "snapshots").glob("[0-9]*"))


def nothing(step: int, batch: ActivationBatch) -> ActivationBatch | None:
    """Leave a batch as it is."""


def small_grid(llama: Path, text: Path) -> TrainConfig:
    """Return what to ask for to get every kind on two layers in a moment."""
    return TrainConfig(
        model=str(llama),
        text=(str(text),),
        layer=(0, 1),
        tokens=50 * 64,
        kind=KINDS,
        k=(4,),
        num_latents=24,
        batch_tokens=64,
        context=32,
        buffer_tokens=512,
        warmup_tokens=0,
        lr=1e-2,
        dead_tokens=256,
        threads=1,
        device="cpu",
    )


def run_of(config: TrainConfig, out: Path) -> Path:
    decompose(make_plan(config), out)
    return out


def weights(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("layers/*/*/model.safetensors")}


class Trainer:
    """Runs `mxd train` on the tiny model in this process, and counts the steps that it takes."""

    def __init__(self, model: Path, text: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch):
        self.arguments = arguments_of(model, text)
        self._run = command(capsys)
        self._patch = patch
        self.before_batch: Callable[[int, ActivationBatch], ActivationBatch | None] = nothing
        self.steps: list[int] = []
        plain = ActivationStream.__next__

        def counted(stream: ActivationStream) -> ActivationBatch:
            position = stream.state()
            step = position.block * BLOCK + position.batch
            batch = plain(stream)
            self.steps.append(step)
            return self.before_batch(step, batch) or batch

        patch.setattr(ActivationStream, "__next__", counted)
        patch.setenv("TOKENIZERS_PARALLELISM", "true")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def __call__(self, out: Path, *more: str) -> Ended:
        arguments = [*self.arguments, "--out", str(out), *more]
        self._patch.setattr(sys, "argv", ["mxd", *arguments])
        self.steps.clear()
        return self._run(*arguments)

    def last_line(self, ended: Ended) -> str:
        lines = [line for line in ended.err.splitlines() if line.startswith("mxd train: ")]
        assert len(lines) == 1
        assert ended.err.endswith(f"{lines[0]}\n")
        return lines[0]
