"""`mxd probe`: what a run's latents tell of labelled text."""

import json
import os
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mxd.printable import printable
from mxd.probing.examples import TEXTS, TOKENS


def probe(
    run: Annotated[Path, tyro.conf.Positional],
    data: tuple[str, ...] = (),
    texts: int = TEXTS,
    tokens: int = TOKENS,
    student: tuple[str, ...] = (),
    device: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Find which latents tell a class of texts or name a concept of tokens, and how well: docs/experts.md.

    Writes RUN/probing.json, and a picture of each set of data, unless --student asks for a part of the run.

    Args:
        run: Folder of a finished run.
        data: What to probe with, any number of: a .jsonl or .csv file with {text, label} a row, or a .jsonl with {text,
            spans}; python (concepts of Python's tokenizer and parser on its standard library; what is probed with where
            a run trained on stdlib is given no data) or python=FOLDER; ag-news, europarl, github-code, amazon-category,
            amazon-sentiment, bias-in-bios-1, -2, -3 (paper: all eight), each also as NAME=FOLDER, a local copy;
            surnames=PATH, names in context as Gurnee et al. save them.
        texts: Texts of each set to use, at most.
        tokens: Tokens of documents with spans, or of Python, to look at, at most.
        student: Ids such as mxd-k32 or 8/mxd-k32; all by default.
        device: Where to run; where the run was trained by default.
        json_: Print what probing.json holds.
    """
    # scikit-learn takes a second to load, which no other command should wait for.
    from mxd.probing.picture import draw_probing
    from mxd.probing.probe import probe_run
    from mxd.probing.results import write_probing
    from mxd.probing.tables import concept_table, mean_table, named_table, remarks

    # Square brackets in the name of a folder are no markup.
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    with _Bar(console) as bar:
        probing = probe_run(run, data=data, texts=texts, tokens=tokens, students=student, device=device, report=bar)
    written: list[Path] = []
    if not student:
        # First what cannot be made again in a moment.
        file = write_probing(run, probing)
        written = [*draw_probing(probing, run), file]
    if json_:
        print(json.dumps(probing.to_json(), ensure_ascii=False))
        return
    out = Console()
    for result in (*probing.texts, *probing.tokens):
        out.print(mean_table(result))
        out.print()
        out.print(concept_table(result))
        out.print()
    if any(probing.named.values()):
        out.print(named_table(probing))
        out.print()
    for remark in remarks([*probing.texts, *probing.tokens]):
        console.print(remark)
    if written:
        console.print(printable(f"Wrote {', '.join(path.name for path in written)} to {os.fspath(run)}."))


class _Bar:
    """Shows how far the work is, on stderr: a bar in a terminal, a line for each part elsewhere."""

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

    def __enter__(self) -> "_Bar":
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
