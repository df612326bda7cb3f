import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxd.atomic import JSON, canonical_json, write_bytes_atomically, write_json_atomically
from mxd.evaluation.students import load_students
from mxd.locks import alone, exclusive, in_turn
from mxd.runs.run import (
    create_run,
    is_finished,
    is_run,
    locked,
    mark_finished,
    read_configuration,
    reopen_run,
)


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


def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    lock, flock = tmp_path / "lock", fcntl.flock
    with exclusive(lock, "taken"):
        lock.unlink()
    assert names(tmp_path) == []

    def removed_meanwhile(file: object, operation: int) -> None:
        flock(file, operation)
        lock.unlink(missing_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", removed_meanwhile)
        with pytest.raises(ValueError, match=r"^taken$"), exclusive(lock, "taken"):
            pass
    with exclusive(lock, "taken"):
        pass


def test_a_lock_beside_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    with alone(tmp_path / "file", "taken"):
        with pytest.raises(ValueError, match=r"^taken$"), alone(tmp_path / "file", "taken"):
            pass
        with alone(tmp_path / "other", "taken"):
            pass
        assert names(tmp_path) == [".file.lock"]
    assert names(tmp_path) == []


def test_who_comes_second_waits_for_a_turn(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    script = "import sys, pathlib, mxd.locks as l\nwith l.in_turn(pathlib.Path(sys.argv[1])): print('in', flush=True)"
    with in_turn(tmp_path / ".lock"):
        second = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
    assert second.communicate(timeout=60)[0] == "in\n"


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


def test_the_package_is_light() -> None:
    script = "import sys, mxd, mxd.runs.run, mxd.runs.signals, mxd.runs.metrics_log; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
