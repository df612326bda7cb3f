import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
import torch

from mxd.atomic import JSON, json_text
from mxd.cli import demo as demo_command
from mxd.data.activation_cache import ActivationCache, CacheIdentity
from mxd.data.activations import ActivationStream
from mxd.models import MlpPair, load_language_model
from mxd.runs.faults import TrainingFault, TrainingInterrupted
from mxd.runs.run import create_run, is_finished, locked
from mxd.training import decompose as decomposing
from mxd.training import streams
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from mxd.training.plan import Plan
from mxd.training.resources import usable_cores
from tests.tiny_run import TinyRun, assert_refused, command, training
from tests.train_command import Trainer


@pytest.fixture
def config(llama: Path, text: Path) -> TrainConfig:
    return TrainConfig(
        model=str(llama), text=(str(text),), layer=(0,), tokens=128, num_latents=8, k=(2,), batch_tokens=64, context=32,
        device="cpu",
    )  # fmt: skip


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
    began = cast("dict[str, JSON]", json.loads(json_text({"config": asdict(replace(config, revision="main"))})))
    model: dict[str, JSON] = {"id": "someone/llama", "revision": "abc"}
    continued: dict[str, JSON] = {**began, "model": model, "text": {"revision": "def"}, "resources": {}}
    make_plan(replace(config, revision="main"), stored=continued)
    assert asked == {"model": "abc", "text": "def"}


def test_activations_that_are_not_finite_stop_a_run_before_its_first_step(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pairs(model: object, contexts: torch.Tensor, layers: list[int], **_: object) -> dict[int, MlpPair]:
        x = torch.full((*contexts.shape, 16), float("nan"))
        return {layer: MlpPair(x, x) for layer in layers}

    plan = make_plan(replace(config, normalize_input=True))
    monkeypatch.setattr(streams, "mlp_pairs", pairs)
    with pytest.raises(TrainingFault, match="one of layer 0 is NaN or infinite before step 1"):
        decompose(plan, tmp_path / "run")


def test_text_without_held_out_documents_is_said_to_be_so(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"text": "once upon a time " * 200}))
    ended = Trainer(llama, rows, capsys, monkeypatch)(tmp_path / "run", "--dry-run")
    assert ended.status == 0
    assert "so few documents that none is held out" in " ".join(ended.err.split())


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


def test_a_demo_leaves_the_folder_of_one_that_is_at_work_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    create_run(out, {"config": json.loads(json_text(asdict(demo_command.DEMO)))})
    entered: list[Path] = []

    def planned(config: TrainConfig) -> Any:
        return SimpleNamespace(students=[])

    def second(plan: object, folder: Path) -> None:
        entered.append(folder)
        (folder / "work").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"^another mxd demo is at work in .*run; wait for it"):
            demo_command.demo(out)
        assert (folder / "work").is_dir()
        raise TrainingInterrupted("SIGINT")

    monkeypatch.setattr(demo_command, "make_plan", planned)
    monkeypatch.setattr(demo_command, "decompose", second)
    with locked(out), pytest.raises(ValueError, match="another process is training in"):
        demo_command.demo(out)
    assert (out / "run.json").is_file()
    assert entered == []
    with pytest.raises(TrainingInterrupted):
        demo_command.demo(out)
    assert entered == [out]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_demo_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise TrainingInterrupted("SIGINT after step 7 of 245")

    def planned(config: TrainConfig) -> Any:
        return SimpleNamespace(students=[])

    monkeypatch.setattr(demo_command, "make_plan", planned)
    monkeypatch.setattr(demo_command, "decompose", stop)
    with pytest.raises(TrainingInterrupted, match="stopped by SIGINT after step 7 of 245; mxd demo starts it afresh"):
        demo_command.demo(tmp_path / "run")


STEPS, BATCH = 16, 64


