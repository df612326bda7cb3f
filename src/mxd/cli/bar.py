"""Bars on stderr for work that is counted in pieces."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@contextmanager
def counted(description: str, unit: str) -> Generator[Callable[[int, int, str], None], None, None]:
    """Give a function that shows how many pieces are done, of how many, and a word beside.

    Args:
        description: What is done.
        unit: What the pieces are.
    """
    # What others print to stdout is their result and must stay there.
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TextColumn(unit))
    shown = Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[word]}", markup=False),
        console=Console(stderr=True),
        redirect_stdout=False,
    )
    task = shown.add_task(description, total=None, word="")

    def advance(done: int, total: int, word: str) -> None:
        shown.start()
        shown.update(task, completed=done, total=total, word=word)

    try:
        yield advance
    finally:
        # What is refused before anything was done needs no bar above its sentence.
        if shown.live.is_started:
            shown.stop()


class PartsBar:
    """Shows how far work of several parts is, on stderr: a bar in a terminal, a line for each part elsewhere."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._console = console
        self._progress = Progress(*columns, console=console, transient=True, redirect_stdout=False)
        self._task: TaskID | None = None
        self._doing = ""

    def __enter__(self) -> "PartsBar":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Take how far the work is."""
        if self._task is None or doing != self._doing:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._doing = self._progress.add_task(doing, total=total), doing
            if not self._console.is_terminal:
                self._console.print(f"{doing} …")
        self._progress.update(self._task, completed=done)
