"""The picture of faithfulness against sparsity."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from mxd.atomic import write_bytes_atomically
from mxd.evaluation.drawing import (
    GRID,
    MUTED,
    KindStyle,
    add_legend,
    describe,
    figure,
    group_name,
    kind_style,
    png,
    split_student,
    svg,
)
from mxd.evaluation.rows import EvaluationRow

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.axis

Metric: TypeAlias = Literal["ce_increase", "nmse", "fvu", "kl"]
METRIC_NAMES: dict[Metric, str] = {
    "ce_increase": "Cross-entropy increase (nats/token)",
    "nmse": "Normalised squared error",
    "fvu": "Fraction of variance unexplained",
    "kl": "KL divergence (nats/token)",
}
_LINE_STYLES = ("-", "--", ":", "-.")
_FEWEST_KS_OF_A_LINE = 3


class _Point(NamedTuple):
    k: int
    value: float


class _Series(NamedTuple):
    """The students that differ in K and seed only."""

    name: str
    style: KindStyle
    line: str
    """Line style, for several series of one kind."""
    points: list[_Point]

    def means(self) -> list[_Point]:
        """The mean over seeds at each K."""
        by_k: dict[int, list[float]] = {}
        for point in sorted(self.points):
            by_k.setdefault(point.k, []).append(point.value)
        return [_Point(k, math.fsum(values) / len(values)) for k, values in by_k.items()]


def draw_frontier(
    rows: Sequence[EvaluationRow],
    path: Path,
    *,
    metrics: Sequence[Metric] = ("ce_increase", "nmse"),
    title: str = "Faithfulness against sparsity",
) -> None:
    """Write the picture of metrics against K as a PNG, whole or not at all.

    There is one row of panels a layer and one panel a metric. Where a layer has three Ks or more, each kind
    is a line over a logarithmic K (the mean over seeds, each seed a small point); with fewer, each student
    is a point with its value above it. A value that is not finite is left out.

    Raises:
        ValueError: If no row belongs to a single layer, so that there is nothing to draw.
    """
    layers = drawn_layers(rows)
    shown = [row for row in rows if row.layer in layers]
    heights = [_panel_height(shown, layer) for layer in layers]
    subtitle = describe(shown) if len(layers) > 1 else f"Layer {layers[0]} · {describe(shown)}"
    # Labelled points need no legend.
    lines = any(has_lines(rows, layer) for layer in layers)
    with figure(4.8 * len(metrics), sum(heights), title=title, subtitle=subtitle, legend=lines) as drawing:
        grid = drawing.subplots(len(layers), len(metrics), squeeze=False, height_ratios=heights)
        for layer, panels in zip(layers, grid, strict=True):
            for metric, axes in zip(metrics, panels, strict=True):
                _draw_panel(axes, [row for row in shown if row.layer == layer], metric)
                prefix = f"Layer {layer}: " if len(layers) > 1 else ""
                axes.set_title(prefix + (METRIC_NAMES[metric].lower() if prefix else METRIC_NAMES[metric]))
        if lines:
            add_legend(drawing, list(grid.flat))
        content = png(drawing)
    write_bytes_atomically(path, content)


def frontier_svg(rows: Sequence[EvaluationRow], layer: int, metric: Metric) -> str:
    """Return one panel of the picture as an SVG element for a page, without title and legend."""
    with figure(4.8, _panel_height(rows, layer)) as drawing:
        axes = drawing.subplots()
        _draw_panel(axes, [row for row in rows if row.layer == layer], metric)
        axes.set_title(METRIC_NAMES[metric])
        return svg(drawing, f"{METRIC_NAMES[metric]} against K at layer {layer}; the table gives the numbers.")


def has_lines(rows: Sequence[EvaluationRow], layer: int) -> bool:
    """Return whether a layer's panels are lines, which need a legend, and not labelled points."""
    return len(_ks(rows, layer)) >= _FEWEST_KS_OF_A_LINE


def drawn_layers(rows: Sequence[EvaluationRow]) -> list[int]:
    """Return the layers that the picture shows: those of which a row has a K.

    Raises:
        ValueError: If there is none.
    """
    layers = sorted({row.layer for row in rows if row.layer is not None and row.k is not None})
    if not layers:
        raise ValueError("There must be a row with a layer and a K to draw; got none.")
    return layers


def _ks(rows: Sequence[EvaluationRow], layer: int) -> list[int]:
    return sorted({row.k for row in rows if row.layer == layer and row.k is not None})


