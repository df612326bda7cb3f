"""What uncertainty costs: accuracy against confidence distance over θ, and which points nothing beats."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mxd.atomic import write_bytes_atomically, write_json_atomically
from mxd.evaluation.drawing import INK, KIND_STYLES, MUTED, figure, png, svg

if TYPE_CHECKING:
    import matplotlib.axes

_LINE, _START = KIND_STYLES["mxd"].colour, KIND_STYLES["transcoder"].colour


class FrontPoint(NamedTuple):
    """A model of a sweep."""

    theta: float | None
    """θ; None for the model as it was given."""
    confidence_distance: float
    """On the protected examples."""
    accuracy: float
    """On test examples, or where there are none on validation examples."""


class Front(NamedTuple):
    """All models of a sweep, and where their accuracy was measured."""

    points: tuple[FrontPoint, ...]
    """In the order of θ, the model as given first."""
    measured_on: str
    """`test` or `validation`."""


def pareto_optimal(points: Sequence[FrontPoint]) -> list[bool]:
    """Of each point, whether no other is at least as good in both and better in one."""

    def beats(one: FrontPoint, other: FrontPoint) -> bool:
        at_least = one.confidence_distance <= other.confidence_distance and one.accuracy >= other.accuracy
        return at_least and one[1:] != other[1:]

    return [not any(beats(one, other) for one in points) for other in points]


def write_front(front: Front, folder: Path) -> list[str]:
    """Write `front.json` and `front.png`, and return their names."""
    optimal = pareto_optimal(front.points)
    rows = [point._asdict() | {"pareto_optimal": best} for point, best in zip(front.points, optimal, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(folder / "front.json", {"measured_on": front.measured_on, "points": rows})
    write_bytes_atomically(folder / "front.png", front_png(front))
    return ["front.json", "front.png"]


def front_png(front: Front) -> bytes:
    """The picture as a PNG."""
    subtitle = "Down and to the left is better; a hollow point is beaten by another"
    with figure(6.2, 3.9, title="What uncertainty costs", subtitle=subtitle) as drawing:
        draw_front(drawing.subplots(), front)
        return png(drawing)


def front_svg(front: Front) -> str:
    """The picture as an SVG element for a page."""
    with figure(5.4, 3.4) as drawing:
        draw_front(drawing.subplots(), front)
        return svg(drawing, "Error against confidence distance on protected examples, by theta.")


def draw_front(axes: "matplotlib.axes.Axes", front: Front) -> None:
    """Draw the front into a panel, error against distance on logarithmic axes; points that another beats are hollow."""
    from matplotlib.ticker import NullFormatter

    optimal = pareto_optimal(front.points)
    best = sorted((point for point, is_best in zip(front.points, optimal, strict=True) if is_best), key=_place)
    axes.plot(*zip(*map(_place, best), strict=True), color=_LINE, linewidth=1.3, alpha=0.6, zorder=2)
    for place, (point, is_best) in enumerate(zip(front.points, optimal, strict=True)):
        colour = _START if point.theta is None else _LINE
        axes.plot(
            *_place(point),
            marker="s" if point.theta is None else "o",
            markersize=6.5,
            color=colour,
            markerfacecolor=colour if is_best else "none",
            linestyle="none",
            zorder=3,
        )
        axes.annotate(
            "as given" if point.theta is None else f"θ = {point.theta:g}",
            _place(point),
            # Alternately above and below: points of neighbouring θ often stand close together.
            xytext=(6, 7 if place % 2 or not is_best else -14),
            textcoords="offset points",
            color=INK if is_best else MUTED,
            size=8.5,
        )
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.2, y=0.2)
    axes.grid()
    axes.set_xlabel("Mean confidence distance on protected examples")
    axes.set_title(f"Error on {front.measured_on} examples, %")


def _place(point: FrontPoint) -> tuple[float, float]:
    """Distance and error in per cent, at least what a logarithmic axis can show."""
    return max(point.confidence_distance, 1e-4), max(100 * (1 - point.accuracy), 0.01)
