import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from mxd.atomic import JSON, canonical_json, write_bytes_atomically, write_json_atomically
from mxd.evaluation.students import load_students
from mxd.runs.metrics_log import MetricsLog, MetricsSink, TensorBoardSink, WandbSink, flatten_record, read_metrics
from mxd.runs.progress import MOST_STUDENTS, SmoothedRate, TrainingProgress
from mxd.runs.run import create_run, is_finished, is_run, locked, mark_finished, read_configuration, reopen_run
from mxd.runs.signals import interruptible


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_atomic_write_that_fails_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json_atomically(path, {"b": 1, "a": [True, None, "ü"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": 1, "a": [True, None, "ü"]}
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes_atomically(path, b"new")
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomically(path, math.inf)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.json"]


def test_canonical_json_does_not_depend_on_order() -> None:
    assert canonical_json({"b": 1, "a": {"d": 2, "c": 3}}) == canonical_json({"a": {"c": 3, "d": 2}, "b": 1})


def test_a_run_is_created_once_and_reopened_with_the_same_configuration(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    configuration: dict[str, JSON] = {"k": 32, "lr": 1e-3, "layers": (1, 2), "data": {"text": "stdlib", "seed": None}}
    stored: dict[str, JSON] = {**configuration, "layers": [1, 2]}
    assert not is_run(run)
    create_run(run, configuration)
    assert is_run(run)
    assert reopen_run(run, configuration) == stored
    assert read_configuration(run) == stored
    with pytest.raises(ValueError, match=r"exists; pass --resume to continue it or name another --out\.$"):
        create_run(run, configuration)
    assert names(run) == ["run.json"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        create_run(tmp_path / "full", {})
    with pytest.raises(ValueError, match="got a file"):
        create_run(tmp_path / "file", {})
    with pytest.raises(ValueError, match=r"no run\.json"):
        reopen_run(tmp_path / "full", {})


def test_a_folder_whose_creation_was_killed_can_be_created_again(tmp_path: Path) -> None:
    (tmp_path / ".run.json.partial").write_text('{"half')
    create_run(tmp_path, {"k": 1})
    assert names(tmp_path) == ["run.json"]
    write_json_atomically(tmp_path / "run.json", [1])
    with pytest.raises(ValueError, match="JSON object"):
        read_configuration(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="must hold JSON"):
        read_configuration(tmp_path)


def test_one_process_at_a_time_trains_in_a_run(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    refused = r"^another process is training in .*run; wait for it or stop it\.$"
    script = "import sys, pathlib, mxd.runs.run as r\nwith r.locked(pathlib.Path(sys.argv[1])): print('in')"
    second = [sys.executable, "-c", script, str(run)]
    with locked(run):
        create_run(run, {})
        with pytest.raises(ValueError, match=refused), locked(run):
            pass
        done = subprocess.run(second, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "ValueError: another process is training in" in done.stderr
        with locked(tmp_path / "other"):
            pass
    assert names(run) == [".lock", "run.json"]
    with pytest.raises(KeyError), locked(run):
        raise KeyError
    assert subprocess.run(second, capture_output=True, text=True, check=True).stdout == "in\n"


def test_a_lock_that_stayed_behind_is_no_run(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    assert names(tmp_path) == [".lock"]
    assert not is_run(tmp_path)
    create_run(tmp_path, {})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="got a file"), locked(tmp_path / "file"):
        pass


def test_where_files_cannot_be_locked_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    number = errno.ENOSYS

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked(tmp_path), locked(tmp_path):
        pass
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(tmp_path / "new"), locked(tmp_path / "new"):
        pass
    assert names(tmp_path) == [".lock"]


@pytest.mark.parametrize(
    ("student", "lacking"), [({}, "layer and id"), ({"layer": 3}, "id"), ({"id": "a", "layer": None}, "layer")]
)
def test_students_without_layer_or_id_are_refused(tmp_path: Path, student: dict[str, object], lacking: str) -> None:
    described = [{"layer": 1, "id": "a"}, student]
    with pytest.raises(ValueError, match=rf"run\.json must have .*; students\.1 lacks {lacking}; restore "):
        load_students(tmp_path, described)


def test_every_field_that_differs_is_named(tmp_path: Path) -> None:
    stored: dict[str, JSON] = {
        "k": 32,
        "same": 1.0,
        "flag": True,
        "students": [{"kind": "mxd", "k": 16}, {"kind": "mxd", "k": 32}],
        "versions": {"torch": "2.9"},
        "gone": "x" * 100,
        "layers": [1, 2],
    }
    create_run(tmp_path, stored)
    before = (tmp_path / "run.json").read_bytes()
    asked: dict[str, JSON] = {
        "k": 64,
        "same": 1,
        "flag": 1,
        "students": [{"kind": "mxd", "k": 16}, {"kind": "skip-transcoder", "k": 32}],
        "versions": {"torch": "2.13"},
        "new": {"deep": None},
        "layers": [1, 2, 3],
    }
    with pytest.raises(ValueError, match="another configuration") as caught:
        reopen_run(tmp_path, asked, ignore=["versions"])
    message = str(caught.value)
    for expected in (
        "k (32 → 64)",
        "flag (true → 1)",
        'students.1.kind ("mxd" → "skip-transcoder")',
        "... → absent)",
        'new (absent → {"deep": null})',
        "layers.2 (absent → 3)",
    ):
        assert expected in message
    assert "same" not in message
    assert "torch" not in message
    assert "students.0" not in message
    assert (tmp_path / "run.json").read_bytes() == before
    assert reopen_run(tmp_path, asked, ignore=list(asked.keys() | stored.keys())) == stored


def test_a_run_is_finished_when_marked(tmp_path: Path) -> None:
    create_run(tmp_path, {})
    assert not is_finished(tmp_path)
    mark_finished(tmp_path, 12)
    assert is_finished(tmp_path)
    assert json.loads((tmp_path / "finished.json").read_text())["step"] == 12


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, first_step=0) as log:
        for step in (0, 10, 20, 30):
            log.log({"step": step, "students": {"a": {"loss": math.nan, "fvu": 0.5, "rates": [math.inf, 1]}}})
        assert len(read_metrics(path)) == 4
    assert "NaN" not in path.read_text()
    with path.open("a") as file:
        file.write('{"step": 40, "stu')
    assert [record["step"] for record in read_metrics(path)] == [0, 10, 20, 30]
    with MetricsLog(path, first_step=20) as log:
        log.log({"step": 20})
    assert read_metrics(path) == [
        {"step": 0, "students": {"a": {"loss": None, "fvu": 0.5, "rates": [None, 1]}}},
        {"step": 10, "students": {"a": {"loss": None, "fvu": 0.5, "rates": [None, 1]}}},
        {"step": 20},
    ]
    MetricsLog(path, first_step=0).close()
    assert path.read_bytes() == b""


def test_a_damaged_line_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\xff\n[3]\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert "Line 2" in caplog.text
    assert "Line 3" in caplog.text


def test_a_record_needs_a_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", first_step=0) as log, pytest.raises(ValueError, match="'step'"):
        log.log({"loss": 1.0})


def test_flattened_records_hold_finite_numbers_only() -> None:
    record: dict[str, JSON] = {
        "step": 1,
        "tokens": 5,
        "note": "x",
        "done": True,
        "students": {"mxd-k16": {"fvu": 0.5, "loss": math.nan, "l0": None}},
    }
    assert flatten_record(record) == {"tokens": 5, "students/mxd-k16/fvu": 0.5}


@pytest.mark.parametrize("module", [None, ModuleType("a folder of that name")])
def test_a_missing_extra_is_one_sentence(
    tmp_path: Path, module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.raises(ValueError, match=r"pip install 'mxd\[wandb\]'"):
        WandbSink(project="p", folder=tmp_path, configuration={}, name="n", identity="i")
    with pytest.raises(ValueError, match=r"pip install 'mxd\[tensorboard\]'"):
        TensorBoardSink(tmp_path, first_step=0)


def test_sinks_pass_on_flattened_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Service:
        def log(self, record: dict[str, float], step: int) -> None:
            calls.append(("log", record, step))

        def finish(self) -> None:
            calls.append(("finish",))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append(("close",))

    def start(**settings: object) -> Service:
        calls.append(("init", settings["id"], settings["resume"]))
        return Service()

    def open_writer(folder: str, purge_step: int) -> Service:
        calls.append(("open", folder, purge_step))
        return Service()

    for name, attribute, function in (
        ("wandb", "init", start),
        ("torch.utils.tensorboard", "SummaryWriter", open_writer),
    ):
        module = ModuleType(name)
        setattr(module, attribute, function)
        monkeypatch.setitem(sys.modules, name, module)
    sinks: list[MetricsSink] = [
        WandbSink(project="p", folder=tmp_path, configuration={"k": 1}, name="n", identity="i"),
        TensorBoardSink(tmp_path, first_step=5),
    ]
    for sink in sinks:
        sink.log({"step": 6, "students": {"a": {"fvu": 0.5}}})
        sink.close()
    assert calls == [
        ("init", "i", "allow"),
        ("open", str(tmp_path), 5),
        ("log", {"students/a/fvu": 0.5}, 6),
        ("finish",),
        ("students/a/fvu", 0.5, 6),
        ("close",),
    ]


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_the_speed_is_smoothed_and_follows() -> None:
    rate = SmoothedRate(1_000_000, 0.0)
    assert rate.value == 0
    for second in range(1, 11):
        rate.add(1_000_000 + 100 * second, float(second))
    assert rate.value == pytest.approx(100)
    rate.add(1_001_000 + 1000, 11.0)
    assert 100 < rate.value < 250
    rate.add(1_002_000 + 1000 * 600, 611.0)
    assert rate.value == pytest.approx(1000, rel=1e-3)


def test_without_a_terminal_progress_is_a_line_now_and_then() -> None:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=False, width=40)
    with TrainingProgress(
        2_000_000, ["mxd-k16", "[b]"], "train", tokens_at_start=1_000_000, console=console, clock=clock
    ) as progress:
        for step in range(1, 26):
            clock.seconds += 1
            progress.update(1_000_000 + 1000 * step, {"mxd-k16": {"loss": 1.0, "fvu": 0.25}})
    lines = file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == ("train  1M/2M tokens  50.0%  1k tokens/s  ETA 0:16:39  mxd-k16 fvu 0.25, [b] fvu –")
    assert "1.02M/2M tokens" in lines[-1]
    assert "\x1b" not in file.getvalue()


def terminal(file: io.StringIO, width: int) -> Console:
    return Console(file=file, force_terminal=True, width=width, height=50, _environ={"TERM": "xterm-256color"})


def test_in_a_terminal_progress_is_a_bar_and_a_table_at_ten_frames_a_second() -> None:
    clock, file = Clock(), io.StringIO()
    with TrainingProgress(480_000_000, ["a", "b"], "train", console=terminal(file, 120), clock=clock) as progress:
        for step in range(1, 101):
            clock.seconds += 0.01
            progress.update(123_456 * step, {"a": {"loss": 0.5, "fvu": 0.125, "l0": 32, "dead_fraction": 0.031}})
        frames = file.getvalue().count("ETA")
    text = file.getvalue()
    assert 8 <= frames <= 12
    for expected in ("12.3M/480M tokens", "12.3M tokens/s", "ETA 0:00:38", "0.125", "3.1%", "dead", "━"):
        assert expected in text


@pytest.mark.parametrize("width", [1, 2, 7, 20, 40])
def test_a_narrow_terminal_never_raises(width: int) -> None:
    clock = Clock()
    students = [f"skip-transcoder-k{k}" for k in range(40)]
    with TrainingProgress(0, students, "train", console=terminal(io.StringIO(), width), clock=clock) as progress:
        for tokens in (0, 1, 1):
            clock.seconds += 1e12
            progress.update(tokens, {students[3]: {"fvu": math.nan, "loss": math.inf, "l0": None}})


def test_of_many_students_the_worst_are_shown() -> None:
    file = io.StringIO()
    students = [f"s{index:02}" for index in range(MOST_STUDENTS + 5)]
    with TrainingProgress(10, students, "train", console=terminal(file, 120)) as progress:
        progress.update(
            1, {student: {"fvu": index / 100} for index, student in enumerate(students)} | {"s00": {"fvu": math.nan}}
        )
    last = file.getvalue().rpartition("student")[2]
    assert "… and 5 more" in last
    assert [student for student in students if student in last] == ["s00", *students[-MOST_STUDENTS + 1 :]]


def test_progress_writes_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(10, ["a"], "train") as progress:
        progress.update(1, {"a": {"fvu": 0.5}})
        sys.stdout.write("a result\n")
    captured = capsys.readouterr()
    assert captured.out == "a result\n"
    assert "a fvu 0.5" in captured.err


def test_a_signal_is_a_request_and_the_second_interrupt_raises() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with interruptible() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


def fail_after_a_signal() -> None:
    with interruptible() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError(f"requested {stop.requested}")


def test_handlers_come_back_after_an_error_and_ignored_signals_stay_ignored() -> None:
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError, match="requested None"):
            fail_after_a_signal()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    found: list[object] = []

    def work() -> None:
        with interruptible() as stop:
            found.extend([stop.requested, signal.getsignal(signal.SIGINT)])

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, before]


def test_the_package_is_light() -> None:
    script = "import sys, mxd, mxd.runs.run, mxd.runs.signals, mxd.runs.metrics_log; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