def _panel_height(rows: Sequence[EvaluationRow], layer: int) -> float:
    if has_lines(rows, layer):
        return 3.3
    return 0.9 + 0.3 * sum(row.layer == layer for row in rows)


def _draw_panel(axes: "matplotlib.axes.Axes", rows: Sequence[EvaluationRow], metric: Metric) -> None:
    layer = next(row.layer for row in rows if row.layer is not None)
    series = _series(rows, metric)
    if has_lines(rows, layer):
        _draw_lines(axes, series, _ks(rows, layer))
    else:
        _draw_points(axes, series)


def _series(rows: Sequence[EvaluationRow], metric: Metric) -> list[_Series]:
    found: dict[str, _Series] = {}
    of_kind: dict[str, int] = {}
    for row in rows:
        group = split_student(row.id)[0]
        if group not in found:
            variant = of_kind.setdefault(row.kind, 0)
            of_kind[row.kind] += 1
            line = _LINE_STYLES[variant % len(_LINE_STYLES)]
            found[group] = _Series(group_name(group, row.kind), kind_style(row.kind), line, [])
        value: float | None = getattr(row, metric)
        if row.k is not None and value is not None and math.isfinite(value):
            found[group].points.append(_Point(row.k, value))
    return [series for series in found.values() if series.points]


def _draw_lines(axes: "matplotlib.axes.Axes", series: Sequence[_Series], ks: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    for entry in series:
        means = entry.means()
        axes.plot(
            [point.k for point in means],
            [point.value for point in means],
            entry.line,
            color=entry.style.colour,
            marker=entry.style.marker,
            markersize=5.5,
            linewidth=1.8,
            label=entry.name,
        )
        if len(entry.points) > len(means):
            axes.plot(
                [point.k for point in entry.points],
                [point.value for point in entry.points],
                linestyle="none",
                color=entry.style.colour,
                marker=entry.style.marker,
                markersize=3,
                alpha=0.45,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ks)))
    axes.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("K, active latents per token")
    axes.grid(axis="y")
    axes.margins(x=0.05, y=0.08)
    _set_scale(axes, axes.yaxis, [point.value for entry in series for point in entry.points])


def _draw_points(axes: "matplotlib.axes.Axes", series: Sequence[_Series]) -> None:
    from matplotlib.ticker import FixedLocator

    several_ks = len({point.k for entry in series for point in entry.points}) > 1
    students = [(point, entry) for entry in series for point in sorted(entry.points)]
    names = [f"{entry.name}, K = {point.k}" if several_ks else entry.name for point, entry in students]
    for place, (point, entry) in enumerate(students):
        axes.axhline(place, color=GRID, linewidth=0.7, zorder=0)
        axes.plot(
            point.value,
            place,
            linestyle="none",
            color=entry.style.colour,
            marker=entry.style.marker,
            markersize=7,
            label=entry.name,
        )
        axes.annotate(
            f"{point.value:.3g}".replace("-", "−"),
            (point.value, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            size=8.5,
        )
    axes.yaxis.set_major_locator(FixedLocator(range(len(students))))
    axes.set_yticklabels(names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(students) - 0.5, -0.75)
    axes.margins(x=0.2)
    _set_scale(axes, axes.xaxis, [point.value for point, _ in students])


def _set_scale(axes: "matplotlib.axes.Axes", axis: "matplotlib.axis.Axis", values: Sequence[float]) -> None:
    """Choose linear, logarithmic or, across 0, symmetric logarithmic by what the values span."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

    name = "x" if axis is axes.xaxis else "y"
    largest = max((abs(value) for value in values), default=0.0)
    smallest = min((abs(value) for value in values if value), default=0.0)
    if largest > 10 * smallest and min(values, default=0.0) > 0:
        axes.set(**{f"{name}scale": "log"})
        dense = largest < (200 if name == "y" else 30) * smallest
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if dense else (1,)))
        axis.set_minor_locator(NullLocator())
    elif largest > 100 * smallest > 0:
        threshold = 10 ** math.ceil(math.log10(largest / 100))
        getattr(axes, f"set_{name}scale")("symlog", linthresh=threshold)
        axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=threshold))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(5))
        if min(values, default=-1.0) >= 0 < largest:
            getattr(axes, f"set_{name}lim")(0, 1.2 * largest)
    axis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    if min(values, default=0.0) < 0:
        (axes.axvline if name == "x" else axes.axhline)(0, color=MUTED, linewidth=0.8, zorder=0.5)
