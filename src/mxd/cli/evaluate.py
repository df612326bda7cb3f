"""`mxd evaluate`: how faithful a run's layers are."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from mxd.cli.output import notes, print_json
from mxd.evaluation.evaluate import evaluate_run, write_evaluation
from mxd.evaluation.expert_use import collapse_warnings
from mxd.evaluation.tables import format_table


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    text: tuple[str, ...] = (),
    tokens: int | None = None,
    student: tuple[str, ...] = (),
    k: tuple[int, ...] = (),
    together: bool = False,
    device: str | None = None,
    model: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Put a run's layers back into their model and measure what changes, on held-out text.

    Writes RUN/evaluation.json, RUN/frontier.png, RUN/report.html and RUN/ablation-<setting>.png for each setting that
    the run has several values of, unless --text or --student ask for something else than the whole run on its own text.

    Args:
        run: Folder of a finished run.
        text: Other text than the run's own; its held-out documents are used, which are the same wherever a document
            stands, if its form (text, or token ids) is the same. Or where the run's own text is now: what has the same
            documents is the same text.
        tokens: Tokens to evaluate on, at most.
        student: Ids such as mxd-k32 or 8/mxd-k32; all by default.
        k: Also measure each student at these numbers of active latents, which it need not have been trained with.
        together: Also measure the model with all layers replaced at once, by each student that all of them have
            (together/mxd-k32), or where there is one student a layer by these.
        device: Where to run; where the run was trained by default; `auto` takes the first accelerator.
        model: Where the language model is now (a folder or hub id), if it is not where the run found it.
        json_: Print the rows as one JSON array.
    """
    evaluation = evaluate_run(
        run, text=text, tokens=tokens, students=student, ks=k, together=together, device=device, model=model
    )
    command = shlex.join(["mxd", *sys.argv[1:]])
    is_whole = evaluation.on_own_text and not student
    written: list[str] = []
    if is_whole:
        title = f"Sparse layers of {evaluation.facts['model']}"
        written = write_evaluation(run, evaluation, title=title, footer=command)
    if json_:
        print_json([row.to_json() for row in evaluation.rows])
        return
    Console().print(format_table(evaluation.rows))
    console = notes()
    for warning in collapse_warnings(evaluation.rows):
        console.print(warning)
    if written:
        console.print(f"Wrote {run}/{', '.join(written[:-1])} and {written[-1]}.")
