"""What people wrote is never lost."""

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from mxd.explorer import database
from mxd.explorer.database import identify_run, new_database, reading, require_database
from mxd.explorer.labels import Label, read_labels, write_label
from tests.exploring import STUDENTS, explored, served
from tests.tiny_run import copied, tree

STUDENT = STUDENTS[0]
KILLED = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.executescript("PRAGMA cache_size=1; BEGIN IMMEDIATE; UPDATE latents SET company = 'x' || company;")
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return copied(explored(tmp_path_factory.getbasetemp()), tmp_path / "run")


def labels_of(run: Path) -> list[tuple[int, str]]:
    with reading(run / "explorer.sqlite") as connection:
        return [(label.latent, label.label) for label in read_labels(connection, STUDENT)]


def label(latent: int, text: str = "a river") -> Label:
    return Label(STUDENT, latent, text, "", "2026-11-21")


def started(write: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_a_label_written_while_a_new_collection_takes_the_place_is_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "explorer.sqlite"
    write_label(path, label(1))
    threads: list[threading.Thread] = []
    replace = os.replace

    def slowly(source: Path, target: Path) -> None:
        # The labels have been read, and the place is not taken yet.
        threads.append(started(lambda: write_label(path, label(2))))
        threads[0].join(timeout=0.3)
        assert threads[0].is_alive()
        replace(source, target)

    monkeypatch.setattr(database.os, "replace", slowly)
    with new_database(path, identify_run(run)):
        pass
    threads[0].join(timeout=10)
    assert labels_of(run) == [(1, "a river"), (2, "a river")]
    assert not list(run.glob("*-journal"))
    assert not list(run.glob(".explorer*"))


def test_labels_of_many_at_once_are_all_kept(run: Path) -> None:
    path = run / "explorer.sqlite"
    with new_database(path, identify_run(run)):
        threads = [started(lambda latent=latent: write_label(path, label(latent))) for latent in range(12)]
    for thread in threads:
        thread.join(timeout=20)
    assert labels_of(run) == [(latent, "a river") for latent in range(12)]


def test_labels_outlive_a_database_that_is_removed_while_another_is_collected(run: Path) -> None:
    path = run / "explorer.sqlite"
    write_label(path, label(3))
    with new_database(path, identify_run(run)):
        path.unlink()
    assert labels_of(run) == [(3, "a river")]


def test_what_a_killed_process_had_begun_to_write_is_undone(run: Path) -> None:
    path = run / "explorer.sqlite"
    write_label(path, label(4))
    before = tree(run)
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert (run / "explorer.sqlite-journal").is_file()
    require_database(path, identify_run(run))
    assert tree(run) == before
    assert labels_of(run) == [(4, "a river")]


def test_a_label_makes_no_database(run: Path) -> None:
    path = run / "explorer.sqlite"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        write_label(path, label(5))
    assert not path.exists()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (note)")
    with pytest.raises(ValueError, match="must be writable to keep labels"):
        write_label(path, label(5))


def test_a_label_that_somebody_else_changed_meanwhile_is_not_written_over(run: Path) -> None:
    sent: dict[str, object] = {"student": STUDENT, "latent": 6, "label": "mine", "note": ""}
    nothing = {"label": "", "note": ""}
    with served(run) as server:
        answer = server.ask("PUT", "/api/label", {**sent, "label": " theirs ", "before": nothing})
        assert (answer.status, answer.json["label"]) == (200, "theirs")
        refused = server.ask("PUT", "/api/label", {**sent, "before": nothing})
        assert refused.status == 400
        assert "changed elsewhere, to 'theirs'" in refused.json["error"]
        assert labels_of(run) == [(6, "theirs")]
        assert server.ask("PUT", "/api/label", {**sent, "before": {"label": "theirs", "note": ""}}).status == 200
    assert labels_of(run) == [(6, "mine")]
