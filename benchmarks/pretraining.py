"""Pre-train dense, CP and tensor-ring models from the recipes of one family, seeds by seeds, and draw their curves.

    python benchmarks/pretraining.py stdlib --runs DIR
    python benchmarks/pretraining.py mnist --runs DIR --images FOLDER

Stopped at any moment it goes on where it was when it is called again; finished runs are read. Within a family the
recipes differ in the MLPs alone: equal data in equal order, equal steps, ranks that match the dense MLPs' parameters.

`--controls` adds dense language models that ask how much of a difference is one of the start: MLPs drawn uniformly with
bound 1/√d_in, as the mixtures' factors are, in place of GPT-2's normal distribution.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from harness import machine, print_table, write_report
from mxd.evaluation.drawing import add_legend, figure
from mxd.pretraining.config import ImageConfig, PretrainConfig
from mxd.pretraining.recipes import KINDS, find_recipe
from mxd.pretraining.run import RESULT_FILE, make_plan, run_plan
from mxd.pretraining.surgery import find_mlps
from mxd.quantities import compact
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import is_run, read_configuration

CONTROL = "dense, drawn as the factors"
STYLES = {
    "dense": ("Dense MLPs", "#667080"),
    CONTROL: ("Dense, drawn as the factors", "#e69f00"),
    "cp": ("CP experts", "#0072b2"),
    "tr": ("Tensor-ring experts", "#d55e00"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("stdlib", "mnist"))
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=Path, help="folder of train.npz and test.npz")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--controls", action="store_true", help="train the controls too, or report those that are there"
    )
    args = parser.parse_args()
    described = machine() | {"threads": args.threads}
    results: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for seed in range(args.seeds):
        for kind in KINDS:
            out = args.runs / f"{args.family}-{kind}-seed{seed}"
            config = find_recipe(f"{args.family}-{kind}")
            optimization = replace(config.optimization, seed=seed, threads=args.threads)
            config = replace(config, optimization=optimization)
            if isinstance(config, ImageConfig) and args.images is not None:
                config = replace(config, images=str(args.images))
            train(config, out)
            results[kind].append(out)
    if args.controls:
        results[CONTROL] = [train_control(seed, args.runs, args.threads) for seed in range(args.seeds)]
    report(args.family, results, described)


def train(config: PretrainConfig, out: Path, *, as_factors: bool = False) -> None:
    plan = make_plan(config, read_configuration(out) if is_run(out) else None)
    if as_factors:
        draw_as_factors(plan.task.model)
    run_plan(plan, out, resume=True, snapshot_every=60.0)


def train_control(seed: int, runs: Path, threads: int) -> Path:
    config = find_recipe("stdlib-dense")
    optimization = replace(config.optimization, seed=seed, threads=threads)
    out = runs / f"stdlib-dense-as-factors-seed{seed}"
    train(replace(config, optimization=optimization), out, as_factors=True)
    return out


@torch.no_grad()
def draw_as_factors(model: nn.Module) -> None:
    """Draw the dense MLPs' weights anew; transformers keeps them as (in, out)."""
    generator = torch.Generator().manual_seed(0)
    for found in find_mlps(model):
        for weight in model.get_submodule(found.path).parameters():
            if weight.ndim == 2:
                weight.uniform_(-(weight.shape[0] ** -0.5), weight.shape[0] ** -0.5, generator=generator)


def report(family: str, runs: Mapping[str, Sequence[Path]], described: Mapping[str, object]) -> None:
    found = {
        kind: [json.loads((run / RESULT_FILE).read_text(encoding="utf-8")) for run in folders]
        for kind, folders in runs.items()
    }
    measure = "accuracy" if family == "mnist" else "held_out_loss"
    rows = [row(results, found["dense"], runs[kind], measure) | {"MLPs": kind} for kind, results in found.items()]
    print_table(rows, family)
    seeds = len(runs["dense"])
    title = (
        "A Mixer on MNIST, pre-trained with three kinds of MLP"
        if family == "mnist"
        else "A GPT-2 on the standard library, pre-trained with three kinds of MLP"
    )
    unit = "images" if family == "mnist" else "tokens"
    spread = "one seed" if seeds == 1 else f"{seeds} seeds, mean and range"
    subtitle = f"{found['dense'][0][unit]:,} {unit}, matched parameters; {spread}"
    with figure(6.4, 3.6, title=title, subtitle=subtitle, legend=True) as drawing:
        panel = drawing.subplots()
        for kind, folders in runs.items():
            draw_curve(panel, kind, [read_metrics(folder / "metrics.jsonl") for folder in folders], unit)
        panel.set_xlabel(f"{unit} trained on")
        panel.set_ylabel("held-out loss (nats)" if unit == "images" else "held-out loss (nats a token)")
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(lambda value, _: compact(value))
        panel.yaxis.grid(True)
        if unit == "images":
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        add_legend(drawing, [panel])
        write_report(f"pretraining_{family}", title, rows, described, {"runs": found}, drawing)


def row(results: Sequence[Any], dense: Sequence[Any], folders: Sequence[Path], measure: str) -> dict[str, object]:
    values = [result[measure] for result in results]
    differences = [one - other[measure] for one, other in zip(values, dense, strict=True)]
    spread = stdev(values) if len(values) > 1 else math.nan
    seconds = [read_metrics(folder / "metrics.jsonl")[-1]["seconds"] for folder in folders]
    return {
        "MLPs": results[0]["kind"],
        "parameters": results[0]["parameters"],
        "seeds": len(values),
        measure: f"{fmean(values):.4f}",
        "± over seeds": "" if math.isnan(spread) else f"{spread:.4f}",
        "minus dense, same seed": f"{fmean(differences):+.4f}",
        "worst seed minus dense": f"{(min if measure == 'accuracy' else max)(differences):+.4f}",
        "seconds, last stretch": round(fmean(float(str(second)) for second in seconds)),
    }


def draw_curve(panel: Any, kind: str, logs: Sequence[Sequence[Mapping[str, Any]]], unit: str) -> None:
    points: dict[int, list[float]] = {}
    for records in logs:
        for record in records:
            if "held_out_loss" in record:
                points.setdefault(record[unit], []).append(record["held_out_loss"])
    at = sorted(points)
    name, colour = STYLES[kind]
    panel.plot(at, [fmean(points[place]) for place in at], color=colour, label=name, linewidth=1.8)
    panel.fill_between(
        at, [min(points[place]) for place in at], [max(points[place]) for place in at], color=colour, alpha=0.15
    )


if __name__ == "__main__":
    main()
