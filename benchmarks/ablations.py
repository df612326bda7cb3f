"""Tabulate finished, evaluated ablation runs for docs/results.md, and keep their pictures.

    mxd train --recipe ablation-rank-stories --model DIR --text FILE --tokens 1M --out rank && mxd evaluate rank
    python benchmarks/ablations.py rank normalization

Each run becomes `ablation_<its folder's name>.md` and `.json`, one row for all seeds of a setting, and its pictures
`ablation-<option>.png` become `ablation_<name>_<option>.png`; a run that varies nothing but the kind gives
its frontier. `±` is half of the 95 % t interval over seeds.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from harness import RESULTS, machine, print_table, write_report
from mxd.evaluation.drawing import split_student
from mxd.evaluation.intervals import seed_interval
from mxd.evaluation.rows import EvaluationRow

KEPT = ("recipe", "model", "text", "layer", "tokens", "batch_tokens", "lr", "schedule", "eval_tokens", "expansion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--hardware", default="", help="what the runs were trained on, where it is not this machine")
    args = parser.parse_args()
    described = machine() | ({"trained on": args.hardware} if args.hardware else {})
    for run in args.run:
        _report(run, described)


def _report(run: Path, described: dict[str, object]) -> None:
    configuration = json.loads((run / "run.json").read_text())
    config = configuration["config"]
    kept = {name: config[name] for name in KEPT} | {"precision": configuration["resources"]["precision"]}
    kept |= {"model": Path(config["model"]).name, "text": [Path(text).name for text in config["text"]]}
    rows = [EvaluationRow.from_json(row) for row in json.loads((run / "evaluation.json").read_text())["rows"]]
    groups: dict[tuple[str, int | None, int | None], list[EvaluationRow]] = {}
    for row in rows:
        groups.setdefault((split_student(row.student)[0], row.k_trained, row.k), []).append(row)
    table = [_line(name, members) for (name, _, _), members in groups.items()]
    print_table(table, run.name)
    title = f"Ablation {run.name}: {kept['model']}, layer {config['layer'][0]}, {config['tokens']:,} tokens"
    write_report(f"ablation_{run.name}", title, table, described, {"config": kept})
    for picture in sorted(run.glob("ablation-*.png")) or [run / "frontier.png"]:
        option = picture.stem.removeprefix("ablation-")
        shutil.copyfile(picture, RESULTS / f"ablation_{run.name}_{option}.png")


def _line(name: str, members: Sequence[EvaluationRow]) -> dict[str, object]:
    first = members[0]
    interval = seed_interval([row.ce_increase for row in members])
    return {
        "student": name,
        "K": "" if first.k is None else str(first.k),
        "K in training": "" if first.k_trained is None else str(first.k_trained),
        "L0": _mean([row.l0 for row in members]),
        "latents": first.num_latents or "",
        "parameters": first.parameters or "",
        "seeds": len(members),
        "ce_increase": f"{fmean(row.ce_increase for row in members):.4f}",
        "± over seeds": "" if interval is None else f"{(interval[1] - interval[0]) / 2:.4f}",
        "fvu": _mean([row.fvu for row in members]),
        "specialisation": _mean([row.specialisation for row in members]),
        "dead": _mean([row.dead_fraction for row in members]),
    }


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3g}" if known else ""


if __name__ == "__main__":
    main()
