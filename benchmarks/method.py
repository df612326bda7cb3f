"""Tabulate finished, evaluated runs for docs/method.md: every student against transcoder and skip transcoder.

    mxd train --recipe ablation-shared-stories --model DIR --text FILE --out RUN && mxd evaluate RUN
    python benchmarks/method.py RUN --name method_stories260K

Several runs must differ in their students only. Means are over seeds, `±` is half of the 95 % t interval. `of
transcoder` and `of skip` are the cross-entropy increase in shares of the best transcoder's and the best skip
transcoder's.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import RESULTS, machine, print_table, write_report
from mxd.evaluation.drawing import split_student
from mxd.evaluation.intervals import seed_interval
from mxd.evaluation.rows import EvaluationRow
from mxd.evaluation.trade import draw_trade

Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--name", required=True, help="name of the files in benchmarks/results")
    parser.add_argument("--hardware", default="", help="what the run was trained on, where it is not this machine")
    args = parser.parse_args()
    configurations = [json.loads((run / "run.json").read_text()) for run in args.run]
    rows = [row for run in args.run for row in json.loads((run / "evaluation.json").read_text())["rows"]]
    kept = (
        "model",
        "text",
        "layer",
        "k",
        "tokens",
        "batch_tokens",
        "lr",
        "schedule",
        "eval_tokens",
        "expansion",
    )
    config, *others = [
        {name: found["config"][name] for name in kept} | {"precision": found["resources"]["precision"]}
        for found in configurations
    ]
    if any(other != config for other in others):
        parser.error("the runs must be of one model, text, length and schedule")
    for row in rows:
        if row["normalize_experts"] is False and "free" not in row["id"].split("-"):
            row["id"] = row["id"].replace(row["kind"], f"{row['kind']}-free", 1)
    rows = [row for row in rows if row["layer"] is not None and row["k"] == row["k_trained"]]
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        name, k = split_student(row["id"])
        groups.setdefault((row["layer"], f"{name}, K {k}"), []).append(row)
    if any(len({row["seed"] for row in members}) < len(members) for members in groups.values()):
        parser.error("a student must be in one of the runs only")
    table = [_line(groups, layer, name, members) for (layer, name), members in groups.items()]
    print_table(table, args.name)
    config |= {"model": Path(config["model"]).name, "text": [Path(text).name for text in config["text"]]}
    details = {"config": config, "students": _compact(rows)}
    described = machine() | ({"trained on": args.hardware} if args.hardware else {})
    title = f"Faithful and specialised: {config['model']}, {config['tokens']:,} tokens"
    write_report(args.name, title, table, described, details)
    draw_trade([EvaluationRow.from_json(row) for row in rows], RESULTS / f"{args.name}.png")


def _line(groups: Mapping[tuple[int, str], Rows], layer: int, name: str, members: Rows) -> dict[str, object]:
    def mean(key: str, rows: Rows = members) -> float:
        return fmean(row[key] for row in rows)

    interval = seed_interval([row["ce_increase"] for row in members])
    specialisations = [row["specialisation"] for row in members if row["specialisation"] is not None]
    line: dict[str, object] = {
        "layer": layer,
        "student": name,
        "seeds": len(members),
        "parameters": members[0]["parameters"],
        "fvu": mean("fvu"),
        "ce_increase": mean("ce_increase"),
        "KL": mean("kl"),
        "± over seeds": "" if interval is None else (interval[1] - interval[0]) / 2,
        "specialisation": fmean(specialisations) if specialisations else "",
    }
    k = members[0]["k"]
    for kind, column in (("transcoder", "of transcoder"), ("skip-transcoder", "of skip")):
        rivals = [
            rows for (place, _), rows in groups.items() if (place, rows[0]["kind"], rows[0]["k"]) == (layer, kind, k)
        ]
        best = min((mean("ce_increase", rows) for rows in rivals), default=None)
        line[column] = "" if best is None else mean("ce_increase") / best
    return line | {
        "loss recovered": mean("loss_recovered"),
        "always on": mean("always_on"),
        "dead": mean("dead_fraction"),
    }


def _compact(rows: Rows) -> list[dict[str, Any]]:
    kept = (
        "id",
        "layer",
        "kind",
        "k",
        "seed",
        "num_latents",
        "parameters",
        "fvu",
        "ce_increase",
        "ce_increase_interval",
        "kl",
        "specialisation",
    )
    return [{name: row[name] for name in kept} for row in rows]


if __name__ == "__main__":
    main()
