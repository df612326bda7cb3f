"""`mxd probe`: what a run's latents tell of labelled text."""

import json
import os
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from mxd.cli.bar import PartsBar
from mxd.cli.output import notes
from mxd.printable import printable
from mxd.probing.examples import TEXTS, TOKENS


def probe(
    run: Annotated[Path, tyro.conf.Positional],
    data: tuple[str, ...] = (),
    texts: int = TEXTS,
    tokens: int = TOKENS,
    student: tuple[str, ...] = (),
    device: str | None = None,
    model: str | None = None,
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
        device: Where to run; where the run was trained by default; `auto` takes the first accelerator.
        model: Where the language model is now (a folder or hub id), if it is not where the run found it.
        json_: Print what probing.json holds.
    """
    # scikit-learn takes a second to load, which no other command should wait for.
    from mxd.probing.picture import draw_probing
    from mxd.probing.probe import probe_run
    from mxd.probing.results import write_probing
    from mxd.probing.tables import concept_table, mean_table, named_table, remarks

    console = notes()
    with PartsBar(console) as bar:
        probing = probe_run(
            run, data=data, texts=texts, tokens=tokens, students=student, device=device, model=model, report=bar
        )
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
