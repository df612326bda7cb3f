"""Steer the first latents of several kinds, by the paper's protocol and in units of their own, for docs/steering.md.

    python benchmarks/steering.py RUN --students mxd-k32 transcoder-k32 --name steering_bundled --hardware "…"

RUN is finished. Every latent from 0 to --last is steered alone, as `mxd steer` does it: 100 is added (Oldfield et al.,
2025). Those of the first half that fire in the held-out text are also given multiples of the 99th percentile of their
own values. What is done is kept in benchmarks/out, and an interrupted call goes on. The texts stay out of the results.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import RESULTS, machine, print_table, write_report
from mxd.steering.ellipse import Panel, draw_ellipses
from mxd.steering.experiment import Intervention, SteeredRow
from mxd.steering.results import ROWS_FILE, SteeringResult, student_name
from mxd.steering.run import steer_run
from mxd.steering.sampling import Sampling

OUT = Path(__file__).parent / "out"
INTERVENTIONS = {
    "add 100": Intervention(),
    "add 1 × p99": Intervention(strength=1.0, unit="p99"),
    "add 3 × p99": Intervention(strength=3.0, unit="p99"),
    "add 10 × p99": Intervention(strength=10.0, unit="p99"),
}
COLUMNS = ("student", "latent", "unit", "within", "across", "loss", "kl", "distinct")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--students", nargs="+", required=True)
    parser.add_argument("--name", required=True, help="name of the files in benchmarks/results")
    parser.add_argument("--last", type=int, default=99, help="the last latent that is steered")
    parser.add_argument("--steered", nargs="+", choices=INTERVENTIONS, default=list(INTERVENTIONS))
    parser.add_argument("--hardware", default="")
    args = parser.parse_args()
    results: dict[str, SteeringResult] = {}
    for name in args.steered:
        intervention = INTERVENTIONS[name]
        results[name] = steer_run(
            args.run,
            students=args.students,
            latents=range(args.last // 2 + 1 if intervention.needs_unit else args.last + 1),
            sampling=Sampling(),
            intervention=intervention,
            log=OUT / args.name / ROWS_FILE,
            advance=lambda done, total, student, name=name: (
                print(f"{name}: {done}/{total} {student}", flush=True) if done % 25 == 0 else None
            ),
        )
    table = [line for name, result in results.items() for line in _lines(name, result)]
    print_table(table, args.name)
    first = next(iter(results.values()))
    model = Path(str(first.settings["model"])).name
    each = {name: [_short(row) for row in result.rows] for name, result in results.items()}
    described = {**machine(), **({"hardware": args.hardware} if args.hardware else {})}
    details = {"model": model, "sampling": first.settings["sampling"], "columns": COLUMNS, "each": each}
    write_report(args.name, f"Steering single latents of {model}", table, described, details)
    _draw(results, RESULTS / f"{args.name}.png", f"{model}, latents 0 to {args.last}")


def _short(row: SteeredRow) -> str:
    """Return a row's numbers on one line; there are many."""
    values: list[object] = [getattr(row, column) for column in COLUMNS]
    return " ".join(f"{value:.5g}" if isinstance(value, float) else str(value) for value in values)


def _lines(name: str, result: SteeringResult) -> list[Mapping[str, Any]]:
    return [
        {
            "steered": name,
            "student": student_name(summary.student),
            "latents": summary.latents,
            "silent": summary.skipped,
            **{key: f"{spread.mean:.3f} ± {spread.deviation or 0:.3f}" for key, spread in summary.scores.items()},
            "loss, not steered": f"{summary.unsteered.loss:.3f}",
        }
        for summary in result.summaries
    ]


def _draw(results: Mapping[str, SteeringResult], path: Path, subtitle: str) -> None:
    panels: list[Panel] = []
    for name, result in results.items():
        points: dict[str, list[tuple[float, float]]] = {}
        for row in result.rows:
            points.setdefault(row.student, []).append((row.coherence, -row.loss))
        level = fmean(found.loss for found in result.unsteered.values())
        panels.append(Panel(name, "Coherence", "Log-likelihood, nats a token", points, (0.0, -level)))
    draw_ellipses(
        panels,
        path,
        title="What steering one latent does to the text",
        subtitle=f"{subtitle} · points are latents, ellipses one standard deviation around their mean",
    )


if __name__ == "__main__":
    main()
