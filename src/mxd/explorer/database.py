"""The explorer's database: one SQLite file for all that is known of a run's latents."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from mxd.atomic import JSON, partial_path, sync_file, sync_folder
from mxd.checkpoint import edits_digest
from mxd.explorer.labels import changing
from mxd.locks import alone
from mxd.runs.run import CONFIGURATION_FILE, FINISHED_FILE

DATABASE_FILE = "explorer.sqlite"
VERSION = 3
"""Of the tables and what their texts mean: raise it when they change."""

_APPLICATION = 0x6D786445
"""Marks a SQLite file as the explorer's: "mxdE"."""

# json.dumps would make an encoder for each of the many short lists.
_compact = json.JSONEncoder(separators=(",", ":")).encode

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE students (
  number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, facts TEXT NOT NULL, map TEXT NOT NULL
);
CREATE TABLE latents (
  student INTEGER NOT NULL, latent INTEGER NOT NULL,
  firings INTEGER NOT NULL, rate REAL NOT NULL, mean REAL NOT NULL, maximum REAL NOT NULL, p99 REAL NOT NULL,
  specialisation REAL, distinctness REAL,
  quantiles TEXT NOT NULL, histogram TEXT NOT NULL, positions TEXT NOT NULL, examples TEXT NOT NULL,
  fires_on TEXT NOT NULL, promoted TEXT NOT NULL, suppressed TEXT NOT NULL,
  nearest TEXT NOT NULL, company TEXT NOT NULL,
  PRIMARY KEY (student, latent)
);
CREATE TABLE contexts (
  number INTEGER PRIMARY KEY, tokens TEXT NOT NULL, text TEXT NOT NULL, pieces TEXT NOT NULL
);
CREATE TABLE tokens (id INTEGER PRIMARY KEY, text TEXT NOT NULL, occurrences INTEGER NOT NULL);
CREATE TABLE peaks (
  student INTEGER NOT NULL, context INTEGER NOT NULL, latent INTEGER NOT NULL, position INTEGER NOT NULL,
  value REAL NOT NULL, PRIMARY KEY (student, context, latent)
) WITHOUT ROWID;
CREATE TABLE token_latents (
  student INTEGER NOT NULL, token INTEGER NOT NULL, relation TEXT NOT NULL, latent INTEGER NOT NULL,
  strength REAL NOT NULL, PRIMARY KEY (student, token, relation, latent)
) WITHOUT ROWID;
CREATE TABLE labels (
  student TEXT NOT NULL, latent INTEGER NOT NULL, label TEXT NOT NULL, note TEXT NOT NULL, changed TEXT NOT NULL,
  PRIMARY KEY (student, latent)
) WITHOUT ROWID;
"""


class RunIdentity(NamedTuple):
    """Which run a database is of."""

    name: str
    """Name of the run's folder, for people."""
    digest: str
    """Of its `run.json` and `finished.json`."""
    edits: str | None
    """Of the edits in force in its layers; None where there are none."""


class LatentRow(NamedTuple):
    """A row of the table of latents; lists and objects are stored as JSON."""

    student: int
    latent: int
    firings: int
    rate: float
    mean: float
    maximum: float
    p99: float
    specialisation: float | None
    distinctness: float | None
    quantiles: JSON
    histogram: JSON
    positions: JSON
    examples: JSON
    fires_on: JSON
    promoted: JSON
    suppressed: JSON
    nearest: JSON
    company: JSON


class ContextRow(NamedTuple):
    """A row of the table of contexts."""

    number: int
    tokens: str
    """Its tokens, separated by spaces."""
    text: str
    """What they join to."""
    pieces: str
    """A JSON object: what tokens are here that are something else alone, by their positions."""

    @classmethod
    def of(cls, number: int, ids: Sequence[int], pieces: Sequence[str], alone: Sequence[str]) -> "ContextRow":
        """Return the row of a context.

        Args:
            number: Its number.
            ids: Its tokens.
            pieces: What each of them adds to the text.
            alone: What each token of the vocabulary is alone.
        """
        pairs = zip(pieces, map(alone.__getitem__, ids), strict=True)
        own = {place: piece for place, (piece, other) in enumerate(pairs) if piece != other}
        return cls(number, " ".join(map(str, ids)), "".join(pieces), json.dumps(own))


