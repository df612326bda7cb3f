"""What a reviewer asks of a layer beside its loss, for docs/results.md: finished, evaluated runs, means over seeds.

    python benchmarks/scrutiny.py RUN [RUN ...] --name scrutiny_stories260K [--layer 2] [--k 16]

docs/runs.md defines the measures. `n-gram` is the share of greedy continuations that agree with the model's own on
their first 1, 4 and 8 tokens; `stable rank` and `rank` are of trained experts; `permuted fvu` is the error after the
experts' indices are shuffled, so that a kind whose experts did nothing would keep its fvu.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import machine, print_table, write_report
from mxd.evaluation.drawing import kind_style, split_student

MEASURES = {
    "fvu": "fvu",
    "permuted fvu": "fvu_permuted",
    "CE increase": "ce_increase",
    "Jacobian cosine": "jacobian_cosine",
    "stable rank": "stable_rank",
    "rank": "numerical_rank",
    "Gini": "gini",
    "top share": "top_share",
    "dead": "dead_fraction",
    "always on": "always_on",
    "specialisation": "specialisation",
}
NGRAMS = (1, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--k", type=int, nargs="+")
    parser.add_argument("--name", required=True, help="name of the files in benchmarks/results")
    args = parser.parse_args()
    groups: dict[tuple[int, str, int], list[Mapping[str, Any]]] = {}
    tokens: set[int] = set()
    for run in args.run:
        for row in json.loads((run / "evaluation.json").read_text())["rows"]:
            if row["layer"] is None or row["k"] != row["k_trained"]:
                continue
            if args.layer not in (None, row["layer"]) or (args.k and row["k"] not in args.k):
                continue
            name = split_student(row["id"])[0]
            if row["normalize_experts"] is False and "free" not in name.split("-"):
                name += "-free"
            groups.setdefault((row["layer"], name, row["k"]), []).append(row)
            tokens.add(row["tokens_trained"])
    if any(len({row["seed"] for row in members}) < len(members) for members in groups.values()):
        parser.error("a student must be in one of the runs only")
    if len(tokens) != 1:
        parser.error(f"the runs must be of one length; found {sorted(tokens)} tokens")
    table = [_line(*key, members) for key, members in groups.items()]
    print_table(table, args.name)
    model = Path(next(iter(groups.values()))[0]["model"]).name
    title = f"Beside the loss: {model}, {tokens.pop():,} tokens"
    documents = {row["documents_evaluated"] for members in groups.values() for row in members}
    write_report(args.name, title, table, machine(), {"documents_evaluated": sorted(documents)})


def _line(layer: int, name: str, k: int, members: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    kind = members[0]["kind"]
    line: dict[str, object] = {
        "layer": layer,
        "student": kind_style(kind).name + name.removeprefix(kind).replace("-", " "),
        "K": k,
        "seeds": len(members),
    }
    for length in NGRAMS:
        line[f"n-gram {length}"] = fmean(row["ngram_agreement"][length - 1] for row in members)
    for title, field in MEASURES.items():
        known = [row[field] for row in members if row.get(field) is not None]
        line[title] = fmean(known) if known else ""
    return line


if __name__ == "__main__":
    main()
