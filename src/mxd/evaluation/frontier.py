"""The picture of faithfulness against sparsity."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mxd.atomic import write_bytes_atomically
from mxd.evaluation.drawing import (
    GRID,
    MUTED,
    KindStyle,
    add_legend,
    describe,
    figure,
    kind_style,
    png,
    svg,
    svg_file,
)
from mxd.evaluation.grid import (
    METRIC_NAMES,
    Estimate,
    FrontierPoint,
    Metric,
    drawn_layers,
    frontier_points,
    layer_name,
    sparsity_axis,
    sparsity_ticks,
)
from mxd.evaluation.intervals import Interval
from mxd.evaluation.rows import EvaluationRow

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.axis

_LINE_STYLES = ("-", "--", ":", "-.")
_FEWEST_KS_OF_A_LINE = 3
_DODGE = 0.05
"""Octaves of K between neighbouring lines, so that their intervals do not hide each other."""
_CUT_INTERVALS_AT = 0.5
"""How far an axis goes beyond its points for the sake of an interval, as a share of their span: two seeds alone make
intervals so wide that nothing else would be seen."""
_PANEL_INCHES = 4.2


class _Mark(NamedTuple):
    """A point as one panel shows it."""

    active: int | float
    """Where it stands on the axis of sparsity."""
    sparsity: str
    """The same in words."""
    estimate: Estimate


class _Series(NamedTuple):
    """The points that differ in K only, or in the L1 coefficient."""

    name: str
    style: KindStyle
    line: str
    """Line style, for several series of one kind."""
    marks: list[_Mark]
    """From the sparsest."""


def draw_frontier(
    rows: Sequence[EvaluationRow], *paths: Path, title: str = "Faithfulness against sparsity", note: str = ""
) -> None:
    """Write the picture of each metric against K, whole or not at all, in the formats of the paths: .png or .svg.

    There is one row of panels a layer, the last for all layers together, and one panel a metric. Where a layer has
    three Ks or more, each setting is a line over a logarithmic K (the mean over seeds, each seed a small point); with
    fewer, each point stands with its value above it. A student with l1 stands where its mean number of active latents
    is. Intervals are those of `Estimate.interval`; one that is far wider than all points together is cut. A value that
    is not finite is left out.

    Args:
        rows: What was measured.
        paths: The files.
        title: Of the picture.
        note: More to say below it, beside sizes and tokens.

    Raises:
        ValueError: If no row has a K, so that there is nothing to draw.
    """
    points = frontier_points(rows)
    layers = drawn_layers(points)
    if not layers:
        raise ValueError("There must be a row with a K to draw; got none.")
    heights = [_panel_height(points, layer) for layer in layers]
    subtitle = " · ".join(part for part in (describe(rows), note) if part)
    if len(layers) == 1:
        subtitle = f"{layer_name(layers[0])} · {subtitle}"
    # Labelled points need no legend.
    lines = any(has_lines(points, layer) for layer in layers)
    width = _PANEL_INCHES * len(METRIC_NAMES)
    with figure(width, sum(heights), title=title, subtitle=subtitle, legend=lines) as drawing:
        grid = drawing.subplots(len(layers), len(METRIC_NAMES), squeeze=False, height_ratios=heights)
        for layer, panels in zip(layers, grid, strict=True):
            for place, (metric, axes) in enumerate(zip(METRIC_NAMES, panels, strict=True)):
                _draw_panel(axes, points, layer, metric, labels=place == 0)
                prefix = f"{layer_name(layer)}: " if len(layers) > 1 else ""
                name = METRIC_NAMES[metric]
                axes.set_title(prefix + (name[0].lower() + name[1:] if prefix and metric != "kl" else name))
        if lines:
            add_legend(drawing, list(grid.flat))
        contents = {path: svg_file(drawing) if path.suffix == ".svg" else png(drawing) for path in paths}
    for path, content in contents.items():
        write_bytes_atomically(path, content)


def frontier_svg(points: Sequence[FrontierPoint], layer: int | None, metric: Metric) -> str:
    """Return one panel of the picture as an SVG element for a page, without title and legend."""
    with figure(4.8, _panel_height(points, layer)) as drawing:
        axes = drawing.subplots()
        _draw_panel(axes, points, layer, metric, labels=True)
        axes.set_title(METRIC_NAMES[metric])
        description = f"{METRIC_NAMES[metric]} against K, {layer_name(layer).lower()}; the table gives the numbers."
        return svg(drawing, description)


def has_lines(points: Sequence[FrontierPoint], layer: int | None) -> bool:
    """Return whether a layer's panels are lines, which need a legend, and not labelled points."""
    return len({point.active for point in points if point.layer == layer} - {None}) >= _FEWEST_KS_OF_A_LINE


def _panel_height(points: Sequence[FrontierPoint], layer: int | None) -> float:
    if has_lines(points, layer):
        return 3.3
    return 0.9 + 0.3 * sum(point.layer == layer for point in points)


def _draw_panel(
    axes: "matplotlib.axes.Axes", points: Sequence[FrontierPoint], layer: int | None, metric: Metric, *, labels: bool
) -> None:
    here = [point for point in points if point.layer == layer]
    series = _series(here, metric)
    if not series:
        axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", va="center", color=MUTED)
        axes.set(xticks=[], yticks=[])
    elif has_lines(points, layer):
        _draw_lines(axes, series, here, metric)
    else:
        _draw_points(axes, series, metric, labels=labels)


