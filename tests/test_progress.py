import io
import math
import sys

import pytest
from rich.console import Console

from mxd.runs.progress import MOST_STUDENTS, SmoothedRate, TrainingProgress


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
