"""`mxd explain`: what latents respond to, in words, and how well the words tell."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mxd.cli.bar import counted
from mxd.cli.numbers import parse_latents
from mxd.cli.output import notes, print_json
from mxd.judge.endpoint import Judge, JudgeConfig
from mxd.judge.explain import (
    Latents,
    estimate_explanations,
    explain_latents,
    export_run,
    gather_latents,
    write_explanations,
)
from mxd.judge.interpretation import Interpretation, TestScore


def explain(
    run: Annotated[Path, tyro.conf.Positional],
    judges: Annotated[JudgeConfig, tyro.conf.arg(name="")],
    latents: tuple[str, ...] = (),
    count: int = 20,
    student: tuple[str, ...] = (),
    text: tuple[str, ...] = (),
    tokens: int | None = None,
    device: str | None = None,
    model: str | None = None,
    delphi: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Have a judge explain a run's latents, and test the explanations by detection and fuzzing.

    Writes RUN/explanations.json. What was answered is kept in RUN/judge-cache and not asked for again. With --delphi,
    writes where all latents fire in delphi's cache format, which needs no judge.

    Args:
        run: Folder of a finished run.
        judges: Who explains.
        latents: Numbers of latents, and spans such as 0-99; some of each student by default.
        count: How many of each student by default, from the most to the least frequent.
        student: Ids such as mxd-k32 or 8/mxd-k32; all by default.
        text: Other text than the run's own; its held-out documents are used.
        tokens: Tokens of it, at most.
        device: Where to run; where the run was trained by default; `auto` takes the first accelerator.
        model: Where the language model is now (a folder or hub id), if it is not where the run found it.
        delphi: Folder for delphi's caches, one a student.
        json_: Print the explanations as one JSON array.
    """
    console = notes()
    if not judges.endpoints and delphi is None:
        raise ValueError("mxd explain needs --judge URL MODEL to explain, or --delphi FOLDER to export; got neither.")
    if delphi is not None:
        files = export_run(run, delphi, students=student, text=text, tokens=tokens, device=device, model=model)
        console.print(f"Wrote {len(files)} files for delphi to {delphi}.")
    if not judges.endpoints:
        return
    wanted = parse_latents(latents) if latents else []
    found = gather_latents(
        run, students=student, latents=wanted, count=count, text=text, tokens=tokens, device=device, model=model
    )
    for name, latent in found.skipped:
        console.print(f"Latent {latent} of {name} fires, or is silent, in too few contexts to be explained; left out.")
    rows = _explained(found, judges, run / "judge-cache", console)
    if judges.dry_run:
        return
    path = write_explanations(run, found, rows)
    if json_:
        print_json([row.to_json() for row in rows])
    else:
        Console().print(_table(rows))
    for row in rows:
        if row.failure is not None:
            console.print(f"{row.judge} left latent {row.latent} of {row.student} unfinished: {row.failure}.")
    if any(row.failure for row in rows):
        console.print("The same command asks for what is missing again.")
    console.print(f"Wrote {path}.")


def _explained(found: Latents, config: JudgeConfig, cache: Path, console: Console) -> list[Interpretation]:
    judges = [Judge(endpoint, config, cache) for endpoint in config.endpoints]
    for judge in judges:
        console.print(f"{judge.endpoint.model}: {estimate_explanations(judge, found)}.")
    rows: list[Interpretation] = []
    if not config.dry_run:
        with counted("Explaining", "latents") as advance:
            for judge in judges:
                rows += explain_latents(judge, found, advance)
    return rows


def _table(rows: list[Interpretation]) -> Table:
    table = Table("student", "latent", "detection", "fuzzing", "explanation")
    for row in rows:
        # What a model says is no markup.
        table.add_row(
            row.student, str(row.latent), _score(row.detection), _score(row.fuzzing), Text(row.explanation or "–")
        )
    return table


def _score(score: TestScore | None) -> str:
    return "–" if score is None else f"{score.balanced_accuracy:.2f}"
