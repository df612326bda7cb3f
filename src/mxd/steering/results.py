"""What steering came to: the rows as they are made, their summary, and the files of a finished experiment."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, cast

from mxd.atomic import JSON, canonical_json, write_json_atomically, write_text_atomically
from mxd.steering.ellipse import Panel, draw_ellipses
from mxd.steering.experiment import SteeredRow, Unsteered
from mxd.steering.judged import Judged

ROWS_FILE, REPORT_FILE, TABLE_FILE, PICTURE_FILE = "rows.jsonl", "steering.json", "steering.md", "steering.png"


class Spread(NamedTuple):
    """A score's mean over latents."""

    mean: float
    """The mean."""
    deviation: float | None
    """The standard deviation; None for a single latent."""

    def __str__(self) -> str:
        """Return mean and deviation for a table."""
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"


class Summary(NamedTuple):
    """What steering its latents one by one came to, for one student."""

    student: str
    """The student."""
    latents: int
    """Latents that were steered."""
    skipped: int
    """Latents that could not be steered in their own units."""
    scores: Mapping[str, Spread]
    """coherence, loss, kl and distinct, and of each judge `<score>, <judge>`."""
    unsteered: Unsteered
    """What was compared with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringResult:
    """Everything that an experiment found."""

    settings: Mapping[str, JSON]
    """What must be known to repeat it."""
    rows: Sequence[SteeredRow]
    """One a student and latent."""
    unsteered: Mapping[str, Unsteered]
    """What each student writes when nothing is steered."""
    skipped: Mapping[str, Sequence[int]]
    """Latents of each student that have no unit: they fire nowhere in the held-out text."""
    judged: Sequence[Judged] = ()
    """What judges say."""

    @property
    def summaries(self) -> list[Summary]:
        """One a student, in their order."""
        return [
            Summary(
                student=student,
                latents=len(self._of(student)),
                skipped=len(self.skipped.get(student, ())),
                scores=self._scores(student),
                unsteered=unsteered,
            )
            for student, unsteered in self.unsteered.items()
        ]

    @property
    def failures(self) -> list[Judged]:
        """What judges did not answer."""
        return [one for one in self.judged if one.failure is not None]

    def to_json(self) -> dict[str, JSON]:
        """Return the result as JSON takes it."""
        return {
            "settings": dict(self.settings),
            "students": [
                {
                    "student": line.student,
                    "latents": line.latents,
                    "skipped": list(self.skipped.get(line.student, ())),
                    "unsteered": line.unsteered._asdict(),
                    "scores": {name: spread._asdict() for name, spread in line.scores.items()},
                }
                for line in self.summaries
            ],
            "rows": [row.to_json() for row in self.rows],
            "judged": [asdict(one) for one in self.judged],
        }

    def _of(self, student: str) -> list[SteeredRow]:
        return [row for row in self.rows if row.student == student]

    def _scores(self, student: str) -> dict[str, Spread]:
        rows = self._of(student)
        scores = {name: [float(getattr(row, name)) for row in rows] for name in ("coherence", "loss", "kl", "distinct")}
        for one in self.judged:
            if one.student == student and one.coherence is not None and one.fluency is not None:
                scores.setdefault(f"coherence, {one.judge}", []).append(one.coherence)
                scores.setdefault(f"fluency, {one.judge}", []).append(one.fluency)
        return {name: _spread(values) for name, values in scores.items() if values}


def _spread(values: Sequence[float]) -> Spread:
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


class RowLog:
    """The rows of an experiment, kept as they are made, so that one that was interrupted goes on.

    Args:
        path: The file; one JSON object a line, with the digest of everything that the row depends on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _read_rows(path)

    def find(self, key: str) -> SteeredRow | None:
        """Return the row that was made under this digest."""
        return self._known.get(key)

    def add(self, key: str, row: SteeredRow) -> None:
        """Keep a row; it reaches the disk before this returns."""
        self._known[key] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **row.to_json()}, ensure_ascii=False, allow_nan=False)
        with self._path.open("a+b") as file:
            # A line that an interruption cut off must not swallow this one.
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(("\n" * torn + line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def row_key(**parts: JSON) -> str:
    """Return a digest of everything that a row depends on."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def _read_rows(path: Path) -> dict[str, SteeredRow]:
    rows: dict[str, SteeredRow] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            content = cast("dict[str, Any]", json.loads(line))
            key = str(content.pop("key"))
            rows[key] = SteeredRow.from_json(content)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rows


def write_result(folder: Path, result: SteeringResult) -> list[str]:
    """Write the table, the picture and last `steering.json` into a folder; return the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [TABLE_FILE, REPORT_FILE]
    panels = _panels(result)
    if panels:
        subtitle = f"{_told(result.settings)} · points are latents, ellipses one standard deviation"
        draw_ellipses(panels, folder / PICTURE_FILE, title="What steering a latent does", subtitle=subtitle)
        written.insert(0, PICTURE_FILE)
    write_text_atomically(folder / TABLE_FILE, f"{_told(result.settings)}\n\n{_markdown(table_cells(result))}\n")
    write_json_atomically(folder / REPORT_FILE, result.to_json())
    return written


def table_cells(result: SteeringResult) -> list[list[str]]:
    """Return the summary as cells, the headings first."""
    names = list(dict.fromkeys(name for line in result.summaries for name in line.scores))
    cells = [["student", "latents", *(_HEADINGS.get(name, name) for name in names), "loss, not steered"]]
    for line in result.summaries:
        scores = [str(line.scores[name]) if name in line.scores else "–" for name in names]
        skipped = f" ({line.skipped} without a unit)" if line.skipped else ""
        cells.append([line.student, f"{line.latents}{skipped}", *scores, f"{line.unsteered.loss:.3f}"])
    return cells


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    heads, *lines = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([heads, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *lines])


_HEADINGS = {"loss": "loss, nats a token", "kl": "KL, nats a token", "distinct": "distinct tokens"}


def _told(settings: Mapping[str, JSON]) -> str:
    intervention = cast("Mapping[str, Any]", settings["intervention"])
    done = intervention["operation"]
    if done != "ablate":
        unit = " × the latent's 99th percentile" if intervention["unit"] == "p99" and done != "scale" else ""
        done = f"{done} {intervention['strength']:g}{unit}"
    return f"{settings['model']} · {done}"


def _panels(result: SteeringResult) -> list[Panel]:
    judges = list(dict.fromkeys(one.judge for one in result.judged if one.failure is None))
    scored = [
        Panel(
            title=f"Judged by {', '.join(judges)}",
            horizontal="Concept coherence",
            vertical="Fluency",
            points=_by_student(
                (one.student, (one.coherence, one.fluency))
                for one in result.judged
                if one.coherence is not None and one.fluency is not None
            ),
        )
    ] * bool(judges)
    own = Panel(
        title="Without a judge",
        horizontal="Coherence: similarity within − to texts not steered",
        vertical="Log-likelihood, nats a token",
        points=_by_student((row.student, (row.coherence, -row.loss)) for row in result.rows),
        unsteered=(0.0, -fmean(found.loss for found in result.unsteered.values())),
    )
    moved = Panel(
        title="How far the distribution moved",
        horizontal="KL(replaced ‖ steered), nats a token",
        vertical="Coherence",
        points=_by_student((row.student, (row.kl, row.coherence)) for row in result.rows),
    )
    return [*scored, own, moved] if any(math.isfinite(row.loss) for row in result.rows) else []


def _by_student(pairs: Any) -> dict[str, list[tuple[float, float]]]:
    points: dict[str, list[tuple[float, float]]] = {}
    for student, point in pairs:
        points.setdefault(student, []).append(point)
    return points
