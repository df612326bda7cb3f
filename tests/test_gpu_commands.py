"""The commands on a CUDA device (`make bench-gpu` runs the tests marked `gpu`), and their twins on the CPU."""

import json
import math
import os
import signal
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from sqlite3 import connect
from typing import Any, cast

import pytest
from rich.console import Console

from mxd.explorer.collect import CollectConfig, collect
from mxd.privacy import InduceConfig, ObjectiveConfig, induce_uncertainty
from mxd.runs.metrics_log import read_metrics
from mxd.training.student import Student
from tests.gpu_devices import on_every_device, on_gpu
from tests.privacy_examples import blobs, trained
from tests.test_pretraining import language_words
from tests.tiny_run import Command, TinyRun, copied, training


@contextmanager
def terminated_in_step(number: int) -> Generator[None, None, None]:
    plain = Student.step

    def noting(student: Student, at: int, *arguments: Any, **keywords: Any) -> None:
        plain(student, at, *arguments, **keywords)
        if at == number and student.id.startswith("mxd"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "step", noting)
        yield


def saved_layers(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("layers/*/*/*")}


@on_every_device
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    mxd: Command, tiny: TinyRun, tmp_path: Path, precision: str, device: str
) -> None:
    settings: dict[str, object] = {
        "device": device,
        "precision": precision,
        "kind": ("mxd", "topk-sae"),
        "tokens": 4096,
    }
    settings |= {"buffer_tokens": 1024, "aux_coefficient": 0.03, "dead_tokens": 512}
    assert mxd(*training(tiny, tmp_path / "whole", **settings)).status == 0
    with terminated_in_step(3):
        assert mxd(*training(tiny, tmp_path / "parts", **settings)).status == 130
    assert mxd(*training(tiny, tmp_path / "parts", "--resume", **settings)).status == 0
    assert len(saved_layers(tmp_path / "whole")) == 4
    assert saved_layers(tmp_path / "parts") == saved_layers(tmp_path / "whole")


@on_every_device
def test_evaluation_finds_what_the_cpu_finds(mxd: Command, tiny: TinyRun, tmp_path: Path, device: str) -> None:
    found: list[list[dict[str, Any]]] = []
    for place in dict.fromkeys(("cpu", device)):
        run = copied(tiny.run, tmp_path / place)
        ended = mxd("evaluate", run, "--device", place, "--student", "0/mxd-k4", "1/topk-sae-k4", "--json")
        assert ended.status == 0
        found.append(json.loads(ended.out))
    assert len(found[0]) == 2
    for one, other in zip(found[0], found[-1], strict=True):
        for name in ("fvu", "ce_increase", "kl"):
            assert math.isfinite(other[name])
            assert other[name] == pytest.approx(one[name], rel=1e-2, abs=1e-3)


@on_gpu
def test_the_explorer_collects_as_many_firings_as_on_the_cpu(tiny: TinyRun, tmp_path: Path, device: str) -> None:
    firings: list[int] = []
    for place in ("cpu", device):
        database, config = tmp_path / f"{place}.sqlite", CollectConfig(device=place, student=("0/mxd-k4",))
        collect(tiny.run, database, config, Console(quiet=True))
        with closing(connect(database)) as connection:
            firings.append(connection.execute("SELECT sum(firings) FROM latents").fetchone()[0])
    assert firings[1] == pytest.approx(firings[0], rel=1e-2)


@on_gpu
def test_steering_writes_its_rows(mxd: Command, tiny: TinyRun, tmp_path: Path, device: str) -> None:
    words = ("--latents", "0-2", "--samples", 2, "--new-tokens", 4, "--student", "0/mxd-k4", "--json")
    ended = mxd("steer", tiny.run, *words, "--device", device, "--out", tmp_path / "out")
    assert ended.status == 0
    assert len(json.loads(ended.out)["rows"]) == 3


@on_gpu
def test_a_model_is_pretrained(mxd: Command, text: Path, gpt2: Path, tmp_path: Path, device: str) -> None:
    assert mxd(*language_words(text, gpt2, tmp_path / "run", device=device)).status == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    held_out = [cast("float", record["held_out_loss"]) for record in records if "held_out_loss" in record]
    assert len(held_out) > 1
    assert all(math.isfinite(loss) for loss in held_out)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@on_every_device
def test_uncertainty_is_induced(device: str) -> None:
    whole = blobs(90, seed=1)
    model = trained(whole).to(device)
    protected, retained = whole.take(slice(0, 6)), whole.take(slice(6, 90))
    config = InduceConfig(
        objective=ObjectiveConfig(theta=0.5), steps=20, optimizer="adam", lr=0.02, check_every=5, max_accuracy_drop=0.5
    )
    found = induce_uncertainty(model, protected, retained, config)
    assert found.chosen.step > 0
    weights = list(found.model.parameters())
    assert all(weight.device.type == device and bool(weight.isfinite().all()) for weight in weights)
