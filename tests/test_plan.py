import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mxd.atomic import json_text
from mxd.cli import demo as demo_command
from mxd.models import MlpPair, load_language_model
from mxd.training import decompose as decomposing
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from mxd.training.train import TrainingFault, TrainingInterrupted
from tests.train_command import Mxd


@pytest.fixture
def config(llama: Path, text: Path) -> TrainConfig:
    return TrainConfig(
        model=str(llama), text=(str(text),), layer=(0,), tokens=128, num_latents=8, k=(2,), batch_tokens=64, context=32
    )


def test_a_continued_run_reads_hub_repositories_at_the_commits_it_began_with(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str | None] = {}
    open_text = decomposing.open_text

    def load(model: str, *, revision: str | None, **options: Any) -> Any:
        asked["model"] = revision
        return load_language_model(model, **options)

    def opened(*spec: Any, revision: str | None, **options: Any) -> Any:
        asked["text"] = revision
        return open_text(*spec, **options)

    monkeypatch.setattr(decomposing, "load_language_model", load)
    monkeypatch.setattr(decomposing, "open_text", opened)
    make_plan(replace(config, revision="main"))
    assert asked == {"model": "main", "text": None}
    make_plan(replace(config, revision="main"), stored={"model": {"revision": "abc"}, "text": {"revision": "def"}})
    assert asked == {"model": "abc", "text": "def"}


def test_activations_that_are_not_finite_stop_a_run_before_its_first_step(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pairs(model: object, contexts: torch.Tensor, layers: list[int], **_: object) -> dict[int, MlpPair]:
        x = torch.full((*contexts.shape, 16), float("nan"))
        return {layer: MlpPair(x, x) for layer in layers}

    plan = make_plan(replace(config, normalize_input=True))
    monkeypatch.setattr(decomposing, "mlp_pairs", pairs)
    with pytest.raises(TrainingFault, match="one of layer 0 is NaN or infinite before step 1"):
        decompose(plan, tmp_path / "run")


def test_text_without_held_out_documents_is_said_to_be_so(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"text": "once upon a time " * 200}))
    ended = Mxd(llama, rows, capsys, monkeypatch)(tmp_path / "run", "--dry-run")
    assert ended.status == 0
    assert "has so few documents that none is held out" in " ".join(ended.said.split())


def test_the_demo_replaces_a_demo_and_no_other_run(tmp_path: Path) -> None:
    settings = asdict(demo_command.DEMO)
    for name, changed in {"demo": settings, "other": settings | {"tokens": 480_000_000}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json_text({"config": changed}))
    demo_command._require_demo(tmp_path / "demo")
    with pytest.raises(ValueError, match="must be an earlier demo to be replaced"):
        demo_command._require_demo(tmp_path / "other")
    (tmp_path / "other/run.json").write_text("{}")
    with pytest.raises(ValueError, match="must be an earlier demo to be replaced"):
        demo_command._require_demo(tmp_path / "other")


def test_an_interrupted_demo_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise TrainingInterrupted("SIGINT after step 7 of 245")

    def planned(config: TrainConfig) -> Any:
        return SimpleNamespace(students=[])

    monkeypatch.setattr(demo_command, "make_plan", planned)
    monkeypatch.setattr(demo_command, "decompose", stop)
    with pytest.raises(TrainingInterrupted, match="stopped by SIGINT after step 7 of 245; mxd demo starts it afresh"):
        demo_command.demo(tmp_path / "run")
