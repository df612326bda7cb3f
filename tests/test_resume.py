import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd.cli import main
from mxd.data.activations import ActivationBatch
from mxd.runs import metrics_log, snapshots
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import is_finished
from mxd.training import decompose as decomposing
from mxd.training.student import Student
from tests.killable import Server
from tests.train_command import STEPS, Trainer, arguments_of, kept, nothing


@pytest.fixture(scope="module")
def uninterrupted(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "true")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        patch.setattr(sys, "argv", ["mxd", *arguments_of(llama, text), "--snapshot-every", "600", "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    assert kept(out) == [STEPS]
    return out


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("layers/*/*/*")}


def metrics(run: Path) -> list[dict[str, object]]:
    return [
        {name: value for name, value in r.items() if name != "seconds"} for r in read_metrics(run / "metrics.jsonl")
    ]


def assert_same_run(run: Path, other: Path) -> None:
    assert len(content(run)) == 8
    assert content(run) == content(other)
    assert metrics(run) == metrics(other)
    assert [record["step"] for record in metrics(run)] == [20, 30]
    assert is_finished(run)


def test_a_snapshot_after_every_step_changes_nothing_else(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path
) -> None:
    assert trainer(tmp_path / "run").status == 0
    assert_same_run(tmp_path / "run", uninterrupted)
    assert kept(tmp_path / "run") == [29, 30]


@contextmanager
def during_step(step: int, *signals: signal.Signals) -> Generator[None, None, None]:
    """Let signals arrive in the middle of this step."""
    plain = Student.step

    def noting(student: Student, at: int, *arguments: Any, **keywords: Any) -> None:
        plain(student, at, *arguments, **keywords)
        for number in signals if at == step and student.layer == 0 and student.id.startswith("mxd") else ():
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "step", noting)
        yield