@pytest.fixture
def cached(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    # Four contexts in a pass and eight in a shard, so that a run has several shards, some across two blocks.
    monkeypatch.setattr(streams, "FORWARD_TOKENS", 64)
    monkeypatch.setattr(streams, "PASSES_PER_SHARD", 2)
    return TrainConfig(
        model=str(llama),
        text=(str(text),),
        layer=(0, 1),
        tokens=STEPS * BATCH,
        kind=("skip-transcoder",),
        num_latents=16,
        k=(4,),
        lr=1e-2,
        batch_tokens=BATCH,
        context=16,
        buffer_tokens=5 * BATCH,
        output_bias="mean",
        normalize_input=True,
        threads=1,
        device="cpu",
        precision="float32",
        cache=str(tmp_path / "cache"),
    )


def weights_of(config: TrainConfig, run: Path, *, resume: bool = False) -> dict[str, bytes]:
    decompose(make_plan(config), run, resume=resume)
    assert is_finished(run)
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("layers/*/*/*.safetensors")}


def cache_of(plan: Plan) -> ActivationCache:
    assert plan.cache is not None
    return plan.cache


def forbid_the_model(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the model must not run")

    patch.setattr(streams, "mlp_pairs", refuse)


def interrupted(config: TrainConfig, run: Path, step: int) -> None:
    """Train until the stream breaks off behind this step."""
    plain = ActivationStream.__next__
    left = step

    def fail(stream: ActivationStream) -> object:
        nonlocal left
        if left == 0:
            raise ConnectionError("the network is gone")
        left -= 1
        return plain(stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationStream, "__next__", fail)
        with pytest.raises(TrainingFault, match=f"after step {step}"):
            decompose(make_plan(config), run)


def test_a_run_ends_with_the_same_weights_without_a_cache_writing_it_and_reading_it(
    cached: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights_of(replace(cached, cache=None), tmp_path / "plain")
    assert len(expected) == 2
    assert weights_of(cached, tmp_path / "writing") == expected
    forbid_the_model(monkeypatch)
    plan = make_plan(cached)
    assert plan.resources.prefetch == (usable_cores() > 1)
    assert streams.announcement(cache_of(plan)).endswith("; the model does not run")
    assert weights_of(cached, tmp_path / "reading") == expected
    fewer = replace(cached, layer=(1,), tokens=5 * BATCH, batch_tokens=48, buffer_tokens=100)
    assert len(weights_of(fewer, tmp_path / "fewer")) == 1


def test_a_cache_that_rounds_gives_the_same_weights_to_all_who_use_it(
    cached: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = replace(cached, cache_dtype="bfloat16")
    expected = weights_of(rounded, tmp_path / "writing")
    assert expected != weights_of(replace(cached, cache=str(tmp_path / "other")), tmp_path / "exact")
    with pytest.raises(ValueError, match="--cache-dtype bfloat16, this run has float32; give another --cache"):
        make_plan(cached)
    interrupted(replace(rounded, cache=str(tmp_path / "third")), tmp_path / "run", 9)
    forbid_the_model(monkeypatch)
    assert weights_of(rounded, tmp_path / "reading") == expected
    assert weights_of(rounded, tmp_path / "run", resume=True) == expected, "a cache may move"


def test_a_run_is_resumed_where_its_cache_was_removed(cached: TrainConfig, tmp_path: Path) -> None:
    expected = weights_of(cached, tmp_path / "whole")
    shutil.rmtree(tmp_path / "cache")
    interrupted(cached, tmp_path / "run", 13)
    shutil.rmtree(tmp_path / "cache")
    assert weights_of(cached, tmp_path / "run", resume=True) == expected
    assert cache_of(make_plan(cached)).coverage().bytes_missing > 0, "the past is not computed again"
    assert weights_of(cached, tmp_path / "again") == expected


def test_how_activations_were_rounded_is_part_of_a_run(cached: TrainConfig, tmp_path: Path) -> None:
    interrupted(cached, tmp_path / "run", 2)
    rounded = replace(cached, cache=str(tmp_path / "other"), cache_dtype="bfloat16")
    with pytest.raises(ValueError, match=r'config.cache_dtype \("auto" → "bfloat16"\)'):
        decompose(make_plan(rounded), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="cache-dtype must be auto without --cache; got bfloat16"):
        replace(cached, cache=None, cache_dtype="bfloat16")


@pytest.mark.parametrize(("asked", "kept"), [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")])
def test_auto_keeps_what_the_model_computes_without_loss(cached: TrainConfig, asked: str, kept: str) -> None:
    plan = make_plan(replace(cached, model_dtype=asked))  # pyright: ignore[reportArgumentType]
    assert str(plan.activation_dtype) == f"torch.{kept}"
    assert plan.description()["cache"] == {
        "dtype": kept,
        "bytes_there": 0,
        "bytes_to_write": 8 * 8 * 16 * (2 * 32 * plan.activation_dtype.itemsize + 4),
    }
    contexts = plan.tokens.take(4)
    kept_rows, plain = (streams._pairs(source)(0, contexts)[1] for source in (plan, replace(plan, cache=None)))
    assert plain.x.dtype == getattr(torch, asked)
    assert torch.equal(kept_rows.x.to(plain.x.dtype), plain.x)
    assert torch.equal(kept_rows.target, plain.target.to(plan.activation_dtype))


def test_streamed_text_keeps_its_cache_whatever_the_seed(cached: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(cached)

    def of_seed(seed: int) -> CacheIdentity:
        return streams._identity(replace(cached, seed=seed), plan.language_model, plan.text, plan.resources)

    assert of_seed(0).difference(of_seed(1)) == ("--seed", "0", "1")
    monkeypatch.setattr(plan.text, "is_local", False)
    assert of_seed(0) == of_seed(1)


class Disk:
    """As much room as a test wants."""

    def __init__(self, free: int) -> None:
        self.free = free

    def __call__(self, path: Path) -> "Disk":
        assert path.exists()
        return self


def test_a_disk_without_room_is_refused_before_anything_is_written(
    cached: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = cache_of(make_plan(cached)).coverage().bytes_missing
    assert needed == 8 * 8 * 16 * (2 * 32 * 4 + 4)
    monkeypatch.setattr(shutil, "disk_usage", Disk(needed))
    with pytest.raises(ValueError, match=r"needs 260 KiB in .*cache and a little more; 260 KiB are free: make room"):
        make_plan(cached)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shutil, "disk_usage", Disk(int(needed * 1.03)))
    plan = make_plan(cached)
    assert streams.announcement(cache_of(plan)) == (f"cache: 260 KiB to write in {tmp_path}/cache (268 KiB free)")
    decompose(plan, tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", Disk(0))
    assert make_plan(cached).cache is not None, "what is complete needs no room"
    shutil.rmtree(tmp_path / "cache" / "layer-1")
    monkeypatch.setattr(shutil, "disk_usage", Disk(10**9))
    assert streams.announcement(cache_of(make_plan(cached))) == (
        f"cache: 132 KiB to read and 128 KiB to write in {tmp_path}/cache (954 MiB free)"
    )


def test_the_command_announces_what_it_writes_and_refuses_what_is_no_cache(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    tiny = TinyRun(llama, text, tmp_path)
    refused = command(capsys)(*training(tiny, tmp_path / "refused", cache=tmp_path / "taken"))
    assert_refused(refused, "train", "taken must be a cache, or an empty or a new folder", "give another --cache")
    assert not (tmp_path / "refused").exists()
    words = training(tiny, tmp_path / "run", cache=tmp_path / "cache", tokens=512)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    ended = subprocess.run([sys.executable, "-m", "mxd", *words], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0
    assert f"cache: 4.12 MiB to write in {tmp_path}/cache (" in ended.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resources"]["prefetch"] is False
