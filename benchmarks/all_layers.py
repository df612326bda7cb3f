"""Tabulate and draw finished, evaluated runs of many layers, kinds, Ks and seeds for docs/results.md.

    mxd train --model DIR --text FILE --layer 0 1 2 3 4 --kind mxd transcoder molt --k 4 16 64 --seeds 3 --out RUN
    mxd evaluate RUN --together
    python benchmarks/all_layers.py RUN --name all_layers_stories260K

Several runs must differ in their layers, kinds, Ks or seeds only. `±` is half of the 95 % t interval over seeds. Beside
the table stand counts of the cells (a layer and a K) in which one kind's mean increase lies below another's, and of
those in which each of its seeds lies below each of the other's: seeds start from different weights and see the same
text in the same order.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness import machine, print_table, write_report
from mxd.evaluation.drawing import GRID, add_legend, figure, kind_style
from mxd.evaluation.intervals import seed_interval
from mxd.evaluation.rows import EvaluationRow

KEPT = ("model", "text", "tokens", "batch_tokens", "lr", "schedule", "eval_tokens", "expansion", "init")
CLAIMS = (
    ("mxd", "transcoder"),
    ("mxd", "skip-transcoder"),
    ("mxd", "low-rank"),
    ("mxd", "molt"),
    ("skip-transcoder", "transcoder"),
    ("shared-transcoder", "skip-transcoder"),
    ("shared-transcoder", "mxd"),
)
"""Pairs of kinds whose first is said, by the papers or by us, to lie below its second."""


class Cell(NamedTuple):
    """A place of the grid."""

    layer: int | None
    """None where all layers are replaced at once."""
    k: int


Grid = dict[Cell, dict[str, list[EvaluationRow]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--name", required=True, help="name of the files in benchmarks/results")
    parser.add_argument("--hardware", default="", help="what the runs were trained on, where it is not this machine")
    args = parser.parse_args()
    config, *others = [_config(run) for run in args.run]
    if any(other != config for other in others):
        parser.error("the runs must be of one model, text, length and schedule")
    cells = _cells([row for run in args.run for row in _rows(run)])
    kinds = sorted({kind for found in cells.values() for kind in found}, key=lambda kind: kind_style(kind).name)
    table = [_line(cell, found, kinds) for cell, found in cells.items()]
    print_table(table, args.name)
    claims = [_claim(cells, low, high) for low, high in CLAIMS if {low, high} <= set(kinds)]
    print_table(claims, "Which kind lies below which")
    described = machine() | ({"trained on": args.hardware} if args.hardware else {})
    details = {"config": config, "claims": claims, "students": _students(cells)}
    title = f"Cross-entropy increase on every layer: {config['model']}, {config['tokens']:,} tokens"
    write_report(args.name, title, table, described, details, _draw(cells, kinds, title))


def _config(run: Path) -> dict[str, object]:
    configuration = json.loads((run / "run.json").read_text())
    config = configuration["config"]
    kept = {name: config[name] for name in KEPT} | {"precision": configuration["resources"]["precision"]}
    return kept | {"model": Path(config["model"]).name, "text": [Path(text).name for text in config["text"]]}


def _rows(run: Path) -> list[EvaluationRow]:
    found = json.loads((run / "evaluation.json").read_text())["rows"]
    rows = [EvaluationRow.from_json(row) for row in found]
    return [row for row in rows if row.as_trained and row.k is not None]


def _cells(rows: Sequence[EvaluationRow]) -> Grid:
    cells: Grid = {}
    order = sorted(rows, key=lambda row: (row.layer is None, row.layer or 0, row.k or 0, row.seed or 0))
    for row in order:
        assert row.k is not None
        members = cells.setdefault(Cell(row.layer, row.k), {}).setdefault(row.kind, [])
        if any((member.student, member.seed) == (row.student, row.seed) for member in members):
            raise SystemExit(f"{row.id} of layer {row.layer} must be in one of the runs only.")
        members.append(row)
    return cells


def _line(cell: Cell, found: Mapping[str, list[EvaluationRow]], kinds: Sequence[str]) -> dict[str, object]:
    line: dict[str, object] = {"layer": "all" if cell.layer is None else str(cell.layer), "K": cell.k}
    means = {kind: fmean(row.ce_increase for row in rows) for kind, rows in found.items()}
    for kind in kinds:
        name, rows = kind_style(kind).name, found.get(kind, [])
        interval = seed_interval([row.ce_increase for row in rows])
        spread = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.4f}"
        best = rows and means[kind] == min(means.values())
        text = f"{means[kind]:.4f}{spread}" if rows else ""
        line[name] = f"**{text}**" if best else text
    return line


def _claim(cells: Grid, low: str, high: str) -> dict[str, object]:
    both = [
        (found[low], found[high]) for cell, found in cells.items() if cell.layer is not None and _has(found, low, high)
    ]
    below = sum(fmean(row.ce_increase for row in a) < fmean(row.ce_increase for row in b) for a, b in both)
    everywhere = sum(max(row.ce_increase for row in a) < min(row.ce_increase for row in b) for a, b in both)
    ratios = [fmean(row.ce_increase for row in a) / fmean(row.ce_increase for row in b) for a, b in both]
    return {
        "claim": f"{kind_style(low).name} below {kind_style(high).name}",
        "cells": len(both),
        "on average": below,
        "every seed below every seed": everywhere,
        "median ratio": median(ratios),
    }


def _has(found: Mapping[str, list[EvaluationRow]], *kinds: str) -> bool:
    return all(kind in found for kind in kinds)


def _students(cells: Grid) -> list[dict[str, object]]:
    """The means over seeds of what docs/results.md speaks of."""
    metrics = ("fvu", "ce_increase", "kl", "loss_recovered", "dead_fraction", "specialisation", "jacobian_cosine")
    students: list[dict[str, object]] = []
    for cell, found in cells.items():
        for kind, rows in found.items():
            line: dict[str, object] = {"layer": cell.layer, "k": cell.k, "kind": kind, "seeds": len(rows)}
            line |= {"parameters": rows[0].parameters, "num_latents": rows[0].num_latents}
            for metric in metrics:
                values = [getattr(row, metric) for row in rows]
                known = [value for value in values if value is not None]
                line[metric] = fmean(known) if known else None
            students.append(line)
    return students


def _draw(cells: Grid, kinds: Sequence[str], title: str) -> Figure:
    layers = list(dict.fromkeys(cell.layer for cell in cells))
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    numbers = sorted({len(members) for found in cells.values() for members in found.values()})
    seeds = " or ".join(map(str, numbers))
    subtitle = "nats a token; " + ("one seed" if seeds == "1" else f"means of {seeds} seeds, bars: 95 % over seeds")
    with figure(3.6 * columns, 2.7 * rows, title=title, subtitle=subtitle, legend=True) as drawing:
        panels = list(drawing.subplots(rows, columns, squeeze=False).flat)
        for axes, layer in zip(panels, layers, strict=False):
            for kind in kinds:
                _curve(axes, cells, layer, kind)
            axes.set_title("All layers at once" if layer is None else f"Layer {layer}")
            ks = sorted({cell.k for cell in cells if cell.layer == layer})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ks, [str(k) for k in ks], minor=False)
            _scale(
                axes,
                [
                    fmean(row.ce_increase for row in rows)
                    for cell, of_kinds in cells.items()
                    if cell.layer == layer
                    for rows in of_kinds.values()
                ],
            )
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.grid(color=GRID)
            axes.set_xlabel("K")
        for axes in panels[len(layers) :]:
            axes.set_visible(False)
        add_legend(drawing, panels[: len(layers)])
        return drawing


def _scale(axes: Axes, increases: Sequence[float]) -> None:
    """Set an axis that tells small increases apart, and has room below zero only for what lies there."""
    lowest, highest = min(increases), max(increases)
    if lowest > 0:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.5, highest * 1.5)
    else:
        axes.set_yscale("symlog", linthresh=max(0.01, -lowest))
        axes.set_ylim(1.5 * lowest, highest * 1.5)


def _curve(axes: Axes, cells: Grid, layer: int | None, kind: str) -> None:
    found = [(cell.k, rows[kind]) for cell, rows in cells.items() if cell.layer == layer and kind in rows]
    if not found:
        return
    means = [fmean(row.ce_increase for row in rows) for _, rows in found]
    intervals = [
        seed_interval([row.ce_increase for row in rows]) or (mean, mean)
        for mean, (_, rows) in zip(means, found, strict=True)
    ]
    errors = [
        [mean - low for mean, (low, _) in zip(means, intervals, strict=True)],
        [high - mean for mean, (_, high) in zip(means, intervals, strict=True)],
    ]
    style = kind_style(kind)
    axes.errorbar(
        [k for k, _ in found],
        means,
        yerr=errors,
        label=style.name,
        color=style.colour,
        marker=style.marker,
        ms=4,
        lw=1.3,
        elinewidth=0.8,
    )


if __name__ == "__main__":
    main()
