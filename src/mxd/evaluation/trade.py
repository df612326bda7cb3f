"""The picture of faithfulness against specialisation: what it costs to need one's experts."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from mxd.atomic import write_bytes_atomically
from mxd.evaluation.drawing import KindStyle, add_legend, describe, figure, kind_style, png, split_student
from mxd.evaluation.rows import EvaluationRow

if TYPE_CHECKING:
    import matplotlib.axes

FEWEST_POINTS = 3
"""Students of a layer and K, seeds apart, from which on the picture says anything."""


class Point(NamedTuple):
    """The students that differ in their seed only."""

    specialisation: float | None
    """Mean over seeds; None for a kind without one."""
    ce_increase: float
    """Mean over seeds, in nats a token."""
    label: str
    """What it was charged, or what else its id names beside its kind."""
    is_charged: bool
    """Whether training charged for its shared expert."""


def draw_trade(rows: Sequence[EvaluationRow], path: Path) -> bool:
    """Write ce_increase against specialisation, a panel for each layer and K, and return whether there was one to draw.

    A student is a point, the mean over its seeds; those of one kind that differ in what they were charged are joined.
    Kinds without a specialisation are level lines. Students that were not worse than the original model have no place
    on the logarithmic axis and are left out.
    """
    panels: dict[tuple[int, int], list[EvaluationRow]] = {}
    for row in rows:
        if row.layer is not None and row.k is not None:
            panels.setdefault((row.layer, row.k), []).append(row)
    points = {key: mean_points(members) for key, members in panels.items()}
    points = {key: found for key, found in points.items() if _count(found) >= FEWEST_POINTS}
    if not points:
        return False
    shown = [row for row in rows if (row.layer, row.k) in points]
    subtitle = describe(shown)
    with figure(5.2 * len(points), 4.0, title="What specialisation costs", subtitle=subtitle, legend=True) as drawing:
        axes = drawing.subplots(1, len(points), squeeze=False)[0]
        for ((layer, k), found), panel in zip(points.items(), axes, strict=True):
            _draw_panel(panel, found)
            panel.set_title(f"Layer {layer}, K = {k}")
        add_legend(drawing, list(axes))
        content = png(drawing)
    write_bytes_atomically(path, content)
    return True


def mean_points(rows: Sequence[EvaluationRow]) -> dict[str, list[Point]]:
    """Return the points of students of one layer and K: those of each kind in the order of their specialisation."""
    groups: dict[str, list[EvaluationRow]] = {}
    for row in rows:
        groups.setdefault(split_student(row.id)[0], []).append(row)
    found: dict[str, list[Point]] = {}
    for group, members in groups.items():
        ce_increase = fmean(row.ce_increase for row in members)
        if ce_increase <= 0:
            continue
        values = [row.specialisation for row in members if row.specialisation is not None]
        charge = members[0].shared_penalty
        label = f"{charge:g}" if charge is not None else group.removeprefix(members[0].kind).strip("-")
        found.setdefault(members[0].kind, []).append(
            Point(fmean(values) if values else None, ce_increase, label, charge is not None)
        )
    return {kind: sorted(points, key=lambda point: point.specialisation or 0.0) for kind, points in found.items()}


def _count(found: dict[str, list[Point]]) -> int:
    return sum(point.specialisation is not None for points in found.values() for point in points)


def _draw_panel(axes: "matplotlib.axes.Axes", found: dict[str, list[Point]]) -> None:
    axes.set(yscale="log", xlabel="Specialisation", ylabel="Cross-entropy increase (nats/token)", xlim=(0, 1))
    axes.grid(axis="y")
    for kind, points in found.items():
        style = kind_style(kind)
        placed = [point for point in points if point.specialisation is not None]
        for point in points:
            if point.specialisation is None:
                axes.axhline(point.ce_increase, color=style.colour, linestyle="--", linewidth=1.2, label=style.name)
        if placed:
            _draw_kind(axes, placed, style)


def _draw_kind(axes: "matplotlib.axes.Axes", points: Sequence[Point], style: KindStyle) -> None:
    axes.plot(
        [point.specialisation or 0.0 for point in points],
        [point.ce_increase for point in points],
        # No setting leads from one student to the next where nothing was charged.
        linestyle="-" if points[0].is_charged else "none",
        color=style.colour,
        marker=style.marker,
        markersize=5.5,
        linewidth=1.8,
        label=style.name,
    )
    for point in points:
        place = (point.specialisation or 0.0, point.ce_increase)
        axes.annotate(point.label, place, xytext=(6, -9), textcoords="offset points", size=8.5)
