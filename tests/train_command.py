"""`mxd train` on the tiny model, run in the test's own process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mxd.cli import main
from mxd.data.activations import ActivationBatch, ActivationStream

STEPS = 30
BLOCK = 8
"""Steps of a block of the shuffle buffer."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    said: str


def arguments_of(model: Path, text: Path) -> list[str]:
    return [
        *("train", "--model", str(model), "--text", str(text), "--layer", "0", "1", "--kind", "mxd", "topk-sae"),
        *("--k", "4", "--num-latents", "24", "--tokens", str(STEPS * 32), "--batch-tokens", "32", "--lr", "0.01"),
        *("--context", "16", "--buffer-tokens", str(BLOCK * 32), "--threads", "1", "--snapshot-every", "0"),
        *("--device", "cpu"),
    ]


def nothing(step: int, batch: ActivationBatch) -> ActivationBatch | None:
    """Leave a batch as it is."""


class Mxd:
    """Runs `mxd train` on the tiny model in this process, and counts the steps that it takes."""

    def __init__(self, model: Path, text: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch):
        self.arguments = arguments_of(model, text)
        self._capsys = capsys
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
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, self._capsys.readouterr().err)

    def last_line(self, ended: Ended) -> str:
        lines = [line for line in ended.said.splitlines() if line.startswith("mxd train: ")]
        assert len(lines) == 1
        assert ended.said.endswith(f"{lines[0]}\n")
        return lines[0]
