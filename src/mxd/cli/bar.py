"""A bar on stderr for work that is counted in pieces."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
