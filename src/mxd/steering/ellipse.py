"""The paper's picture: each kind's latents as points, and the ellipse of one standard deviation around their mean."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from mxd.atomic import write_bytes_atomically
from mxd.evaluation.drawing import add_legend, figure, kind_of, kind_style, png, student_name

if TYPE_CHECKING:
    import matplotlib.axes


_MOST_BESIDE = 3


class Ellipse(NamedTuple):
    """The points at Mahalanobis distance 1 from a mean."""

    centre: tuple[float, float]
    """The mean."""
    width: float
    """The whole longer axis: twice the standard deviation along it."""
    height: float
    """The whole shorter axis."""
    degrees: float
    """How far the longer axis is turned from the horizontal, anticlockwise."""


class Panel(NamedTuple):
    """One pair of scores of several students."""

    title: str
    """What the panel shows."""
    horizontal: str
    """Name of the first score."""
    vertical: str
    """Name of the second."""
    points: Mapping[str, Sequence[tuple[float, float]]]
    """A student's latents."""
    unsteered: tuple[float, float] | None = None
    """Where texts lie that are not steered, if that is known."""


def covariance_ellipse(points: Float[np.ndarray, "points two"]) -> Ellipse:
    """Return the ellipse of one standard deviation of these points' sample covariance.

    Raises:
        ValueError: If there are fewer than two points.
    """
    if len(points) < 2:
        raise ValueError(f"An ellipse needs at least two points; got {len(points)}.")
    centre = points.mean(0)
    variances, axes = np.linalg.eigh(np.cov(points, rowvar=False))
    short, long = np.sqrt(variances.clip(min=0))
    return Ellipse(
        centre=(float(centre[0]), float(centre[1])),
        width=2 * float(long),
        height=2 * float(short),
        degrees=math.degrees(math.atan2(float(axes[1, 1]), float(axes[0, 1]))) % 180,
    )


def draw_ellipses(panels: Sequence[Panel], path: Path, *, title: str, subtitle: str) -> None:
    """Write a picture with a panel for each pair of scores."""
    columns = len(panels) if len(panels) <= _MOST_BESIDE else 2
    rows = math.ceil(len(panels) / columns)
    with figure(5.0 * columns, 4.0 * rows, title=title, subtitle=subtitle, legend=True) as drawing:
        grid = list(drawing.subplots(rows, columns, squeeze=False).flat)
        for empty in grid[len(panels) :]:
            empty.remove()
        grid = grid[: len(panels)]
        for panel, axes in zip(panels, grid, strict=True):
            _draw_panel(axes, panel)
        add_legend(drawing, grid)
        content = png(drawing)
    write_bytes_atomically(path, content)


def _draw_panel(axes: "matplotlib.axes.Axes", panel: Panel) -> None:
    from matplotlib.patches import Ellipse as Patch

    axes.set(title=panel.title, xlabel=panel.horizontal, ylabel=panel.vertical)
    axes.grid()
    kinds: list[str] = []
    for student, given in panel.points.items():
        points = np.array([point for point in given if all(map(math.isfinite, point))]).reshape(-1, 2)
        if not len(points):
            continue
        kind = kind_of(student.rpartition("/")[2])
        style, alpha = kind_style(kind), 1.0 if kind not in kinds else 0.5
        kinds.append(kind)
        name = student_name(student)
        axes.plot(*points.T, style.marker, color=style.colour, markersize=3, alpha=0.3 * alpha, markeredgewidth=0)
        axes.plot(*points.mean(0), style.marker, color=style.colour, markersize=8, alpha=alpha, label=name, zorder=4)
        if len(points) > 1:
            found = covariance_ellipse(points)
            patch = Patch(found.centre, found.width, found.height, angle=found.degrees)
            patch.set(facecolor="none", edgecolor=style.colour, linewidth=1.8, alpha=alpha, zorder=3)
            axes.add_patch(patch)
    if panel.unsteered is not None:
        axes.plot(
            *panel.unsteered, "*", color="#1f2328", markersize=10, label="Not steered", zorder=5, linestyle="none"
        )