@pytest.fixture(scope="module")
def server(token_cache: Path) -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    trainer: Trainer, server: Server, uninterrupted: Path, tmp_path: Path, seed: int
) -> None:
    run, errors, chance = tmp_path / "run", tmp_path / "errors", random.Random(seed)
    arguments = [*trainer.arguments, "--out", str(run), "--resume"]
    reached = 0
    for kill in range(3):
        process = server.start(arguments, errors)
        wait_for(lambda least=reached: bool(kept(run)) and kept(run)[-1] > least)
        if kill == seed:
            wait_for(lambda: any((run / "snapshots").glob(".*.partial/tensors.safetensors")))
        else:
            time.sleep(chance.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        assert server.status() == -signal.SIGKILL
        assert not is_finished(run)
        reached = kept(run)[-1]
    server.start(arguments, errors)
    assert server.status() == 0, errors.read_text()
    assert_same_run(run, uninterrupted)


def test_a_second_sigint_stops_at_once_and_says_how_to_go_on(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path
) -> None:
    with during_step(25, signal.SIGINT, signal.SIGINT):
        ended = trainer(tmp_path / "run")
    assert ended.status == 130
    assert "stopped by SIGINT; go on with: mxd train" in trainer.last_line(ended)
    assert kept(tmp_path / "run") == [24, 25]
    assert trainer(tmp_path / "run", "--resume").status == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_exceptions_out_of_the_stream_at_any_step_change_nothing(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path
) -> None:
    chance = random.Random(0)
    steps = sorted(chance.sample(range(1, STEPS), 3))
    for step in steps:

        def fail(at: int, batch: ActivationBatch, step: int = step) -> None:
            if at == step:
                raise ConnectionError("the hub is gone")

        trainer.before_batch = fail
        ended = trainer(tmp_path / "run", "--resume")
        assert ended.status == 3
        assert f"broke off after step {step:,} (the hub is gone)" in trainer.last_line(ended)
        assert "continue with --resume" in trainer.last_line(ended)
        assert kept(tmp_path / "run")[-1] == step
        assert not list((tmp_path / "run").glob("layers"))
    trainer.before_batch = nothing
    assert trainer(tmp_path / "run", "--resume").status == 0
    assert trainer.steps[0] == steps[-1]
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_130_a_snapshot_and_the_command_that_resumes(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "a run"
    # The last one given counts: no snapshot is due before the signal.
    with during_step(22, number):
        ended = trainer(run, "--snapshot-every", "600")
    assert ended.status == 130
    line = trainer.last_line(ended)
    assert f"stopped by {number.name} after step 23 of 30; go on with: mxd train --model" in line
    assert line.endswith(f"--out '{run}' --snapshot-every 600 --resume")
    assert kept(run) == [23]
    assert trainer(run, "--resume").status == 0
    assert trainer.steps == list(range(23, STEPS))
    assert_same_run(run, uninterrupted)


def interrupted(trainer: Trainer, run: Path, step: int) -> None:
    def stop(at: int, batch: ActivationBatch) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.before_batch = stop
    assert trainer(run).status == 130
    trainer.before_batch = nothing


def test_a_damaged_snapshot_is_passed_over_in_favour_of_the_one_before(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    interrupted(trainer, run, 26)
    assert kept(run) == [25, 26]
    tensors = run / "snapshots/0000000026/tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert trainer(run, "--resume").status == 0
    assert "0000000026 is damaged and passed over" in caplog.text
    assert trainer.steps[0] == 25
    assert_same_run(run, uninterrupted)


def test_resuming_where_there_is_no_run_or_no_snapshot_begins_anew(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def fail(step: int, batch: ActivationBatch) -> None:
        if step == 21:
            raise OSError("no more text")

    trainer.before_batch = fail
    assert trainer(run, "--resume", "--snapshot-every", "600").status == 3
    assert kept(run) == [21]
    shutil.rmtree(run / "snapshots")
    trainer.before_batch = nothing
    assert trainer(run, "--resume", "--snapshot-every", "600").status == 0
    assert trainer.steps == list(range(STEPS))
    assert_same_run(run, uninterrupted)


def state_of(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


def test_a_finished_run_stays_as_it_is(trainer: Trainer, uninterrupted: Path) -> None:
    before = state_of(uninterrupted)
    ended = trainer(uninterrupted, "--resume")
    assert (ended.status, trainer.steps) == (0, [])
    assert "is finished already" in ended.err
    assert state_of(uninterrupted) == before
    assert trainer(uninterrupted).status == 2
    assert state_of(uninterrupted) == before


def changed_run(run: Path, **versions: str) -> None:
    """Let a run be of other versions, and of a version of mxd that has an option less."""
    stored = json.loads((run / "run.json").read_text())
    stored["versions"] |= versions
    del stored["config"]["cache_dtype"]
    (run / "run.json").write_text(json.dumps(stored))


def test_a_finished_run_stays_as_it_is_under_other_versions_and_without_its_model(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    changed_run(run, torch="1.0", python="3.9.1")
    stored = json.loads((run / "run.json").read_text())
    gone = str(tmp_path / "gone")
    stored["config"]["model"] = gone
    (run / "run.json").write_text(json.dumps(stored))
    before = state_of(run)
    ended = trainer(run, "--resume", "--model", gone)
    assert (ended.status, trainer.steps) == (0, [])
    assert "is finished already" in ended.err
    ended = trainer(run, "--resume", "--model", gone, "--lr", "0.02", "--layer", "0", "1", "2")
    assert ended.status == 2
    assert "config.layer.2 (absent → 2), config.lr (0.01 → 0.02)" in trainer.last_line(ended)
    assert state_of(run) == before


def test_other_versions_are_named_apart_and_with_what_to_install(trainer: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(trainer, run, 5)
    stored = json.loads((run / "run.json").read_text())
    stored["versions"] |= {"torch": "1.0", "python": "3.9.1"}
    (run / "run.json").write_text(json.dumps(stored))
    before = state_of(run)
    ended = trainer(run, "--resume")
    assert ended.status == 2
    line = trainer.last_line(ended)
    assert "was started with other versions (stored → installed): " in line
    assert 'versions.python ("3.9.1" → ' in line
    assert "install the stored ones, with pip install 'torch==1.0', to continue it" in line
    assert "another configuration" not in line
    both = trainer.last_line(trainer(run, "--resume", "--lr", "0.02"))
    assert "config.lr (0.01 → 0.02)" in both
    assert "'torch==1.0'" in both
    assert state_of(run) == before


def test_another_configuration_is_refused_field_by_field_and_leaves_the_run_alone(
    trainer: Trainer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted(trainer, run, 5)
    before = state_of(run)
    ended = trainer(run, "--resume", "--lr", "0.02", "--clip", "1.0")
    assert ended.status == 2
    line = trainer.last_line(ended)
    assert all(name in line for name in ("config.lr (0.01 → 0.02)", "config.clip (null → 1.0)", "another --out"))
    assert state_of(run) == before


@pytest.mark.parametrize("begun_with", [{"warmup_steps": 7}, {}])
def test_a_run_whose_warm_up_would_come_out_otherwise_is_not_resumed(
    begun_with: dict[str, int], trainer: Trainer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted(trainer, run, 5)
    stored = json.loads((run / "run.json").read_text())
    del stored["warmup_steps"]
    (run / "run.json").write_text(json.dumps(stored | begun_with))
    ended = trainer(run, "--resume")
    assert ended.status == 2
    line = trainer.last_line(ended)
    assert f"warmup_steps ({begun_with.get('warmup_steps', 'absent')} → " in line
    assert "continue it with the version of mxd that began it or name another --out." in line


def test_a_resumed_run_keeps_its_threads_and_precision(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupted(trainer, run, 5)
    path = run / "run.json"
    stored = json.loads(path.read_text())
    stored["resources"] |= {"threads": 2, "precision": "bfloat16"}
    path.write_text(json.dumps(stored))
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert trainer(run, "--resume").status == 0
    assert asked == [1, 2]


@pytest.mark.parametrize("file", ["snapshot", "metrics", "layer"])
def test_a_full_disk_ends_in_a_fault_and_the_run_goes_on_from_the_last_good_snapshot(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    run = tmp_path / "run"

    module, name = {
        "snapshot": (snapshots, "save_file"),
        "metrics": (metrics_log, "_line"),
        "layer": (decomposing, "save_layer"),
    }[file]
    write = getattr(module, name)

    def write_or_fail(*arguments: object) -> object:
        if not has_room and trainer.steps[-1] >= 19:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    has_room = False
    monkeypatch.setattr(module, name, write_or_fail)
    ended = trainer(run)
    assert ended.status == 3
    line = trainer.last_line(ended)
    assert "No space left on device" in line
    assert "continue with --resume" in line
    assert kept(run)[-1] == (30 if file == "layer" else 19)
    has_room = True
    assert trainer(run, "--resume").status == 0
    assert_same_run(run, uninterrupted)


def test_layers_that_could_not_be_saved_are_saved_without_training_again(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(decomposing, "save_layer", full)
        assert trainer(tmp_path / "run", "--snapshot-every", "600").status == 3
    assert trainer(tmp_path / "run", "--snapshot-every", "600", "--resume").status == 0
    assert trainer.steps == []
    assert_same_run(tmp_path / "run", uninterrupted)
