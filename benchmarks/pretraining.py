"""Pre-train dense, CP and tensor-ring models from the recipes of one family, seeds by seeds, and draw their curves.

    python benchmarks/pretraining.py stdlib --runs DIR
    python benchmarks/pretraining.py mnist --runs DIR --images FOLDER

Stopped at any moment it goes on where it was when it is called again; finished runs are read. Within a family the
recipes differ in the MLPs alone: equal data in equal order, equal steps, ranks that match the dense MLPs' parameters.

`--controls` adds dense models, one seed each, that ask whether a difference is one of the start or of the learning
rate: MLPs drawn uniformly with bound 1/√d_in as the mixtures' factors are, and twice the rate.
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
from mxd.evaluation.drawing import add_legend, compact, figure
from mxd.pretraining.config import ImageConfig, PretrainConfig
from mxd.pretraining.recipes import KINDS, find_recipe
from mxd.pretraining.run import RESULT_FILE, make_plan, run_plan
from mxd.pretraining.surgery import find_mlps
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import is_run, read_configuration

CONTROLS = {"dense, drawn as the factors": 1.0, "dense, twice the rate": 2.0}
STYLES = {"dense": ("Dense MLPs", "#667080"), "cp": ("CP experts", "#0072b2"), "tr": ("Tensor-ring experts", "#d55e00")}


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
    controls = train_controls(args.family, args.runs, args.threads) if args.controls else {}
    report(args.family, results, controls, described)


def train(config: PretrainConfig, out: Path, *, as_factors: bool = False) -> None:
    plan = make_plan(config, read_configuration(out) if is_run(out) else None)
    if as_factors:
        draw_as_factors(plan.task.model)
    run_plan(plan, out, resume=True, snapshot_every=60.0)


def train_controls(family: str, runs: Path, threads: int) -> dict[str, Path]:
    """Train the dense controls of the language models; images have none."""
    folders: dict[str, Path] = {}
    for name, factor in CONTROLS.items() if family == "stdlib" else ():
        config = find_recipe("stdlib-dense")
        changed = replace(config.optimization, lr=factor * config.optimization.lr, threads=threads)
        folders[name] = runs / f"stdlib-{name.replace(', ', '-').replace(' ', '-')}"
        train(replace(config, optimization=changed), folders[name], as_factors="factors" in name)
    return folders


@torch.no_grad()
def draw_as_factors(model: nn.Module) -> None:
    """Draw the dense MLPs' weights anew; transformers keeps them as (in, out)."""
    generator = torch.Generator().manual_seed(0)
    for found in find_mlps(model):
        for weight in model.get_submodule(found.path).parameters():
            if weight.ndim == 2:
                weight.uniform_(-(weight.shape[0] ** -0.5), weight.shape[0] ** -0.5, generator=generator)


def report(
    family: str,
    runs: Mapping[str, Sequence[Path]],
    controls: Mapping[str, Path],
    described: Mapping[str, object],
) -> None:
    found = {
        kind: [json.loads((run / RESULT_FILE).read_text(encoding="utf-8")) for run in folders]
        for kind, folders in runs.items()
    }
    measure = "accuracy" if family == "mnist" else "held_out_loss"
    rows = [row(found[kind], found["dense"], runs[kind], measure) for kind in KINDS]
    for name, folder in controls.items():
        results = [json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))]
        rows.append(row(results, found["dense"][:1], [folder], measure) | {"MLPs": name})
        found[name] = results
    print_table(rows, family)
    seeds = len(runs["dense"])
    title = (
        "A Mixer on MNIST, pre-trained with three kinds of MLP"
        if family == "mnist"
        else "A GPT-2 on the standard library, pre-trained with three kinds of MLP"
    )
    unit = "images" if family == "mnist" else "tokens"
    subtitle = f"{found['dense'][0][unit]:,} {unit}, matched parameters; {seeds} seeds, mean and range"
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
