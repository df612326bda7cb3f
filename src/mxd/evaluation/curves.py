"""The picture of how students learnt."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, cast

from mxd.atomic import JSON
from mxd.evaluation.drawing import INK, figure, group_name, kind_of, kind_style, split_student, svg
from mxd.quantities import compact

if TYPE_CHECKING:
    import matplotlib.axes

_MOST_POINTS = 200


class Curve(NamedTuple):
    """A student's fraction of variance unexplained, batch by batch."""

    student: str
    """The student's id in `metrics.jsonl`, with or without its layer in front."""
    tokens: list[float]
    """Tokens seen so far."""
    fvu: list[float]
    """Of the batches up to there; positive."""


def read_curves(records: Sequence[Mapping[str, JSON]]) -> list[Curve]:
    """Return the students' curves from the records of `metrics.jsonl`.

    Of a long run each point is the mean of neighbouring records, so that a curve has at most 200 points.
    Values that are missing, not finite or not positive (a log axis cannot hold them) are left out.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        tokens, students = record.get("tokens"), record.get("students")
        if isinstance(tokens, int | float) and isinstance(students, Mapping):
            for student, values in cast("Mapping[str, Mapping[str, JSON]]", students).items():
                fvu = values.get("fvu")
                if isinstance(fvu, int | float) and 0 < fvu < float("inf"):
                    found.setdefault(student, []).append((float(tokens), float(fvu)))
    return [_curve(student, points) for student, points in found.items()]


def _curve(student: str, points: Sequence[tuple[float, float]]) -> Curve:
    size = -(-len(points) // _MOST_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    means = [[sum(column) / len(column) for column in zip(*members, strict=True)] for members in bins]
    return Curve(student, [mean[0] for mean in means], [mean[1] for mean in means])


def curve_svgs(curves: Sequence[Curve]) -> list[str]:
    """Return fvu against tokens as SVG elements for a page, one panel a kind of student.

    Raises:
        ValueError: If there is no curve.
    """
    panels: list[str] = []
    for group, members in _groups(curves).items():
        with figure(3.6, 2.9) as drawing:
            _draw_panel(drawing.subplots(), group, members, curves)
            panels.append(svg(drawing, f"Fraction of variance unexplained of {group} against tokens seen."))
    return panels


def _groups(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(split_student(curve.student)[0], []).append(curve)
    if not groups:
        raise ValueError("There must be a curve to draw; got none.")
    return groups


def _draw_panel(
    axes: "matplotlib.axes.Axes", group: str, members: Sequence[Curve], everything: Sequence[Curve]
) -> None:
    """Draw one kind; all panels have the same axes, so that kinds can be compared."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    layer, _, student = group.rpartition("/")
    kind = kind_of(student)
    ordered = sorted(members, key=lambda curve: split_student(curve.student)[1] or 0)
    for place, curve in enumerate(ordered):
        # Larger Ks are drawn stronger.
        strength = 0.35 + 0.65 * (place + 1) / len(ordered)
        axes.plot(curve.tokens, curve.fvu, color=kind_style(kind).colour, alpha=strength, linewidth=1.4)
    low, high = (pick(value for curve in everything for value in curve.fvu) for pick in (min, max))
    axes.set_yscale("log")
    axes.set_ylim(low / 1.2, high * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlim(0, max(curve.tokens[-1] for curve in everything))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda tokens, _: compact(tokens))
    axes.set_xlabel("Tokens seen")
    axes.grid(axis="y")
    axes.set_title((f"Layer {layer}: " if layer else "") + group_name(student, kind) + ", fvu")
    _label_ends(axes, ordered)


def _label_ends(axes: "matplotlib.axes.Axes", curves: Sequence[Curve]) -> None:
    """Write each curve's K at its end, moved up where it would stand on the one below."""
    smallest_gap = 0.058
    low, high = (math.log(limit) for limit in axes.get_ylim())
    below = -1.0
    # The last value alone would let noise put the labels out of order.
    for end, curve in sorted((median(curve.fvu[-9:]), curve) for curve in curves):
        below = max((math.log(end) - low) / (high - low), below + smallest_gap)
        k = split_student(curve.student)[1]
        axes.annotate(
            "" if k is None else f"K={k}",
            (1.02, below),
            xycoords="axes fraction",
            va="center",
            size=8,
            color=INK,
            annotation_clip=False,
        )
