import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxd.cli import main
from mxd.data.activations import ActivationBatch
from mxd.runs import metrics_log, snapshots
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import is_finished
from mxd.training import decompose as decomposing
from mxd.training.student import Student
from tests.train_command import STEPS, Mxd, arguments_of, nothing

SERVER = """
import os, sys, torch, transformers
from mxd.cli import main
import mxd.training.decompose, transformers.models.llama.modeling_llama
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv = ["mxd", *line.rstrip("\\n").split("\\t")]
        os.dup2(os.open(sys.argv.pop(), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        try:
            main()
        except SystemExit as end:
            os._exit(end.code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs one `mxd` after the other, each in a process of its own, and pays for the imports once."""


@pytest.fixture
def mxd(llama: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Mxd:
    return Mxd(llama, text, capsys, monkeypatch)


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


def kept(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "snapshots").glob("[0-9]*"))


def test_a_snapshot_after_every_step_changes_nothing_else(mxd: Mxd, uninterrupted: Path, tmp_path: Path) -> None:
    assert mxd(tmp_path / "run").status == 0
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


class Server:
    """Starts `mxd` processes that can be killed."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._said()

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, arguments: list[str], errors: Path) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write("\t".join([*arguments, str(errors)]) + "\n")
        self._process.stdin.flush()
        return int(self._said())

    def status(self) -> int:
        return int(self._said())

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


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
    mxd: Mxd, server: Server, uninterrupted: Path, tmp_path: Path, seed: int
) -> None:
    run, errors, chance = tmp_path / "run", tmp_path / "errors", random.Random(seed)
    arguments = [*mxd.arguments, "--out", str(run), "--resume"]
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


def test_a_second_sigint_stops_at_once_and_says_how_to_go_on(mxd: Mxd, uninterrupted: Path, tmp_path: Path) -> None:
    with during_step(25, signal.SIGINT, signal.SIGINT):
        ended = mxd(tmp_path / "run")
    assert ended.status == 130
    assert "stopped by SIGINT; go on with: mxd train" in mxd.last_line(ended)
    assert kept(tmp_path / "run") == [24, 25]
    assert mxd(tmp_path / "run", "--resume").status == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_exceptions_out_of_the_stream_at_any_step_change_nothing(mxd: Mxd, uninterrupted: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    steps = sorted(chance.sample(range(1, STEPS), 3))
    for step in steps:

        def fail(at: int, batch: ActivationBatch, step: int = step) -> None:
            if at == step:
                raise ConnectionError("the hub is gone")

        mxd.before_batch = fail
        ended = mxd(tmp_path / "run", "--resume")
        assert ended.status == 3
        assert f"broke off after step {step:,} (the hub is gone)" in mxd.last_line(ended)
        assert "continue with --resume" in mxd.last_line(ended)
        assert kept(tmp_path / "run")[-1] == step
        assert not list((tmp_path / "run").glob("layers"))
    mxd.before_batch = nothing
    assert mxd(tmp_path / "run", "--resume").status == 0
    assert mxd.steps[0] == steps[-1]
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_130_a_snapshot_and_the_command_that_resumes(
    mxd: Mxd, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "a run"
    # The last one given counts: no snapshot is due before the signal.
    with during_step(22, number):
        ended = mxd(run, "--snapshot-every", "600")
    assert ended.status == 130
    line = mxd.last_line(ended)
    assert f"stopped by {number.name} after step 23 of 30; go on with: mxd train --model" in line
    assert line.endswith(f"--out '{run}' --snapshot-every 600 --resume")
    assert kept(run) == [23]
    assert mxd(run, "--resume").status == 0
    assert mxd.steps == list(range(23, STEPS))
    assert_same_run(run, uninterrupted)


def interrupted(mxd: Mxd, run: Path, step: int) -> None:
    def stop(at: int, batch: ActivationBatch) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    mxd.before_batch = stop
    assert mxd(run).status == 130
    mxd.before_batch = nothing


def test_a_damaged_snapshot_is_passed_over_in_favour_of_the_one_before(
    mxd: Mxd, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    interrupted(mxd, run, 26)
    assert kept(run) == [25, 26]
    tensors = run / "snapshots/0000000026/tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert mxd(run, "--resume").status == 0
    assert "0000000026 is damaged and passed over" in caplog.text
    assert mxd.steps[0] == 25
    assert_same_run(run, uninterrupted)


def test_resuming_where_there_is_no_run_or_no_snapshot_begins_anew(
    mxd: Mxd, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def fail(step: int, batch: ActivationBatch) -> None:
        if step == 21:
            raise OSError("no more text")

    mxd.before_batch = fail
    assert mxd(run, "--resume", "--snapshot-every", "600").status == 3
    assert kept(run) == [21]
    shutil.rmtree(run / "snapshots")
    mxd.before_batch = nothing
    assert mxd(run, "--resume", "--snapshot-every", "600").status == 0
    assert mxd.steps == list(range(STEPS))
    assert_same_run(run, uninterrupted)


def state_of(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


def test_a_finished_run_stays_as_it_is(mxd: Mxd, uninterrupted: Path) -> None:
    before = state_of(uninterrupted)
    ended = mxd(uninterrupted, "--resume")
    assert (ended.status, mxd.steps) == (0, [])
    assert "is finished already" in ended.said
    assert state_of(uninterrupted) == before
    assert mxd(uninterrupted).status == 2
    assert state_of(uninterrupted) == before


def changed_run(run: Path, **versions: str) -> None:
    """Let a run be of other versions, and of a version of mxd that has an option less."""
    stored = json.loads((run / "run.json").read_text())
    stored["versions"] |= versions
    del stored["config"]["cache_dtype"]
    (run / "run.json").write_text(json.dumps(stored))


def test_a_finished_run_stays_as_it_is_under_other_versions_and_without_its_model(
    mxd: Mxd, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    changed_run(run, torch="1.0", python="3.9.1")
    stored = json.loads((run / "run.json").read_text())
    gone = str(tmp_path / "gone")
    stored["config"]["model"] = gone
    (run / "run.json").write_text(json.dumps(stored))
    before = state_of(run)
    ended = mxd(run, "--resume", "--model", gone)
    assert (ended.status, mxd.steps) == (0, [])
    assert "is finished already" in ended.said
    ended = mxd(run, "--resume", "--model", gone, "--lr", "0.02", "--layer", "0", "1", "2")
    assert ended.status == 2
    assert "config.layer.2 (absent → 2), config.lr (0.01 → 0.02)" in mxd.last_line(ended)
    assert state_of(run) == before


def test_other_versions_are_named_apart_and_with_what_to_install(mxd: Mxd, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(mxd, run, 5)
    stored = json.loads((run / "run.json").read_text())
    stored["versions"] |= {"torch": "1.0", "python": "3.9.1"}
    (run / "run.json").write_text(json.dumps(stored))
    before = state_of(run)
    ended = mxd(run, "--resume")
    assert ended.status == 2
    line = mxd.last_line(ended)
    assert "was started with other versions (stored → installed): " in line
    assert 'versions.python ("3.9.1" → ' in line
    assert "install the stored ones, with pip install 'torch==1.0', to continue it" in line
    assert "another configuration" not in line
    both = mxd.last_line(mxd(run, "--resume", "--lr", "0.02"))
    assert "config.lr (0.01 → 0.02)" in both
    assert "'torch==1.0'" in both
    assert state_of(run) == before


def test_another_configuration_is_refused_field_by_field_and_leaves_the_run_alone(mxd: Mxd, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(mxd, run, 5)
    before = state_of(run)
    ended = mxd(run, "--resume", "--lr", "0.02", "--clip", "1.0")
    assert ended.status == 2
    line = mxd.last_line(ended)
    assert all(name in line for name in ("config.lr (0.01 → 0.02)", "config.clip (null → 1.0)", "another --out"))
    assert state_of(run) == before


def test_a_resumed_run_keeps_its_threads_and_precision(
    mxd: Mxd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupted(mxd, run, 5)
    path = run / "run.json"
    stored = json.loads(path.read_text())
    stored["resources"] |= {"threads": 2, "precision": "bfloat16"}
    path.write_text(json.dumps(stored))
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert mxd(run, "--resume").status == 0
    assert asked == [1, 2]


def tensors_of(run: Path) -> list[torch.Tensor]:
    return [t for path in (run / "snapshots").glob("*/tensors.safetensors") for t in load_file(path).values()]


def poison(batch: ActivationBatch, what: str, value: float) -> ActivationBatch:
    rows = batch.layers[1]
    changed = (rows.x if what == "x" else rows.target).clone()
    changed[3, 2] = value
    return batch._replace(layers={**batch.layers, 1: rows._replace(**{what: changed})})


@pytest.mark.parametrize(("what", "value"), [("x", float("nan")), ("target", float("inf"))])
@pytest.mark.parametrize("snapshot_every", ["0", "600"])
def test_an_activation_that_is_not_finite_is_named_with_its_step(
    mxd: Mxd, tmp_path: Path, what: str, value: float, snapshot_every: str
) -> None:
    mxd.before_batch = lambda step, batch: poison(batch, what, value) if step == 10 else None
    ended = mxd(tmp_path / "run", "--snapshot-every", snapshot_every)
    assert ended.status == 3
    line = mxd.last_line(ended)
    assert "1/mxd-k4 must have finite numbers; an activation of layer 1 was NaN or infinite at step 11." in line
    if snapshot_every == "0":
        assert "The snapshot of step 10 in" in line
        assert "snapshots is from before it: run the model in a wider type" in line
        assert kept(tmp_path / "run") == [9, 10]
        assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path / "run"))
    else:
        assert "No snapshot was due before it: " in line
        assert kept(tmp_path / "run") == []


def test_a_learning_rate_that_is_too_high_ends_in_a_fault_and_keeps_no_weight_that_is_not_finite(
    mxd: Mxd, tmp_path: Path
) -> None:
    for name, more in {"loss": ["1e30"], "gradient": ["1e38"]}.items():
        ended = mxd(tmp_path / name, "--lr", *more)
        assert ended.status == 3
        assert "lower its learning rate" in mxd.last_line(ended)
        assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path / name))
        assert not list((tmp_path / name).glob("layers"))


def test_a_model_with_an_infinite_weight_ends_in_a_fault_at_the_first_step(
    mxd: Mxd, llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"][0, 0] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ended = mxd(tmp_path / "run", "--model", str(folder))
    assert ended.status == 3
    assert "an activation of layer 1 was NaN or infinite at step 1. No snapshot was due" in mxd.last_line(ended)


@pytest.mark.parametrize("file", ["snapshot", "metrics", "layer"])
def test_a_full_disk_ends_in_a_fault_and_the_run_goes_on_from_the_last_good_snapshot(
    mxd: Mxd, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    run = tmp_path / "run"

    module, name = {
        "snapshot": (snapshots, "save_file"),
        "metrics": (metrics_log, "_line"),
        "layer": (decomposing, "save_layer"),
    }[file]
    write = getattr(module, name)

    def write_or_fail(*arguments: object) -> object:
        if not has_room and mxd.steps[-1] >= 19:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    has_room = False
    monkeypatch.setattr(module, name, write_or_fail)
    ended = mxd(run)
    assert ended.status == 3
    line = mxd.last_line(ended)
    assert "No space left on device" in line
    assert "continue with --resume" in line
    assert kept(run)[-1] == (30 if file == "layer" else 19)
    has_room = True
    assert mxd(run, "--resume").status == 0
    assert_same_run(run, uninterrupted)


def test_layers_that_could_not_be_saved_are_saved_without_training_again(
    mxd: Mxd, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(decomposing, "save_layer", full)
        assert mxd(tmp_path / "run", "--snapshot-every", "600").status == 3
    assert mxd(tmp_path / "run", "--snapshot-every", "600", "--resume").status == 0
    assert mxd.steps == []
    assert_same_run(tmp_path / "run", uninterrupted)
