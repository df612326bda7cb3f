"""What people write about latents, kept in the explorer's database."""

import os
import sqlite3
import threading
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Of two writers one may still have the file open that a new collection has replaced.
_one_at_a_time = threading.Lock()


class Label(NamedTuple):
    """What a person wrote about a latent."""

    student: str
    latent: int
    label: str
    note: str
    changed: str


@contextmanager
def changing(path: Path) -> Generator[sqlite3.Connection, None, None]:
    """Open a database to change it, and let nobody else do so until this ends.

    What is changed is the file that stands there when this begins, and none takes its place meanwhile.
    """
    while True:
        before = path.stat()
        uri = f"{path.resolve().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=10, isolation_level=None)) as connection:
            if _begin(connection, path, before):
                yield connection
                connection.execute("COMMIT")
                return


def _begin(connection: sqlite3.Connection, path: Path, before: os.stat_result) -> bool:
    """Return whether the file that was opened could be locked and is still the one that stands there.

    While this waits, a new collection may take the file's place. What SQLite then finds beside it is of the new one,
    and may be more than it can make sense of.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        if os.path.samestat(before, path.stat()):
            raise
        return False
    return os.path.samestat(before, path.stat())


def write_label(path: Path, label: Label, before: tuple[str, str] | None = None) -> None:
    """Store what a person wrote about a latent; empty texts take it away.

    Args:
        path: The database.
        label: What is stored.
        before: The label and the note that this person has seen; any where None.

    Raises:
        ValueError: If another label or note is there than was seen, or the database cannot be written.
    """
    latent = (label.student, label.latent)
    try:
        with _one_at_a_time, changing(path) as connection:
            query = "SELECT label, note FROM labels WHERE student = ? AND latent = ?"
            held = connection.execute(query, latent).fetchone() or ("", "")
            if before is not None and held != before:
                raise ValueError(
                    f"The label must be the one that this page has read; it has been changed elsewhere, to {held[0]!r} "
                    f"with the note {held[1]!r}. Copy what you typed and reload the page."
                )
            connection.execute("DELETE FROM labels WHERE student = ? AND latent = ?", latent)
            if label.label or label.note:
                connection.execute("INSERT INTO labels VALUES (?, ?, ?, ?, ?)", label)
    except sqlite3.OperationalError as error:
        raise ValueError(f"{path} must be writable to keep labels; it is not ({error}).") from error


def read_labels(connection: sqlite3.Connection, student: str) -> list[Label]:
    """Return all labels of a student's latents."""
    rows: list[tuple[Any, ...]] = connection.execute(
        "SELECT * FROM labels WHERE student = ? ORDER BY latent", (student,)
    ).fetchall()
    return [Label(*row) for row in rows]
