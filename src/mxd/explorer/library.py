"""What the pages show, read from the database: the same for the server and for static files."""

import itertools
import json
import re
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mxd.atomic import JSON
from mxd.evaluation.drawing import kind_style
from mxd.explorer.concepts import read_concepts
from mxd.explorer.database import (
    RunIdentity,
    read_facts,
    reading,
    require_database,
)
from mxd.explorer.labels import read_labels

FOUND_AT_MOST = 60
"""Latents that a search returns."""

_CONTEXTS_SEARCHED = 200
_FAR = 4
"""Tokens between a text and an activation above which they have nothing to do with each other."""

_COLUMNS = (
    *("firings", "rate", "mean", "maximum", "p99", "specialisation", "distinctness", "quantiles", "histogram"),
    *("positions", "examples", "fires_on", "promoted", "suppressed", "nearest", "company"),
)
_LISTS = _COLUMNS[7:]
_TOKEN_LISTS = ("fires_on", "promoted", "suppressed")


class NotFoundError(ValueError):
    """Something was asked for that the run does not have."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Library:
    """A database and the run that it is of."""

    database: Path
    """The database."""
    run: Path
    """The run's folder."""
    identity: RunIdentity
    """The run's identity."""

    def __post_init__(self) -> None:
        require_database(self.database, self.identity)

    def overview(self) -> dict[str, JSON]:
        """Return the facts of the run and its students."""
        with reading(self.database) as connection:
            rows = connection.execute("SELECT name, facts FROM students ORDER BY number").fetchall()
            facts = read_facts(connection)
        students: list[dict[str, Any]] = [{"name": name, **json.loads(text)} for name, text in rows]
        kinds = dict.fromkeys(str(student["kind"]) for student in students)
        return {
            **facts,
            "run": self.identity.name,
            "students": students,
            "kinds": {kind: kind_style(kind).name for kind in kinds},
        }

    def students(self) -> list[str]:
        """Return the names of the students, `<layer>/<id>`."""
        with reading(self.database) as connection:
            return [str(row[0]) for row in connection.execute("SELECT name FROM students ORDER BY number").fetchall()]

    def map(self, student: str) -> str:
        """Return the map of a student's latents, as JSON text.

        Raises:
            NotFoundError: If there is no such student.
        """
        with reading(self.database) as connection:
            number = _student(connection, student)
            return str(connection.execute("SELECT map FROM students WHERE number = ?", (number,)).fetchone()[0])

    def labels(self, student: str) -> dict[str, JSON]:
        """Return what people wrote about a student's latents, and the concept that probing found for each.

        Raises:
            NotFoundError: If there is no such student.
        """
        with reading(self.database) as connection:
            _student(connection, student)
            written = read_labels(connection, student)
        concepts = read_concepts(self.run).get(student, {})
        names = sorted({concept.concept for concept in concepts.values()})
        number = {name: place for place, name in enumerate(names)}
        return {
            "labels": {str(entry.latent): {"label": entry.label, "note": entry.note} for entry in written},
            "concepts": {
                "names": names,
                "latents": [[n, number[concept.concept], round(concept.score, 3)] for n, concept in concepts.items()],
            },
        }

    def latent(self, student: str, latent: int) -> dict[str, JSON]:
        """Return all that is known of a latent.

        Raises:
            NotFoundError: If there is no such student or latent.
        """
        with reading(self.database) as connection:
            number = _student(connection, student)
            row = connection.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM latents WHERE student = ? AND latent = ?", (number, latent)
            ).fetchone()
            if row is None:
                raise NotFoundError(f"{student} has no latent {latent}.")
            found: dict[str, Any] = dict(zip(_COLUMNS, row, strict=True))
            found |= {name: json.loads(found[name]) for name in _LISTS}
            contexts = _contexts(connection, [example["context"] for example in found["examples"]])
            texts = _texts(connection, [entry[0] for name in _TOKEN_LISTS for entry in found[name]])
        found["examples"] = [_example(contexts[example["context"]], example) for example in found["examples"]]
        for name in _TOKEN_LISTS:
            found[name] = [[texts[entry[0]], *entry[1:]] for entry in found[name]]
        return {"student": student, "latent": latent, **found}

    def search(self, student: str, query: str) -> list[JSON]:
        """Return latents that a text leads to, each with the reason: label, concept, token or context.

        Args:
            student: Whose latents.
            query: A number of a latent, or a text; upper and lower case of ASCII letters are not told apart.

        Raises:
            NotFoundError: If there is no such student.
        """
        if not query.strip():
            return []
        with reading(self.database) as connection:
            number = _student(connection, student)
            found = [
                *self._by_number(connection, number, query.strip()),
                *self._by_label(connection, student, query.strip().lower()),
                *_by_token(connection, number, query),
            ]
            if len({latent for latent, _, _ in found}) < FOUND_AT_MOST:
                found += _by_text(connection, number, query)
        best: dict[int, JSON] = {}
        for latent, why, what in found:
            best.setdefault(latent, {"latent": latent, "why": why, "what": what})
        return list(best.values())[:FOUND_AT_MOST]

    def _by_number(self, connection: sqlite3.Connection, student: int, query: str) -> "list[tuple[int, str, str]]":
        if not query.isascii() or not query.isdigit() or len(query) > 12:
            return []
        rows = connection.execute("SELECT latent FROM latents WHERE student = ? AND latent = ?", (student, int(query)))
        return [(row[0], "number", query) for row in rows.fetchall()]

    def _by_label(self, connection: sqlite3.Connection, student: str, query: str) -> "list[tuple[int, str, str]]":
        written = [
            (entry.latent, "label" if query in entry.label.lower() else "note", entry.label or entry.note)
            for entry in read_labels(connection, student)
            if query in entry.label.lower() or query in entry.note.lower()
        ]
        concepts = read_concepts(self.run).get(student, {}).items()
        ranked = sorted(concepts, key=lambda pair: -pair[1].score)
        return written + [
            (latent, "concept", concept.concept) for latent, concept in ranked if query in concept.concept.lower()
        ]


