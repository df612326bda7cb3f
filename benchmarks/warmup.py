"""How long the learning rate should rise: every kind after warm-ups of several shares of a run, over seeds.

    python benchmarks/warmup.py --model bundled --text stdlib --layer 3 --tokens 500K --k 32
    python benchmarks/warmup.py --model DIR --text FILE --layer 2 --tokens 1M --k 16 --kinds mxd --seeds 8

Everything but `--warmup-tokens` and what is named here is as `mxd train` has it by default. The score is the fvu on
held-out text. Seeds differ in their initialisation alone; what they are apart says how much a single run's end is luck.
With `--runs DIR` the runs are kept there, and those that are finished are not repeated.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from matplotlib.figure import Figure
from rich.console import Console

from harness import RESULTS, machine, print_table, write_report
from mxd.cli.numbers import COUNTS
from mxd.evaluation.drawing import GRID, MUTED, add_legend, figure, kind_style

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Train with warm-ups of several lengths and compare where they end."""

    model: str = "bundled"
    """As of mxd train."""
    text: tuple[str, ...] = ("stdlib",)
    """As of mxd train."""
    layer: int = 3
    """Block whose MLP is learnt."""
    kinds: tuple[str, ...] = (
        "mxd",
        "transcoder",
        "skip-transcoder",
        "topk-sae",
        "low-rank",
        "molt",
        "shared-transcoder",
    )
    """Kinds of layer."""
    k: int = 32
    """Latents active for each token."""
    tokens: int = 500_000
    """Tokens to train on."""
    expansion: int = 16
    """As of mxd train."""
    schedule: str = "constant"
    """As of mxd train."""
    shares: tuple[float, ...] = (0.0, 0.04, 0.1, 0.2)
    """Warm-ups, in shares of the tokens."""
    seeds: int = 3
    """Seeds of each kind."""
    eval_tokens: int = 32_768
    """Held-out tokens to evaluate on, at most."""
    threads: int | None = None
    """As of mxd train."""
    name: str = "warmup"
    """Name of the report in results/."""
    out: Path = RESULTS
    """Folder of the report."""
    runs: Path | None = None
    """Folder that keeps the runs; without it they go."""
    note: str = ""
    """What a reader of the results should know, such as what else the machine was doing."""


def mxd(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mxd", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"mxd {arguments[0]} must end well; it ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def run(options: Options, share: float, out: Path) -> Rows:
    """Train every kind and seed with one warm-up, where that is not done, and return the rows of their evaluation."""
    if not (out / "finished.json").exists():
        asked: dict[str, object] = {"model": options.model, "layer": options.layer, "k": options.k}
        asked |= {"tokens": options.tokens, "expansion": options.expansion, "schedule": options.schedule}
        asked |= {"seeds": options.seeds, "eval-tokens": options.eval_tokens, "device": "cpu", "out": out}
        asked |= {"warmup-tokens": round(share * options.tokens)}
        asked |= {} if options.threads is None else {"threads": options.threads}
        given = [part for name, value in asked.items() for part in (f"--{name}", str(value))]
        mxd("train", *given, "--text", *options.text, "--kind", *options.kinds)
    return json.loads(mxd("evaluate", str(out), "--json"))


def table(options: Options, found: Mapping[float, Rows]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for kind in options.kinds:
        for share, evaluated in found.items():
            members = [row for row in evaluated if row["kind"] == kind]
            scores = [row["fvu"] for row in members]
            rows.append(
                {
                    "kind": kind,
                    "warm-up": f"{share:.0%}",
                    "fvu, mean": f"{fmean(scores):.4f}",
                    "best": f"{min(scores):.4f}",
                    "worst": f"{max(scores):.4f}",
                    "worst above best": f"{max(scores) / min(scores) - 1:.1%}",
                    "CE increase, mean": f"{fmean(row['ce_increase'] for row in members):.4f}",
                    "dead": f"{fmean(row['dead_fraction'] for row in members):.0%}",
                }
            )
    return rows


def draw(options: Options, found: Mapping[float, Rows], subtitle: str) -> Figure:
    """Draw where each seed ends, in shares of its kind's mean after the first warm-up; a line joins the means."""
    first = min(found)
    with figure(6.4, 3.8, title="Warm-up and where runs end", subtitle=subtitle, legend=True) as drawing:
        axes = drawing.subplots()
        for place, kind in enumerate(options.kinds):
            style, dodge = kind_style(kind), 0.2 * (place - (len(options.kinds) - 1) / 2)
            scores = {
                100 * share + dodge: [row["fvu"] for row in evaluated if row["kind"] == kind]
                for share, evaluated in sorted(found.items())
            }
            base = fmean(row["fvu"] for row in found[first] if row["kind"] == kind)
            axes.plot(
                list(scores), [fmean(ends) / base for ends in scores.values()], color=style.colour, label=style.name
            )
            for share, ends in scores.items():
                axes.plot([share] * len(ends), [end / base for end in ends], style.marker, color=style.colour, ms=4)
        axes.set_xlabel("warm-up, % of the tokens", color=MUTED)
        axes.set_ylabel(f"fvu, in shares of the mean at {first:.0%}", color=MUTED)
        axes.set_xticks([100 * share for share in found])
        axes.grid(color=GRID)
        add_legend(drawing, [axes])
        return drawing


def main(options: Options) -> None:
    described = machine()
    with tempfile.TemporaryDirectory(prefix="mxd-warmup-") as name:
        folder = options.runs or Path(name)
        found = {share: run(options, share, folder / f"{options.name}-{share:g}") for share in options.shares}
    rows = table(options, found)
    model = Path(options.model).name
    ids = f"{model}, layer {options.layer}, k {options.k}, {options.tokens:,} tokens, {options.schedule} rate"
    print_table(rows, f"Warm-up: {ids}")
    Console().print(described)
    write_report(
        options.name,
        f"Where runs end after warm-ups of several lengths: {ids}",
        rows,
        described,
        {
            "note": options.note,
            "fvu": {
                f"{share:g}": {f"{row['kind']}, seed {row['seed']}": row["fvu"] for row in evaluated}
                for share, evaluated in found.items()
            },
        },
        draw(options, found, f"{ids} · {options.seeds} seeds"),
        options.out,
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(tyro.cli(Options, registry=COUNTS))
