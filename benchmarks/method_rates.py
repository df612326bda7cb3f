"""Every kind at its own best learning rate: what becomes of the comparison in docs/method.md.

    mxd train --model stories260K --text tinystories_2MB_cased.txt --layer 2 --k 16 --tokens 8M --schedule linear \
        --warmup-tokens 320k --kind transcoder skip-transcoder mxd shared-transcoder --shared-penalty 0.1 0.15 \
        --normalize-experts True False --lr 8e-3 --out s-8e-3 && mxd evaluate s-8e-3        # and other rates
    python benchmarks/method_rates.py s-8e-3 s-1.6e-2 s-2e-3 --base method_stories260K --name method_rates_stories260K

`--base` is a table of `method.py`, of the same model, layer, tokens and schedule, whose students learnt at `auto`. A
student's best rate is the one of least mean fvu, which differs less between seeds than what the model loses. Its shares
of `--score` are of the best transcoder and of the best skip transcoder, each at its own best rate. `±` is half of the
95 % t interval over seeds.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from harness import RESULTS, machine, print_table, write_report
from mxd.evaluation.drawing import GRID, MUTED, add_legend, figure, kind_of, kind_style, split_student
from mxd.evaluation.intervals import seed_interval

AUTO = 4e-3
"""What `--lr auto` is for inputs up to 256 wide (docs/training.md)."""
SAME = ("model", "text", "layer", "k", "tokens", "batch_tokens", "schedule", "eval_tokens", "expansion")
SCORES = {"ce_increase": "CE increase", "kl": "KL"}
DASHES = ("-", "--", ":")


class Seed(NamedTuple):
    """One student, trained once."""

    student: str
    lr: float
    seed: int
    scores: Mapping[str, Any]


class Point(NamedTuple):
    """A student at one rate, all its seeds."""

    student: str
    lr: float
    seeds: tuple[Seed, ...]

    def mean(self, score: str) -> float | None:
        values = [seed.scores[score] for seed in self.seeds]
        return None if None in values else fmean(values)


def short(config: Mapping[str, Any]) -> dict[str, object]:
    """Return what runs must share, with models and texts by name."""
    kept = {name: config[name] for name in SAME}
    return kept | {"model": Path(config["model"]).name, "text": [Path(text).name for text in config["text"]]}


def seeds_of(rows: Iterable[Mapping[str, Any]], lr: float) -> list[Seed]:
    """Name students alike whichever run they are from: defaults (unit rows, the paper's start) go unsaid."""
    found: list[Seed] = []
    for row in rows:
        name = split_student(row["id"])[0].removesuffix("-unit").removesuffix("-paper")
        if row.get("shared_penalty") is not None and "-p" not in name:
            name += f"-p{row['shared_penalty']:g}"
        if row.get("normalize_experts") is False and "free" not in name.split("-"):
            name += "-free"
        found.append(Seed(name, lr, row["seed"], row))
    return found


def read(runs: Sequence[Path], base: Mapping[str, Any]) -> list[Point]:
    """Return the points of all runs and of the base, a student's rates in order."""
    seeds = seeds_of(base["students"], AUTO)
    for run in runs:
        config = json.loads((run / "run.json").read_text())["config"]
        if short(config) != short(base["config"]):
            raise SystemExit(f"{run} must differ from the base in rates, students and seeds only.")
        rows = json.loads((run / "evaluation.json").read_text())["rows"]
        seeds += seeds_of((row for row in rows if row["layer"] is not None), config["lr"])
    names = [(seed.student, seed.lr, seed.seed) for seed in seeds]
    if len(set(names)) < len(names):
        raise SystemExit("A student must be in one of the runs only, at one rate and seed.")
    groups: dict[tuple[str, float], list[Seed]] = {}
    for seed in sorted(seeds, key=lambda seed: (seed.lr, seed.seed)):
        groups.setdefault((seed.student, seed.lr), []).append(seed)
    order = list(dict.fromkeys(seed.student for seed in seeds))
    points = [Point(student, lr, tuple(members)) for (student, lr), members in groups.items()]
    swept = {point.student for point in points if point.lr != AUTO}
    return sorted((p for p in points if p.student in swept), key=lambda p: (order.index(p.student), p.lr))


def table(points: Sequence[Point], score: str) -> list[dict[str, object]]:
    def best(members: Iterable[Point]) -> Point:
        return min(members, key=lambda point: point.mean("fvu") or 0.0)

    rows: list[dict[str, object]] = []
    for point in points:
        interval = seed_interval([seed.scores[score] for seed in point.seeds])
        row: dict[str, object] = {
            "student": point.student,
            "lr": f"{point.lr:g}",
            "seeds": len(point.seeds),
            "fvu": point.mean("fvu"),
            "ce_increase": point.mean("ce_increase"),
            "KL": point.mean("kl"),
            f"± {SCORES[score]}": "" if interval is None else (interval[1] - interval[0]) / 2,
            "specialisation": point.mean("specialisation") or "",
        }
        is_best = point is best(other for other in points if other.student == point.student)
        row["best"] = "yes" if is_best else ""
        for kind, column in (("transcoder", "of transcoder"), ("skip-transcoder", "of skip")):
            rival = best(other for other in points if kind_of(other.student) == kind).mean(score)
            row[column] = (point.mean(score) or 0.0) / rival if is_best and rival else ""
        rows.append(row)
    return rows


def draw(points: Sequence[Point], score: str, subtitle: str) -> Figure:
    """Draw every student against its rate: its mean as a line, its seeds as points."""
    dashes: dict[str, list[str]] = {}
    for point in points:
        names = dashes.setdefault(kind_of(point.student), [])
        names += [] if point.student in names else [point.student]
    with figure(6.8, 4, title="Every student at several learning rates", subtitle=subtitle, legend=True) as drawing:
        axes = drawing.subplots()
        for kind, names in dashes.items():
            style = kind_style(kind)
            for name, dash in zip(names, DASHES, strict=False):
                own = [point for point in points if point.student == name]
                label = style.name + name.removeprefix(kind).replace("-free", ", free rows").replace("-p", ", λ ")
                axes.plot(
                    [p.lr for p in own], [p.mean(score) or 0.0 for p in own], dash, color=style.colour, label=label
                )
                for point in own:
                    values = [seed.scores[score] for seed in point.seeds]
                    axes.plot([point.lr] * len(values), values, style.marker, color=style.colour, ms=4)
        rates = sorted({point.lr for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("learning rate (a falling one begins there)", color=MUTED)
        axes.set_ylabel(SCORES[score], color=MUTED)
        axes.grid(color=GRID)
        add_legend(drawing, [axes])
        return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--base", required=True, help="name of method.py's files in benchmarks/results")
    parser.add_argument("--score", choices=SCORES, default="ce_increase", help="what the shares are of")
    parser.add_argument("--name", required=True, help="name of the files in benchmarks/results")
    args = parser.parse_args()
    base = json.loads((RESULTS / f"{args.base}.json").read_text())
    points = read(args.run, base)
    config = short(base["config"])
    rows = table(points, args.score)
    print_table(rows, args.name)
    (layer,), (k,) = base["config"]["layer"], base["config"]["k"]
    subtitle = f"{config['model']}, layer {layer}, K {k}, {config['tokens']:,} tokens"
    details = {
        "config": config,
        "base": args.base,
        "score": args.score,
        "students": [
            {"student": seed.student, "lr": seed.lr, "seed": seed.seed}
            | {name: seed.scores[name] for name in ("fvu", "ce_increase", "kl", "specialisation")}
            for point in points
            for seed in point.seeds
        ],
    }
    title = f"At several learning rates: {subtitle}"
    write_report(args.name, title, rows, machine(), details, draw(points, args.score, subtitle))


if __name__ == "__main__":
    main()