def _series(points: Sequence[FrontierPoint], metric: Metric) -> list[_Series]:
    found: dict[str, _Series] = {}
    of_kind: dict[str, int] = {}
    for point in points:
        if point.active is None:
            continue
        if point.series not in found:
            variant = of_kind.setdefault(point.kind, 0)
            of_kind[point.kind] += 1
            line = _LINE_STYLES[variant % len(_LINE_STYLES)]
            found[point.series] = _Series(point.series, kind_style(point.kind), line, [])
        if (estimate := point.estimate(metric)) is not None:
            found[point.series].marks.append(_Mark(point.active, point.sparsity, estimate))
    return [entry._replace(marks=sorted(entry.marks)) for entry in found.values() if entry.marks]


def _draw_lines(
    axes: "matplotlib.axes.Axes", series: Sequence[_Series], points: Sequence[FrontierPoint], metric: Metric
) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    for number, entry in enumerate(series):
        shift = 2 ** (_DODGE * (number - (len(series) - 1) / 2))
        colour, marker = entry.style.colour, entry.style.marker
        places, means = [mark.active * shift for mark in entry.marks], [mark.estimate.mean for mark in entry.marks]
        axes.plot(places, means, entry.line, color=colour, marker=marker, markersize=5, linewidth=1.8, label=entry.name)
        for place, mark in zip(places, entry.marks, strict=True):
            if mark.estimate.interval is not None:
                axes.vlines(place, *mark.estimate.interval, color=colour, linewidth=1.1, alpha=0.75)
            if len(mark.estimate.values) > 1:
                each = mark.estimate.values
                axes.plot([place] * len(each), each, marker, color=colour, markersize=2.5, alpha=0.45)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sparsity_ticks(points)))
    axes.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(sparsity_axis(points))
    axes.grid(axis="y")
    axes.margins(x=0.06)
    _set_scale(axes, axes.yaxis, series, metric)


def _draw_points(axes: "matplotlib.axes.Axes", series: Sequence[_Series], metric: Metric, *, labels: bool) -> None:
    from matplotlib.ticker import FixedLocator

    several = len({mark.active for entry in series for mark in entry.marks}) > 1
    marks = [(mark, entry) for entry in series for mark in entry.marks]
    names = [f"{entry.name}, {mark.sparsity}" if several else entry.name for mark, entry in marks]
    for place, (mark, entry) in enumerate(marks):
        axes.axhline(place, color=GRID, linewidth=0.7, zorder=0)
        colour = entry.style.colour
        axes.plot(mark.estimate.mean, place, entry.style.marker, color=colour, markersize=7, label=entry.name)
        if mark.estimate.interval is not None:
            axes.hlines(place, *mark.estimate.interval, color=colour, linewidth=1.4, alpha=0.75)
        axes.annotate(
            f"{mark.estimate.mean:.3g}".replace("-", "−"),
            (mark.estimate.mean, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            size=8.5,
        )
    axes.yaxis.set_major_locator(FixedLocator(range(len(marks))))
    axes.set_yticklabels(names if labels else [])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(marks) - 0.5, -0.75)
    _set_scale(axes, axes.xaxis, series, metric)


def _set_scale(
    axes: "matplotlib.axes.Axes", axis: "matplotlib.axis.Axis", series: Sequence[_Series], metric: Metric
) -> None:
    """Choose linear, logarithmic or, across 0, symmetric logarithmic by what the values span."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

    values = [value for entry in series for mark in entry.marks for value in mark.estimate.values]
    intervals = [mark.estimate.interval for entry in series for mark in entry.marks if mark.estimate.interval]
    name = "x" if axis is axes.xaxis else "y"
    largest = max(abs(value) for value in values)
    smallest = min((abs(value) for value in values if value), default=0.0)
    if largest > 10 * smallest and min(values) > 0:
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
    from_zero = axis.get_scale() == "linear" and metric != "loss_recovered" and min(values) >= 0
    low, high = _limits(axis, [*values, 0.0] if from_zero else values, intervals, 0.2 if name == "x" else 0.08)
    getattr(axes, f"set_{name}lim")(0 if from_zero else low, high)
    axis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    if min(values) < 0:
        (axes.axvline if name == "x" else axes.axhline)(0, color=MUTED, linewidth=0.8, zorder=0.5)


def _limits(
    axis: "matplotlib.axis.Axis", values: Sequence[float], intervals: Sequence[Interval], margin: float
) -> Interval:
    """Return the ends of an axis that shows all values, and of the intervals what is not far from them."""
    transform = axis.get_transform()
    shown = transform.transform(np.array(values, dtype=float))
    span = float(np.ptp(shown)) or abs(float(shown[0])) or 1.0
    farthest = shown.min() - _CUT_INTERVALS_AT * span, shown.max() + _CUT_INTERVALS_AT * span
    ends = np.clip(transform.transform(np.array(intervals, dtype=float).flatten()), *farthest)
    both = np.concatenate([shown, ends])
    low, high = transform.inverted().transform(np.array([both.min() - margin * span, both.max() + margin * span]))
    return float(low), float(high)
