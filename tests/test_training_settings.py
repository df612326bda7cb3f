import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from mxd.kernels.backends import backend
from mxd.layers import MixtureOfDecodersConfig
from mxd.layers.sizing import transcoder_budget
from mxd.training import decompose as decomposing
from mxd.training.config import TrainConfig
from mxd.training.decompose import make_plan
from mxd.training.grid import learning_rate
from tests.tiny_model import D_HIDDEN, D_MODEL
from tests.tiny_run import KINDS
from tests.train_command import run_of, small_grid


@pytest.fixture
def config(llama: Path, text: Path) -> TrainConfig:
    return small_grid(llama, text)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_students_have_matched_parameters_and_the_sites_own_dense_encoder(
    config: TrainConfig, request: pytest.FixtureRequest, family: Any
) -> None:
    folder = request.getfixturevalue(family)
    plan = make_plan(replace(config, model=str(folder), num_latents=None, expansion=32))
    budget = transcoder_budget(D_MODEL, D_MODEL, 32)
    for student in plan.students:
        assert abs(student.parameters - budget) <= (2 * D_MODEL + 1) / 2
        assert student.parameters == sum(p.numel() for p in student.build().parameters())
    mxd = plan.students[0].network
    assert isinstance(mxd, MixtureOfDecodersConfig)
    assert mxd.d_hidden == D_HIDDEN[family]
    assert (mxd.encoder, mxd.activation) == (("glu", "silu") if family == "llama" else ("mlp", "gelu_tanh"))
    chosen = make_plan(replace(config, hidden=8, activation="relu", encoder="mlp")).students[0].network
    assert isinstance(chosen, MixtureOfDecodersConfig)
    assert (chosen.d_hidden, chosen.activation, chosen.encoder, chosen.num_experts) == (8, "relu", "mlp", 24)


def parsed(*arguments: str) -> TrainConfig:
    required = ["--model", "m", "--text", "t", "--layer", "0", "--tokens", "1", "--kind", "mxd", "transcoder"]
    return tyro.cli(TrainConfig, args=[*required, *arguments])


def test_learning_rates_are_one_number_or_one_a_kind_or_by_width(config: TrainConfig, tmp_path: Path) -> None:
    kinds = {"mxd": 1e-3, "transcoder": 2e-3, "skip-transcoder": 3e-3, "topk-sae": 4e-3}
    plan = make_plan(replace(config, lr=kinds))
    assert {student.kind: student.lr for student in plan.students} == kinds
    seen: dict[str, float] = {}
    for student in [decomposing._student(plan, planned) for planned in plan.students]:
        seen[student.network.kind] = student.config.lr
    assert seen == kinds
    for kind in KINDS:
        rates = [learning_rate(replace(config, lr="auto"), kind, width) for width in (64, 256, 1024)]
        assert rates == pytest.approx([rates[0], rates[0], rates[0] / 4])
    assert (parsed("--lr", "auto").lr, parsed("--lr", "0.01").lr) == ("auto", 0.01)
    assert parsed("--lr", "mxd", "1e-3", "transcoder", "2e-3").lr == {"mxd": 1e-3, "transcoder": 2e-3}
    with pytest.raises(ValueError, match="topk-sae have none"):
        replace(config, lr=dict.fromkeys(KINDS[:-1], 0.001))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("seed", -1), ("warmup_tokens", -1), ("clip", 0.0), ("lr", 0.0), ("lr", float("nan")), ("k", (0,))),
        *(("layer", ()), ("kind", ("mxd", "mxd")), ("k", (25,)), ("context", 1), ("aux_coefficient", -1.0)),
        *(("seed", 2**63), ("threads", 0), ("batch_tokens", 0), ("activation", "tanh"), ("kind", ("moe",))),
    ],
)
def test_impossible_settings_are_refused_by_name(config: TrainConfig, field: str, value: object) -> None:
    assert field in {known.name for known in fields(config)}
    with pytest.raises(ValueError, match=field.replace("_", "-")):
        replace(config, **{field: value})


def test_the_last_seed_that_pytorch_takes_is_taken(config: TrainConfig) -> None:
    last = replace(config, seed=2**63 - 3, seeds=3, layer=(0,), kind=("mxd",))
    assert [student.seed for student in make_plan(last).students][-1] == 2**63 - 1
    torch.Generator().manual_seed(2**63 - 1)
    with pytest.raises(ValueError, match=r"must lie below 2\*\*63; got 9223372036854775805 and 4 of them"):
        replace(last, seeds=4)


def test_run_json_says_what_was_trained_and_on_what(config: TrainConfig, tmp_path: Path) -> None:
    run = run_of(replace(config, tokens=100), tmp_path / "run")
    stored = json.loads((run / "run.json").read_text())
    assert stored["config"]["model"] == config.model
    assert stored["steps"] == 2
    assert len(stored["students"]) == 8
    assert stored["resources"] == {
        "device": "cpu",
        "precision": "float32",
        "model_precision": "float32",
        "kernels": backend(torch.device("cpu")),
        "threads": 1,
        "prefetch": False,
    }