class Peak(NamedTuple):
    """One of the strongest activations of a latent, to be found by its context."""

    student: int
    context: int
    latent: int
    position: int
    value: float


class TokenLatent(NamedTuple):
    """That a latent fires on a token, or promotes it."""

    student: int
    token: int
    relation: str
    latent: int
    strength: float


def identify_run(run: Path) -> RunIdentity:
    """Return the identity of a finished run.

    Raises:
        ValueError: If an edits.json is damaged.
    """
    digest = hashlib.sha256()
    for name in (CONFIGURATION_FILE, FINISHED_FILE):
        digest.update((run / name).read_bytes())
    return RunIdentity(run.resolve().name, digest.hexdigest(), edits_digest(run))


@contextmanager
def new_database(path: Path, run: RunIdentity) -> Generator[sqlite3.Connection, None, None]:
    """Make a database beside its final place, and put it there when the block ends without an error.

    Labels of a database of the same run that stood there are kept.

    Raises:
        ValueError: If a file that is no database of this run stands there, or another process is making one there.
        OSError: If it cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} must be a folder to hold the database; it is none; make it first.")
    partial = partial_path(path)
    with alone(path, f"Another process is collecting {path}; wait for it, stop it or name another --database."):
        labels = _labels_to_keep(path, run) if path.exists() else []
        partial.unlink(missing_ok=True)
        try:
            with closing(_unsafe(partial)) as connection:
                connection.executescript(_TABLES)
                connection.execute(f"PRAGMA application_id={_APPLICATION}")
                connection.execute(f"PRAGMA user_version={VERSION}")
                facts = [("run", run.name), ("digest", run.digest), ("edits", run.edits or "")]
                connection.executemany("INSERT INTO facts VALUES (?, ?)", facts)
                yield connection
                connection.commit()
            sync_file(partial)
            _take_place(partial, path, run, labels)
        except sqlite3.OperationalError as error:
            raise OSError(f"{path} must be writable, with room on its disk; it is not ({error}).") from error
        finally:
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def _unsafe(partial: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(partial)
    # A half-written file is thrown away as a whole.
    connection.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
    return connection


def _take_place(partial: Path, path: Path, run: RunIdentity, labels: "list[tuple[Any, ...]]") -> None:
    """Put a new database in the place of the old one, with the labels that people have written until now."""
    with ExitStack() as stack:
        if path.exists():
            # Windows replaces no file that is open: a label written in this very moment is lost there.
            if os.name != "nt" and os.access(path, os.W_OK):
                stack.enter_context(changing(path))
            labels = _labels_to_keep(path, run)
        with closing(_unsafe(partial)) as connection, connection:
            connection.executemany("INSERT INTO labels VALUES (?, ?, ?, ?, ?)", labels)
        sync_file(partial)
        os.replace(partial, path)


def require_database(path: Path, run: RunIdentity) -> None:
    """Check that a file is a database of this version and this run.

    Raises:
        ValueError: If it is not.
    """
    version, found = _inspect(path)
    if version != VERSION:
        raise ValueError(
            f"{path} must be of version {VERSION} of the explorer's database; it is of version {version}; collect it "
            "anew with --recollect, which keeps its labels, or name another --database."
        )
    _require_run(path, run, found)
    if found.edits != run.edits:
        raise ValueError(
            f"{path} must be collected from the run's layers as they are; their edits have changed since (then "
            f"{_named(found.edits)}, now {_named(run.edits)}). Collect it anew with --recollect, which keeps its "
            "labels."
        )


def write_facts(connection: sqlite3.Connection, facts: Mapping[str, JSON]) -> None:
    """Store facts about the run and the collection, as JSON by their names."""
    rows = [(name, json.dumps(value)) for name, value in facts.items()]
    connection.executemany("INSERT INTO facts VALUES (?, ?)", rows)


def write_student(connection: sqlite3.Connection, number: int, name: str, facts: JSON, map_data: JSON) -> None:
    """Store what is known of a student as a whole."""
    row = (number, name, json.dumps(facts), json.dumps(map_data, separators=(",", ":")))
    connection.execute("INSERT INTO students VALUES (?, ?, ?, ?)", row)


def write_contexts(connection: sqlite3.Connection, rows: Iterable[ContextRow]) -> None:
    """Store the text."""
    connection.executemany("INSERT INTO contexts VALUES (?, ?, ?, ?)", rows)


def write_latents(
    connection: sqlite3.Connection,
    rows: Iterable[LatentRow],
    peaks: Iterable[Peak],
    tokens: Iterable[TokenLatent],
) -> None:
    """Store some latents, and what they are found by."""
    marks = ", ".join("?" * len(LatentRow._fields))
    connection.executemany(f"INSERT INTO latents VALUES ({marks})", map(_encoded, rows))
    connection.executemany("INSERT INTO peaks VALUES (?, ?, ?, ?, ?)", peaks)
    connection.executemany("INSERT OR IGNORE INTO token_latents VALUES (?, ?, ?, ?, ?)", tokens)


def read_facts(connection: sqlite3.Connection) -> dict[str, Any]:
    """Return what `write_facts` stored."""
    rows: list[tuple[str, str]] = connection.execute(
        "SELECT name, value FROM facts WHERE name NOT IN ('run', 'digest', 'edits')"
    ).fetchall()
    return {name: json.loads(value) for name, value in rows}


@contextmanager
def reading(path: Path) -> Generator[sqlite3.Connection, None, None]:
    """Open a database for reading."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        yield connection


