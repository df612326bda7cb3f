"""The picture of how often latents fire."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mxd.evaluation.drawing import figure, group_name, kind_of, kind_style, split_student, svg
from mxd.evaluation.expert_use import UseHistogram

if TYPE_CHECKING:
    import matplotlib.axes


class _Bars(NamedTuple):
    """A student's histogram as it is drawn."""

    k: int
    shares: list[float]
    """Share of all latents, bin by bin."""
    histogram: UseHistogram


def use_svgs(use: Mapping[str, UseHistogram]) -> list[str]:
    """Return histograms of firing rates as SVG elements for a page, one a layer and kind, on the same axes.

    Args:
        use: Each student's histogram by its id, with or without its layer in front.
    """
    groups: dict[str, list[_Bars]] = {}
    for student, histogram in use.items():
        group, k = split_student(student)
        latents = sum(histogram.counts) + histogram.dead
        shares = [count / latents for count in histogram.counts]
        groups.setdefault(group, []).append(_Bars(k or 0, shares, histogram))
    highest = max((share for bars in groups.values() for entry in bars for share in entry.shares), default=0.0)
    lowest = min((entry.histogram.edges[0] for bars in groups.values() for entry in bars), default=0.1)
    panels: list[str] = []
    for group, bars in groups.items():
        with figure(3.6, 2.9) as drawing:
            axes = drawing.subplots()
            _draw_panel(axes, group, sorted(bars))
            axes.set_xlim(lowest, 1)
            axes.set_ylim(0, 1.1 * highest or 1)
            panels.append(svg(drawing, f"How many latents of {group} fire on which share of the tokens."))
    return panels


def _draw_panel(axes: "matplotlib.axes.Axes", group: str, bars: Sequence[_Bars]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

    layer, _, student = group.rpartition("/")
    kind = kind_of(student)
    for place, entry in enumerate(bars):
        # Larger Ks are drawn stronger.
        strength = 0.35 + 0.65 * (place + 1) / len(bars)
        axes.stairs(
            entry.shares,
            entry.histogram.edges,
            color=kind_style(kind).colour,
            alpha=strength,
            linewidth=1.4,
            label=f"K = {entry.k}, {entry.histogram.dead} dead",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g}%")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlabel("Tokens on which a latent fires")
    axes.grid(axis="y")
    axes.set_title((f"Layer {layer}: " if layer else "") + group_name(student, kind) + ", share of latents")
    axes.legend(loc="upper left", fontsize=8.5)
