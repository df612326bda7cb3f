import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mxd.kernels import backends
from mxd.runs.faults import TrainingFault
from mxd.training import resources
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from mxd.training.streams import activation_stream
from mxd.training.student import Student


@pytest.fixture
def config(llama: Path, text: Path) -> TrainConfig:
    return TrainConfig(
        model=str(llama),
        text=(str(text),),
        layer=(1,),
        tokens=1024,
        batch_tokens=256,
        buffer_tokens=512,
        context=32,
        expansion=8,
        k=(4,),
        device="cpu",
        precision="float32",
        threads=1,
    )


def test_threads_are_those_asked_for_on_every_system(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(resources.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(resources.os, "cpu_count", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert resources.resolve_threads(None) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert resources.resolve_threads(config.threads) == 1
    assert resources.resolve_threads(None) == 7


def test_a_float32_model_runs_its_products_as_the_students_do_unless_its_type_was_asked_for(
    config: TrainConfig,
) -> None:
    def precisions(weights: torch.dtype, **changes: Any) -> tuple[str, str]:
        found = resources.resolve_resources(replace(config, **changes), "cpu", 16, weights)
        return found.precision, found.model_precision

    assert precisions(torch.float32) == ("float32", "float32")
    assert precisions(torch.float32, precision="bfloat16") == ("bfloat16", "bfloat16")
    assert precisions(torch.float32, precision="bfloat16", model_dtype="float32") == ("bfloat16", "float32")
    assert precisions(torch.bfloat16, precision="float32") == ("float32", "bfloat16")
    assert precisions(torch.float16, precision="bfloat16") == ("bfloat16", "float16")


def first_batch(config: TrainConfig) -> tuple[Tensor, Tensor]:
    return next(activation_stream(make_plan(config))).layers[1]


def test_a_model_that_multiplies_in_bfloat16_gives_nearly_the_same_activations_in_float32(config: TrainConfig) -> None:
    exact, rounded = first_batch(config), first_batch(replace(config, precision="bfloat16"))
    kept = first_batch(replace(config, precision="bfloat16", model_dtype="float32"))
    for one, other, same in zip(exact, rounded, kept, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert (one - other).square().sum() < 1e-3 * one.square().sum()


def test_a_resumed_run_computes_with_what_it_began_with(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, used = tmp_path / "run", list[str]()
    step = Student.step

    def noted(student: Student, number: int, *rows: Any, **options: Any) -> None:
        used.append(backends.backend(torch.device("cpu")))
        if number == 2 and len(used) == 3:
            raise OSError("out of luck")
        step(student, number, *rows, **options)

    monkeypatch.setattr(Student, "step", noted)
    with backends.using_backend("reference"), pytest.raises(TrainingFault):
        decompose(make_plan(config), run, snapshot_every=0.0)
    stored = json.loads((run / "run.json").read_text())
    assert stored["resources"]["kernels"] == "reference"
    plan = make_plan(config, stored)
    decompose(plan, run, resume=True)
    assert used == ["reference"] * 5
    assert backends.chosen_backend() == "auto"
    with backends.using_backend("torch"), pytest.raises(ValueError, match="MXD_KERNELS must be reference or unset"):
        make_plan(config, stored)


def test_kernels_that_this_machine_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_onednn", lambda: False)
    with pytest.raises(ValueError, match="kernels onednn need an x86 processor"), backends.using_backend("onednn"):
        pass
    assert backends.backend(torch.device("cpu")) == "torch"


@pytest.mark.parametrize("kind", ["mxd", "shared-transcoder"])
def test_micro_batches_change_nothing_but_rounding(kind: str, config: TrainConfig, tmp_path: Path) -> None:
    losses: list[float] = []
    for name, micro_batch_tokens in (("whole", None), ("parts", 64)):
        decompose(make_plan(replace(config, kind=(kind,), micro_batch_tokens=micro_batch_tokens)), tmp_path / name)
        last = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]
        losses.append(json.loads(last)["students"][f"1/{kind}-k4"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