def _encoded(row: LatentRow) -> Sequence[object]:
    return [
        value if value is None or isinstance(value, int | float | str) else _compact(value) if value else "[]"
        for value in row
    ]


def _inspect(path: Path) -> tuple[int, RunIdentity]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a database of mxd explore; there is no such file; collect it first.")
    try:
        _recover(path)
        with reading(path) as connection:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if application != _APPLICATION:
                raise sqlite3.DatabaseError("it is another program's")
            names = "('run', 'digest', 'edits')"
            found = dict(connection.execute(f"SELECT name, value FROM facts WHERE name IN {names}").fetchall())
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path} must be a database of mxd explore; it is not ({error}); remove it or name another --database."
        ) from error
    return version, RunIdentity(str(found.get("run")), str(found.get("digest")), found.get("edits") or None)


def _recover(path: Path) -> None:
    """Undo what a process that was killed had begun to write, which nobody can who only reads."""
    if path.with_name(f"{path.name}-journal").exists() and os.access(path, os.W_OK):
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()


def _require_run(path: Path, run: RunIdentity, found: RunIdentity) -> None:
    if found.digest != run.digest:
        raise ValueError(
            f"{path} must be a database of the run {run.name}; it is one of another run, {found.name} "
            f"(digest {found.digest[:12]}, expected {run.digest[:12]}); move it away or name another --database."
        )


def _named(edits: str | None) -> str:
    return "none" if edits is None else f"digest {edits[:12]}"


def _labels_to_keep(path: Path, run: RunIdentity) -> list[tuple[Any, ...]]:
    _, found = _inspect(path)
    _require_run(path, run, found)
    with reading(path) as connection:
        # Labels have had these columns in every version.
        return cast("list[tuple[Any, ...]]", connection.execute("SELECT * FROM labels").fetchall())
