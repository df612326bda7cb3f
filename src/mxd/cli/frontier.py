"""`mxd frontier`: faithfulness against sparsity, of one run or several."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from mxd.cli.output import notes, print_json
from mxd.evaluation.comparison import compare_runs, frontier_folder, require_place, write_frontier
from mxd.evaluation.expert_use import collapse_warnings
from mxd.evaluation.frontier_table import format_points


def frontier(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path | None = None,
    text: tuple[str, ...] = (),
    tokens: int | None = None,
    together: bool = False,
    device: str | None = None,
    model: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Draw what sparsity costs: the loss and the error of every layer, kind, K and seed of finished runs, against K.

    Evaluates what is not evaluated yet, run by run, on held-out text; interrupted, it goes on with the next run. Writes
    frontier.png, frontier.svg, frontier.md, frontier.json and report.html, whose picture can be explored. Several seeds
    become their mean and its 95 % t interval; a single seed has a bootstrap interval over evaluation documents.

    Args:
        runs: Folders of finished runs. Of several, all must be of one model and be evaluated alike.
        out: Folder of the files. For one run it is the run's, or frontier-<digest> in there where its evaluation.json
            is on other text or tokens; for several it must be given.
        text: Other text than each run's own; its held-out documents are used. What is measured on it is kept in each
            run as evaluation-<digest>.json, and its evaluation.json stays. Or where the run's own text is now.
        tokens: Tokens to evaluate on, at most; without it, evaluations that are there are taken whatever their number.
            An evaluation.json on another number stays, too.
        together: Also draw what all layers cost when replaced at once, for each student that all layers have.
        device: Where to evaluate; where each run was trained by default; `auto` takes the first accelerator.
        model: Where the language model of all runs is now (a folder or hub id), if it is not where they found it.
        json_: Print what frontier.json holds.
    """
    if not runs:
        raise ValueError("A frontier must be of at least one run; name its folder.")
    console = notes()
    require_place(out, runs)
    command = shlex.join(["mxd", *sys.argv[1:]])
    found = compare_runs(
        runs,
        text=text,
        tokens=tokens,
        together=together,
        device=device,
        model=model,
        command=command,
        say=console.print,
    )
    folder = frontier_folder(found, out)
    written = write_frontier(found, folder, command=command)
    if json_:
        print_json(found.to_json())
        return
    Console().print(format_points(found.points))
    for warning in collapse_warnings(found.all_rows):
        console.print(warning)
    console.print(f"Wrote {', '.join(written[:-1])} and {written[-1]} to {folder}.")
