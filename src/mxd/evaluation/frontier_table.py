"""The frontier as a table, for a terminal and in Markdown."""

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from mxd.evaluation.grid import METRIC_NAMES, FrontierPoint, Metric, drawn_layers, layer_name
from mxd.evaluation.intervals import Interval
from mxd.evaluation.rows import EvaluationRow
from mxd.quantities import compact

_SHORT: dict[Metric, str] = {"ce_increase": "CE +", "nmse": "NMSE", "kl": "KL", "loss_recovered": "Recovered"}


def format_points(points: Sequence[FrontierPoint]) -> Table:
    """Return the points as a table for a terminal; the interval is that of the cross-entropy's increase."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.padding = (0, 1, 0, 0)
    # Names of settings may be long; numbers must never be cut for them.
    table.add_column("Kind", overflow="fold")
    for heading in ("K", "Seeds", _SHORT["ce_increase"], "95 % interval", *list(_SHORT.values())[1:]):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in drawn_layers(points):
        table.add_row(Text(layer_name(layer), style="bold"))
        for point in _ordered(points, layer):
            increase = point.estimate("ce_increase")
            interval = None if increase is None else increase.interval
            shown = "–" if interval is None else f"{_number(interval[0])} … {_number(interval[1])}"
            means = [_mean(point, metric) for metric in METRIC_NAMES]
            table.add_row(Text(point.name), _sparsity(point), _seeds(point), means[0], shown, *means[1:])
    return table


def markdown_points(points: Sequence[FrontierPoint]) -> str:
    """Return the points as a Markdown table: means over seeds, and beside each its interval and of what it is."""
    head = ["Layer", "Setting", "K", "Parameters", "FLOPs/token", "Seeds", *METRIC_NAMES.values()]
    lines = [head, ["--:", ":--", *["--:"] * (len(head) - 2)]]
    for layer in drawn_layers(points):
        for point in _ordered(points, layer):
            first = point.rows[0]
            sizes = ["–" if size is None else compact(size) for size in (first.parameters, first.flops_per_token)]
            cells = [_with_interval(point, metric) for metric in METRIC_NAMES]
            place = "all" if layer is None else str(layer)
            name = point.name.replace("|", r"\|")
            lines.append([place, name, _sparsity(point), *sizes, _seeds(point), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_students(rows: Sequence[EvaluationRow]) -> str:
    """Return each student's losses as a Markdown table, with their intervals over evaluation documents."""
    measured: list[Metric] = ["ce_increase", "kl", "loss_recovered"]
    lines = [["Layer", "Student", *(METRIC_NAMES[metric] for metric in measured)]]
    lines.append(["--:", ":--", *["--:"] * len(measured)])
    for row in rows:
        cells = [_bracketed(getattr(row, metric), getattr(row, f"{metric}_interval")) for metric in measured]
        lines.append(["all" if row.layer is None else str(row.layer), row.student.replace("|", r"\|"), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ordered(points: Sequence[FrontierPoint], layer: int | None) -> list[FrontierPoint]:
    return sorted((point for point in points if point.layer == layer), key=lambda point: point.active or math.inf)


def _sparsity(point: FrontierPoint) -> str:
    return point.sparsity.removeprefix("K = ")


def _seeds(point: FrontierPoint) -> str:
    """Return how many seeds there are, and of how many the mean is where some diverged."""
    increase = point.estimate("ce_increase")
    finite, seeds = 0 if increase is None else len(increase.values), len(point.rows)
    return str(seeds) if finite == seeds else f"{finite} of {seeds}"


def _mean(point: FrontierPoint, metric: Metric) -> str:
    estimate = point.estimate(metric)
    return "n/a" if estimate is None else _number(estimate.mean)


def _with_interval(point: FrontierPoint, metric: Metric) -> str:
    estimate = point.estimate(metric)
    return "n/a" if estimate is None else _bracketed(estimate.mean, estimate.interval)


def _bracketed(value: float, interval: Interval | None) -> str:
    if not math.isfinite(value):
        return "n/a"
    return _number(value) + ("" if interval is None else f" [{_number(interval[0])}, {_number(interval[1])}]")


def _number(value: float) -> str:
    return (f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}").replace("-", "−")