def _texts(connection: sqlite3.Connection, tokens: Iterable[int]) -> dict[int, str]:
    """Return the texts of tokens."""
    rows = connection.execute(
        "SELECT id, text FROM tokens WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(sorted(set(tokens))),)
    )
    return dict(cast("list[tuple[int, str]]", rows.fetchall()))


def _contexts(connection: sqlite3.Connection, numbers: Sequence[int]) -> dict[int, list[str]]:
    """Return contexts as the pieces that their tokens are there."""
    rows = connection.execute(
        "SELECT number, tokens, pieces FROM contexts WHERE number IN (SELECT value FROM json_each(?))",
        (json.dumps(numbers),),
    ).fetchall()
    ids = {number: [int(token) for token in str(tokens).split()] for number, tokens, _ in rows}
    texts = _texts(connection, itertools.chain.from_iterable(ids.values()))
    contexts = {number: [texts[token] for token in tokens] for number, tokens in ids.items()}
    for number, _, pieces in rows:
        for place, piece in cast("dict[str, str]", json.loads(pieces)).items():
            contexts[number][int(place)] = piece
    return contexts


def _student(connection: sqlite3.Connection, name: str) -> int:
    row = connection.execute("SELECT number FROM students WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise NotFoundError(f"The database has no student {name}.")
    return int(row[0])


def _example(context: Sequence[str], example: dict[str, Any]) -> dict[str, JSON]:
    first, last = example["first"], whole_end(context, example["first"] + example["length"])
    return {
        **{name: example[name] for name in ("group", "context", "value", "peak", "cells")},
        "tokens": list(context[first:last]),
        "before": first > 0,
        "after": last < len(context),
    }


def whole_end(context: Sequence[str], end: int) -> int:
    """Return where a part of a context ends that cuts no character in two."""
    while end < len(context) and not context[end - 1]:
        end += 1
    return end


def _pattern(query: str) -> str:
    escaped = query.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


def _by_token(connection: sqlite3.Connection, student: int, query: str) -> "list[tuple[int, str, str]]":
    rows = connection.execute(
        """
        SELECT latent, relation, text FROM token_latents JOIN (
          SELECT id, text FROM tokens WHERE text LIKE ? ESCAPE '\\' ORDER BY length(text), occurrences DESC LIMIT 40
        ) ON id = token
        WHERE student = ? ORDER BY length(text), relation, strength DESC LIMIT ?
        """,
        (_pattern(query), student, 4 * FOUND_AT_MOST),
    ).fetchall()
    return [(latent, relation, text) for latent, relation, text in cast("list[tuple[int, str, str]]", rows)]


def _by_text(connection: sqlite3.Connection, student: int, query: str) -> "list[tuple[int, str, str]]":
    """Return latents with one of their strongest activations at or near the text, the nearest first."""
    rows = connection.execute(
        "SELECT number, text FROM contexts WHERE text LIKE ? ESCAPE '\\' LIMIT ?",
        (_pattern(query), _CONTEXTS_SEARCHED),
    ).fetchall()
    contexts = _contexts(connection, [context for context, _ in rows])
    found: list[tuple[int, float, int, str]] = []
    for context, text in rows:
        pieces = contexts[context]
        # What SQLite's LIKE takes as equal: letters of ASCII in either case.
        match = re.search(re.escape(query), str(text), re.IGNORECASE | re.ASCII)
        first, last = _span(pieces, *((match.start(), match.end()) if match else (0, 1)))
        peaks = connection.execute(
            "SELECT latent, position, value FROM peaks WHERE student = ? AND context = ?", (student, context)
        ).fetchall()
        for latent, position, value in peaks:
            away = max(first - position, position - last, 0)
            if away > _FAR:
                continue
            found.append(
                (away, -value, latent, "".join(pieces[max(position - 5, 0) : whole_end(pieces, position + 1)]))
            )
    return [(latent, "context", text) for _, _, latent, text in sorted(found)]


def _span(pieces: list[str], begin: int, stop: int) -> tuple[int, int]:
    """Return the first and the last of the pieces that hold this part of their joined text."""
    ends: list[int] = []
    for piece in pieces:
        ends.append((ends[-1] if ends else 0) + len(piece))
    inside = [n for n, end in enumerate(ends) if end > begin and end - len(pieces[n]) < stop]
    return (inside[0], inside[-1]) if inside else (0, len(pieces) - 1)
