r"""What bfloat16 costs on the mean, over the seeds of several reports of `precision.py`.

    python benchmarks/precision_seeds.py precision_bundled_linear_cpu precision_bundled_linear_more_cpu \
        --name precision_bundled_linear_seeds

A seed counts once, by how far its final loss in bfloat16 lies from that in float32; the interval is the 95 % t interval
over seeds.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import fmean

from harness import RESULTS, machine, print_table, write_report
from mxd.evaluation.intervals import seed_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="+", help="names of reports in benchmarks/results")
    parser.add_argument("--name", required=True, help="name of the files in benchmarks/results")
    args = parser.parse_args()
    losses: dict[tuple[str, int], float] = {}
    for name in args.report:
        for student, loss in _final_losses(RESULTS / f"{name}.json").items():
            precision, seed = re.fullmatch(r"(.+), seed (\d+)", student).groups()
            if losses.setdefault((precision, int(seed)), loss) != loss:
                parser.error(f"seed {seed} must be in one of the reports only")
    exact = {seed: loss for (precision, seed), loss in losses.items() if precision == "float32"}
    away = {seed: losses["bfloat16", seed] / loss - 1 for seed, loss in sorted(exact.items())}
    low, high = seed_interval(list(away.values())) or (fmean(away.values()),) * 2
    rows: list[dict[str, object]] = [{"seed": seed, "bfloat16 from float32": f"{by:+.2%}"} for seed, by in away.items()]
    rows += [
        {"seed": "mean", "bfloat16 from float32": f"{fmean(away.values()):+.2%}"},
        {"seed": "its 95 % interval", "bfloat16 from float32": f"{low:+.2%} … {high:+.2%}"},
        {
            "seed": "seeds apart, float32",
            "bfloat16 from float32": f"{max(exact.values()) / min(exact.values()) - 1:.1%}",
        },
    ]
    print_table(rows, args.name)
    described = machine()
    # That of the moment in which reports are read says nothing of them.
    described.pop("load_average_before")
    write_report(args.name, f"bfloat16 over {len(away)} seeds", rows, described, {"reports": args.report})


def _final_losses(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())["final_loss"]


if __name__ == "__main__":
    main()
