"""What a training run shows while it runs, on stderr: a bar and a table in a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TypeAlias

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mxd.quantities import compact

Metrics: TypeAlias = Mapping[str, Mapping[str, int | float | None]]
"""Student id -> metric -> value."""

REFRESH_SECONDS = 0.1
LINE_SECONDS = 10.0
SMOOTHING_SECONDS = 30.0
"""How far back the shown speed looks."""
LONGEST_SECONDS = 1e8
"""The largest ETA that is shown: about three years."""
MOST_STUDENTS = 12
BAR_FROM_WIDTH = 100
"""Columns of a terminal below which the numbers take the bar's place."""
COLUMNS = {"loss": "loss", "fvu": "fvu", "l0": "l0", "dead": "dead_fraction"}
"""Heading -> metric of the table of sparse layers."""


class SmoothedRate:
    """Tokens per second with exponentially fading memory.

    It is the ratio of two sums with the same weights, so that steps of unequal length count by their
    length and the first values are plain averages.
    """

    def __init__(self, tokens: int, seconds: float) -> None:
        self._last_tokens, self._last_seconds = tokens, seconds
        self._tokens, self._seconds = 0.0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Take the tokens done in all by now, and the clock's time."""
        elapsed = seconds - self._last_seconds
        fade = math.exp(-elapsed / SMOOTHING_SECONDS)
        self._tokens = fade * self._tokens + tokens - self._last_tokens
        self._seconds = fade * self._seconds + elapsed
        self._last_tokens, self._last_seconds = tokens, seconds

    @property
    def value(self) -> float:
        """Tokens per second; 0 before anything was done."""
        return max(self._tokens / self._seconds, 0.0) if self._seconds > 0 else 0.0


class TrainingProgress:
    """Shows how far training is and how good each student is; a context manager.

    In a terminal it redraws at most ten times a second, from `update` alone (no thread). Elsewhere it
    writes a line at the first update, about every ten seconds, and at the end.

    Args:
        total_tokens: Tokens at which training ends.
        student_ids: In the order in which they are shown; of more than twelve, the twelve with the largest fvu.
        description: A word or two before the numbers.
        tokens_at_start: Tokens done before a resume, which count for the bar and not for the speed.
        console: Where to write; stderr unless given.
        clock: Seconds that only grow; tests pass their own.
        unit: What is counted.
        columns: Heading -> metric of the table.
        headline: The metric that a plain line tells, and by which students are chosen where there are many.
    """

    def __init__(
        self,
        total_tokens: int,
        student_ids: Sequence[str],
        description: str,
        *,
        tokens_at_start: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "tokens",
        columns: Mapping[str, str] = COLUMNS,
        headline: str = "fvu",
    ) -> None:
        self._unit, self._columns, self._headline = unit, columns, headline
        self._total_tokens, self._student_ids, self._description = total_tokens, list(student_ids), description
        self._tokens = tokens_at_start
        self._console = console if console is not None else Console(stderr=True)
        self._clock = clock
        self._metrics: Metrics = {}
        self._rate = SmoothedRate(tokens_at_start, clock())
        self._shown_at = -math.inf
        self._shown_tokens = -1
        self._live: Live | None = None

    def __enter__(self) -> "TrainingProgress":
        self._rate = SmoothedRate(self._tokens, self._clock())
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # What others print to stdout is their result and must stay there.
            self._live = Live(
                get_renderable=self._frame, console=self._console, auto_refresh=False, redirect_stdout=False
            )
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._tokens != self._shown_tokens and self._metrics:
            self._write_line()

    def update(self, tokens_done: int, metrics: Metrics) -> None:
        """Take the tokens done in all and the newest metrics (loss, fvu, l0, dead_fraction) of the students.

        A student or metric that is missing keeps its last value.
        """
        now = self._clock()
        self._tokens = tokens_done
        self._rate.add(tokens_done, now)
        self._metrics = {
            student: {**self._metrics.get(student, {}), **metrics.get(student, {})} for student in self._student_ids
        }
        if self._live is not None and now - self._shown_at >= REFRESH_SECONDS:
            self._shown_at = now
            self._live.refresh()
        elif self._live is None and now - self._shown_at >= LINE_SECONDS:
            self._shown_at = now
            self._write_line()

    def _write_line(self) -> None:
        self._shown_tokens = self._tokens
        shown = self._shown_students()
        name = self._headline
        students = [f"{student} {name} {_number(self._value(student, name))}" for student in shown]
        more = self._more(shown)
        # What is read without a target has no error to tell.
        is_known = any(self._value(student, name) is not None for student in shown)
        parts = [self._description, *self._facts()]
        parts += [", ".join(students) + (f" {more}" if more else "")] if is_known else []
        self._console.print(Text("  ".join(parts)), soft_wrap=True)

    def _frame(self) -> Group:
        facts = Text("  ".join([self._description, *self._facts()]))
        head = Table.grid(padding=(0, 2))
        if self._console.width >= BAR_FROM_WIDTH:
            done = min(self._tokens, self._total_tokens)
            head.add_row(facts, ProgressBar(total=max(self._total_tokens, 1), completed=done, width=24))
        else:
            head.add_row(facts)
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        table.add_column("student", overflow="ellipsis", no_wrap=True)
        for name in self._columns:
            table.add_column(name, justify="right", no_wrap=True, min_width=6)
        shown = self._shown_students()
        for student in shown:
            table.add_row(
                Text(student),
                *(_cell(metric, self._value(student, metric)) for metric in self._columns.values()),
            )
        more = self._more(shown)
        return Group(head, table, Text(more)) if more else Group(head, table)

    def _facts(self) -> list[str]:
        rate = self._rate.value
        done = self._tokens / self._total_tokens if self._total_tokens > 0 else 1.0
        remaining = max(self._total_tokens - self._tokens, 0)
        eta = str(timedelta(seconds=round(min(remaining / rate, LONGEST_SECONDS)))) if rate > 0 else "–"
        return [
            f"{compact(self._tokens)}/{compact(self._total_tokens)} {self._unit}",
            f"{done:.1%}",
            f"{compact(round(rate))} {self._unit}/s",
            f"ETA {eta}",
        ]

    def _shown_students(self) -> list[str]:
        if len(self._student_ids) <= MOST_STUDENTS:
            return self._student_ids
        return sorted(self._student_ids, key=self._badness, reverse=True)[:MOST_STUDENTS]

    def _badness(self, student: str) -> float:
        value = self._value(student, self._headline)
        if value is None:
            return -math.inf
        return math.inf if math.isnan(value) else float(value)

    def _value(self, student: str, metric: str) -> int | float | None:
        return self._metrics.get(student, {}).get(metric)

    def _more(self, shown: Sequence[str]) -> str:
        hidden = len(self._student_ids) - len(shown)
        return f"… and {hidden} more" if hidden else ""


def _cell(metric: str, value: int | float | None) -> str:
    return _share(value) if metric == "dead_fraction" else _number(value)


def _number(value: int | float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _share(value: int | float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
