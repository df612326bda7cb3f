"""The picture of faithfulness against specialisation: what it costs to need one's experts."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mxd.atomic import write_bytes_atomically
from mxd.evaluation.drawing import MUTED, add_legend, describe, figure, kind_style, png, split_student
from mxd.evaluation.rows import EvaluationRow

if TYPE_CHECKING:
    import matplotlib.axes

Loss = Literal["ce_increase", "kl"]
LOSSES: dict[Loss, str] = {
    "ce_increase": "Cross-entropy increase (nats/token)",
    "kl": "KL divergence (nats/token)",
}
FEWEST_POINTS = 2
"""Students of a layer and K, seeds apart, from which on the picture says anything."""
MOST_PLACES = 24
"""Layers and Ks that are drawn: a picture of hundreds would be taller than a PNG may be."""


class Point(NamedTuple):
    """The students that differ in their seed only."""

    specialisation: float | None
    """Mean over seeds; None for a kind without one."""
    loss: float
    """Mean over seeds, in nats a token."""
    label: str
    """What it was charged for its shared expert; nothing for other kinds."""


def draw_trade(rows: Sequence[EvaluationRow], path: Path) -> bool:
    """Write cross-entropy increase and KL against specialisation, and return whether there was anything to draw.

    There is a row of panels for each layer and K. A student is a point, the mean over its seeds; those that differ in
    what they were charged alone are joined. Kinds without a specialisation are level lines. An axis is logarithmic
    unless some student is no worse than the original model. What is not finite is left out; so are layers and Ks beyond
    the first `MOST_PLACES`.
    """
    places: dict[tuple[int, int], list[EvaluationRow]] = {}
    for row in rows:
        if row.layer is not None and row.k is not None:
            places.setdefault((row.layer, row.k), []).append(row)
    places = {place: members for place, members in places.items() if _num_placed(members) >= FEWEST_POINTS}
    if not places:
        return False
    hidden = len(places) - MOST_PLACES
    places = dict(list(places.items())[:MOST_PLACES])
    subtitle = describe([row for members in places.values() for row in members])
    subtitle += f" · {hidden} further layers and Ks not drawn" if hidden > 0 else ""
    with figure(9.6, 3.6 * len(places), title="What specialisation costs", subtitle=subtitle, legend=True) as drawing:
        grid = drawing.subplots(len(places), len(LOSSES), squeeze=False)
        for ((layer, k), members), panels in zip(places.items(), grid, strict=True):
            for (loss, name), axes in zip(LOSSES.items(), panels, strict=True):
                draw_panel(axes, mean_points(members, loss))
                axes.set_title(f"Layer {layer}, K = {k}")
                axes.set_ylabel(name)
        add_legend(drawing, list(grid.flat))
        content = png(drawing)
    write_bytes_atomically(path, content)
    return True


def mean_points(rows: Sequence[EvaluationRow], loss: Loss) -> dict[tuple[str, str], list[Point]]:
    """Return the points of students of one layer and K, by kind and settings, in order of specialisation."""
    groups: dict[str, list[EvaluationRow]] = {}
    for row in rows:
        groups.setdefault(split_student(row.id)[0], []).append(row)
    found: dict[tuple[str, str], list[Point]] = {}
    for group, members in groups.items():
        mean, kind, charge = fmean(getattr(row, loss) for row in members), members[0].kind, members[0].shared_penalty
        values = [row.specialisation for row in members if row.specialisation is not None]
        if not all(map(math.isfinite, (mean, *values))):
            continue
        label = "" if charge is None else f"{charge:g}"
        setting = re.sub(r"-p[\d.]+(?=-|$)", "", group.removeprefix(kind)).strip("-").replace("-", " ")
        found.setdefault((kind, setting), []).append(Point(fmean(values) if values else None, mean, label))
    return {line: sorted(points, key=lambda point: point.specialisation or 0.0) for line, points in found.items()}


def _num_placed(rows: Sequence[EvaluationRow]) -> int:
    return len({split_student(row.id)[0] for row in rows if row.specialisation is not None})


def draw_panel(axes: "matplotlib.axes.Axes", found: Mapping[tuple[str, str], Sequence[Point]]) -> None:
    """Draw the points of a layer and K for one loss."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xlabel("Specialisation")
    if all(point.loss > 0 for points in found.values() for point in points):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y")
    kinds = [kind for kind, _ in found]
    for number, ((kind, setting), points) in enumerate(found.items()):
        style = kind_style(kind)
        # Lines of one kind share its colour; the further ones are paler.
        alpha = 1.0 if kind not in kinds[:number] else 0.5
        look: dict[str, Any] = {"color": style.colour, "label": f"{style.name} {setting}".strip(), "alpha": alpha}
        level = [point for point in points if point.specialisation is None]
        for point in level:
            axes.axhline(point.loss, linestyle="--", linewidth=1.2, **look)
        if level:
            continue
        places = [(point.specialisation or 0.0, point.loss) for point in points]
        axes.plot(*zip(*places, strict=True), marker=style.marker, markersize=5.5, linewidth=1.8, **look)
        for point, place in zip(points, places, strict=True):
            axes.annotate(point.label, place, xytext=(6, -9), textcoords="offset points", size=8.5)
    axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
