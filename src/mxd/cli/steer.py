"""`mxd steer`: what latents do to the text that a model writes."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mxd.cli.bar import counted
from mxd.cli.numbers import parse_latents
from mxd.cli.output import notes, print_json
from mxd.judge import Judge, JudgeConfig
from mxd.steering.experiment import Intervention
from mxd.steering.judged import judge_rows, steering_question
from mxd.steering.results import ROWS_FILE, SteeringResult, table_cells, write_result
from mxd.steering.run import steer_run
from mxd.steering.sampling import Sampling


def steer(
    run: Annotated[Path, tyro.conf.Positional],
    intervention: Annotated[Intervention, tyro.conf.arg(name="")],
    sampling: Annotated[Sampling, tyro.conf.arg(name="")],
    judges: Annotated[JudgeConfig, tyro.conf.arg(name="")],
    latents: tuple[str, ...] = ("0-99",),
    together: bool = False,
    student: tuple[str, ...] = (),
    text: tuple[str, ...] = (),
    tokens: int | None = None,
    device: str | None = None,
    model: str | None = None,
    out: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Steer latents of a run's students while the model writes, one at a time or together, and score what it writes.

    Without options this is the protocol of Oldfield et al. (2025). Interrupted, it goes on where it was. Writes
    steering.png, steering.md, steering.json (with the texts) and rows.jsonl.

    Args:
        run: Folder of a finished run.
        intervention: What is done to each latent.
        sampling: How texts are sampled.
        judges: Who else scores them.
        latents: Numbers of latents, and spans such as 0-99.
        together: Steer them all at once.
        student: Ids such as mxd-k32 or 8/mxd-k32; all by default.
        text: Other held-out text than the run's own, for the units.
        tokens: Tokens of it, at most.
        device: Where to run; where the run was trained by default; `auto` takes the first accelerator.
        model: Where the language model is now (a folder or hub id), if it is not where the run found it.
        out: Folder of the files; RUN/steering by default.
        json_: Print what steering.json holds.
    """
    folder, console = run / "steering" if out is None else out, notes()
    with counted("Steering", "latents") as advance:
        result = steer_run(
            run,
            students=student,
            latents=parse_latents(latents),
            together=together,
            sampling=sampling,
            intervention=intervention,
            log=folder / ROWS_FILE,
            text=text,
            tokens=tokens,
            device=device,
            model=model,
            advance=advance,
        )
    written = write_result(folder, result)
    if judges.endpoints:
        result = _judged(result, judges, run / "judge-cache", console)
        written = write_result(folder, result)
    if json_:
        print_json(result.to_json())
    else:
        Console().print(_table(result))
    _tell_end(result, f"Wrote {', '.join(written[:-1])} and {written[-1]} to {folder}.", console)


def _tell_end(result: SteeringResult, wrote: str, console: Console) -> None:
    for one in result.failures:
        console.print(f"{one.judge} has no scores for {named(one.latent)} of {one.student}: {one.failure}.")
    if result.failures:
        console.print(f"{len(result.failures)} texts are not judged; the same command asks for these again.")
    console.print(wrote)


def _table(result: SteeringResult) -> Table:
    heads, *lines = table_cells(result)
    table = Table()
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for line in lines:
        table.add_row(*line)
    return table


def _judged(result: SteeringResult, config: JudgeConfig, cache: Path, console: Console) -> SteeringResult:
    judges = [Judge(endpoint, config, cache) for endpoint in config.endpoints]
    for judge in judges:
        estimate = judge.estimate([steering_question(row.texts) for row in result.rows])
        console.print(f"{judge.endpoint.model}: {estimate}.")
    if config.dry_run:
        return result
    found = list(result.judged)
    with counted("Judging", "texts") as advance:
        for judge in judges:
            for one in judge_rows(judge, result.rows):
                found.append(one)
                advance(len(found), len(judges) * len(result.rows), judge.endpoint.model)
    return replace(result, judged=found)


def named(latent: int | tuple[int, ...]) -> str:
    """Return a latent, or several, for a message."""
    return f"latent {latent}" if isinstance(latent, int) else f"{len(latent)} latents at once"
