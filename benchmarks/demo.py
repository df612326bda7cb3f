"""Tabulate a finished demo for the README.

    mxd demo --out RUN
    python benchmarks/demo.py RUN

The demo has one seed; intervals are of 95 %, over the documents that it is evaluated on.
"""

import argparse
import json
from pathlib import Path

from harness import machine, print_table, write_report
from mxd.evaluation.drawing import kind_style
from mxd.evaluation.intervals import Interval
from mxd.evaluation.rows import EvaluationRow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    described = machine() | _training(args.run)
    # That of the moment in which the table is made says nothing of the run.
    described.pop("load_average_before")
    evaluation = json.loads((args.run / "evaluation.json").read_text())
    rows = [EvaluationRow.from_json(row) for row in evaluation["rows"]]
    table = [_line(row) for row in sorted(rows, key=lambda row: row.k or 0)]
    print_table(table, "demo")
    (trained,) = {row.tokens_trained for row in rows}
    title = f"The demo: layer {rows[0].layer} of the bundled model, {trained:,} tokens, one seed"
    details = {"facts": evaluation["facts"], "identity": evaluation["identity"], "evaluation": evaluation["rows"]}
    write_report("demo", title, table, described, details)


def _training(run: Path) -> dict[str, object]:
    """When and with how many threads the demo was trained, as the run itself says."""
    finished, resources = json.loads((run / "finished.json").read_text()), json.loads((run / "run.json").read_text())
    return {"date": finished["time"][:10], "threads": resources["resources"]["threads"]}


def _line(row: EvaluationRow) -> dict[str, object]:
    return {
        "kind": kind_style(row.kind).name,
        "K": row.k,
        "latents": row.num_latents,
        "parameters": row.parameters,
        "fvu": row.fvu,
        "CE increase": row.ce_increase,
        "its 95 %": _interval(row.ce_increase_interval),
        "recovered": row.loss_recovered,
        "KL": row.kl,
        "specialisation": "–" if row.specialisation is None else f"{row.specialisation:.3f}",
        "dead": row.dead_fraction,
    }


def _interval(found: Interval | None) -> str:
    return "–" if found is None else f"{found[0]:.4f} … {found[1]:.4f}"


if __name__ == "__main__":
    main()
