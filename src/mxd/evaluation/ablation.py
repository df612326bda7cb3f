"""The pictures of ablations: what one setting changes while the others stay as they are."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal, NamedTuple

from mxd.atomic import write_bytes_atomically
from mxd.evaluation.drawing import GRID, KindStyle, add_legend, describe, figure, kind_style, png
from mxd.evaluation.rows import EvaluationRow
from mxd.layers import L1

if TYPE_CHECKING:
    import matplotlib.axes

Scalar = str | int | float | bool | None


class Setting(NamedTuple):
    """A setting that students may differ in."""

    option: str
    """Its option of `mxd train`."""
    field: str
    """The field of a row that has its value; null where a kind does not read it."""
    label: str
    """What stands below the axis."""
    axis: Literal["number", "name", "l0"]
    """What x is: the setting's number, its name, or, where it changes how many latents are active, that number."""
    moves: frozenset[str] = frozenset()
    """Fields that may change with it."""


_L0 = "Active latents per token, mean"
SETTINGS = (
    Setting("hidden", "d_hidden", "Dense hidden units", "number"),
    Setting("activation", "activation", "Activation of the dense encoder", "name"),
    Setting("encoder", "encoder", "Dense encoder", "name"),
    Setting("rank", "rank", "Largest rank of a latent's map", "number"),
    Setting("normalize-experts", "normalize_experts", "Rows of latents kept at unit length", "name"),
    Setting("shared-expert", "shared_expert", "An expert that is always active", "name"),
    Setting("selection", "selection", _L0, "l0", frozenset({"k", "k_trained", "l1_coefficient", "random_k"})),
    Setting("random-k", "random_k", _L0, "l0"),
    Setting("init", "init", "Where weights begin", "name"),
    Setting("shared-penalty", "shared_penalty", "Charge for the shared expert's variance", "number"),
    Setting("num-latents", "num_latents", "Number of latents", "number"),
)
"""Settings in the order of their pictures. The number of latents comes last: where parameters are matched it follows
from the others, and is drawn only where it changes alone."""

METRICS: dict[str, str] = {
    "ce_increase": "Cross-entropy increase (nats/token)",
    "fvu": "Fraction of variance unexplained",
    "specialisation": "Specialisation",
}
_LINE_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DODGE = 0.09
"""Distance of neighbouring series at one name, of which the next is 1 away."""


class _Series(NamedTuple):
    """The students that differ in the setting and the seed only."""

    name: str
    style: KindStyle
    variant: int
    """Its number among the series of its kind."""
    rows: list[EvaluationRow]


class _Point(NamedTuple):
    """What the seeds of one student came to."""

    x: float
    low: float
    mean: float
    high: float


def ablated_settings(rows: Sequence[EvaluationRow]) -> list[Setting]:
    """Return the settings in which students of one layer, kind and seed differ while the others agree."""
    students = [row for row in rows if row.layer is not None]
    return [setting for setting in SETTINGS if _differs(setting, students)]


def draw_ablations(rows: Sequence[EvaluationRow], folder: Path) -> list[Path]:
    """Write `ablation-<option>.png` for each setting that a run's students differ in; return what was written.

    Each metric is a panel and each layer a row of them. A kind that does not read the setting is a level line. A point
    is the mean over seeds, and its bar reaches from the smallest to the largest. What is not finite is left out.
    """
    settings = ablated_settings(rows)
    students = [row for row in rows if row.layer is not None]
    paths: list[Path] = []
    for setting in settings:
        others = [other for other in settings if other is not setting]
        paths.append(folder / f"ablation-{setting.option}.png")
        write_bytes_atomically(paths[-1], _picture(setting, others, students))
    return paths


def _differs(setting: Setting, rows: Sequence[EvaluationRow]) -> bool:
    same = {"layer", "kind", "seed", "k", "k_trained", "l1_coefficient"} | {other.field for other in SETTINGS}
    same -= {setting.field, "num_latents"} | setting.moves
    found: dict[tuple[Scalar, ...], set[Scalar]] = {}
    for row in rows:
        found.setdefault(_values(row, sorted(same)), set()).add(getattr(row, setting.field))
    return any(len(values - {None}) > 1 for values in found.values())


def _values(row: EvaluationRow, fields: Iterable[str]) -> tuple[Scalar, ...]:
    return tuple(getattr(row, field) for field in fields)


def _picture(setting: Setting, others: Sequence[Setting], rows: Sequence[EvaluationRow]) -> bytes:
    layers = sorted({row.layer for row in rows if row.layer is not None})
    readers = [row for row in rows if getattr(row, setting.field) is not None]
    metrics = [metric for metric in METRICS if any(_number(row, metric) is not None for row in readers)]
    seeds = len({row.seed for row in rows})
    subtitle = describe(rows) + (f" · bars: smallest and largest of {seeds} seeds" if seeds > 1 else "")
    title = f"Ablation of --{setting.option}"
    with figure(4.3 * len(metrics), 3.3 * len(layers), title=title, subtitle=subtitle, legend=True) as drawing:
        grid = drawing.subplots(len(layers), len(metrics), squeeze=False)
        for layer, panels in zip(layers, grid, strict=True):
            series = _series(setting, others, [row for row in rows if row.layer == layer])
            for metric, axes in zip(metrics, panels, strict=True):
                _draw_panel(axes, setting, series, metric)
                axes.set_title((f"Layer {layer}: " if len(layers) > 1 else "") + METRICS[metric])
        add_legend(drawing, list(grid.flat))
        return png(drawing)


def _series(setting: Setting, others: Sequence[Setting], rows: Sequence[EvaluationRow]) -> list[_Series]:
    """Return the lines of one layer: by kind, by further settings, and by K where that is not what x shows."""
    along_l0 = setting.axis == "l0"
    apart = [*others, *([setting] if along_l0 else [])]
    elsewhere = any(not row.as_trained for row in rows)
    k_field = ("k_trained" if elsewhere else None) if along_l0 else "k"
    if k_field is not None and len({getattr(row, k_field) for row in rows}) == 1:
        k_field = None
    # Along l0 the coefficient is what moves a student; elsewhere it is another setting of its own.
    coefficient = None if along_l0 else "l1_coefficient"
    found: dict[tuple[Scalar, ...], _Series] = {}
    of_kind: dict[str, int] = {}
    for row in rows:
        further = [field for field in (coefficient, k_field) if field is not None]
        key = (row.kind, *_values(row, [*(other.field for other in apart), *further]))
        if key not in found:
            variant = of_kind.setdefault(row.kind, 0)
            of_kind[row.kind] += 1
            words = [kind_style(row.kind).name, *filter(None, (_word(other, row) for other in apart))]
            if row.selection == L1.name:
                words += [] if along_l0 else [f"coefficient {row.l1_coefficient}"]
            elif k_field is not None:
                words.append(f"K = {getattr(row, k_field)}")
            found[key] = _Series(", ".join(words), kind_style(row.kind), variant, [])
        found[key].rows.append(row)
    return list(found.values())


def _word(setting: Setting, row: EvaluationRow) -> str:
    """Return how a legend names a row's value of a setting."""
    value = getattr(row, setting.field)
    words: dict[tuple[str, Scalar], str] = {
        ("normalize_experts", True): "unit rows",
        ("normalize_experts", False): "free rows",
        ("shared_expert", True): "shared expert",
        ("shared_expert", False): "no shared expert",
        ("random_k", True): "random K",
        ("random_k", False): "fixed K",
    }
    name = f"{setting.option} {value}" if setting.axis == "number" else str(value)
    return "" if value is None else words.get((setting.field, value), name)


def _draw_panel(axes: "matplotlib.axes.Axes", setting: Setting, series: Sequence[_Series], metric: str) -> None:
    names = list(dict.fromkeys(getattr(row, setting.field) for entry in series for row in entry.rows))
    names = [name for name in names if name is not None]
    lines = [
        entry
        for entry in series
        if setting.axis == "l0" or any(getattr(row, setting.field) is not None for row in entry.rows)
    ]
    seen: list[float] = []
    for entry in series:
        place = (lines.index(entry) - (len(lines) - 1) / 2) * _DODGE if entry in lines else 0.0
        points = _points(entry, metric, setting, names, place)
        seen += [value for point in points for value in (point.low, point.high)]
        if entry in lines:
            _draw_line(axes, entry, points, joined=setting.axis != "name")
        elif points:
            axes.axhline(points[0].mean, color=entry.style.colour, ls=_line_style(entry), lw=0.9, label=entry.name)
    if setting.axis == "name":
        axes.set_xticks(range(len(names)), [str(name) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    else:
        _set_number_axis(axes, [float(name) for name in names] if setting.axis == "number" else None)
    axes.set_xlabel(setting.label)
    axes.grid(axis="y", color=GRID)
    _set_value_axis(axes, seen)


def _points(entry: _Series, metric: str, setting: Setting, names: Sequence[Scalar], place: float) -> list[_Point]:
    """Return the mean and span over seeds at each x, in its order."""
    at: dict[str, Callable[[EvaluationRow], Scalar]] = {
        "number": lambda row: getattr(row, setting.field),
        "name": lambda row: getattr(row, setting.field),
        # Seeds of one student come to different l0; what they share is what was asked for.
        "l0": lambda row: f"{row.k} {row.l1_coefficient} {row.num_latents}",
    }
    groups: dict[Scalar, list[EvaluationRow]] = {}
    for row in entry.rows:
        if _number(row, metric) is not None:
            groups.setdefault(at[setting.axis](row), []).append(row)
    points: list[_Point] = []
    for key, members in groups.items():
        values = [value for row in members if (value := _number(row, metric)) is not None]
        x = fmean(row.l0 or 0.0 for row in members) if setting.axis == "l0" else 0.0
        if setting.axis == "number" and isinstance(key, int | float):
            x = float(key)
        if setting.axis == "name" and key is not None:
            x = names.index(key) + place
        points.append(_Point(x, min(values), fmean(values), max(values)))
    return sorted(points)


def _line_style(entry: _Series) -> str:
    """Series of one kind share its colour: they differ in marker and line."""
    return _LINE_STYLES[entry.variant % len(_LINE_STYLES)]


def _draw_line(axes: "matplotlib.axes.Axes", entry: _Series, points: Sequence[_Point], *, joined: bool) -> None:
    below, above = ([point.mean - point.low for point in points], [point.high - point.mean for point in points])
    axes.errorbar(
        [point.x for point in points],
        [point.mean for point in points],
        yerr=[below, above] if any(below) or any(above) else None,
        color=entry.style.colour,
        marker=_MARKERS[entry.variant % len(_MARKERS)],
        alpha=1.0 if entry.variant < len(_LINE_STYLES) else 0.6,
        linestyle=_line_style(entry) if joined else "none",
        markersize=5.5,
        linewidth=1.6,
        elinewidth=1.1,
        capsize=2.5,
        label=entry.name,
    )


def _set_number_axis(axes: "matplotlib.axes.Axes", values: Sequence[float] | None) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    positive = [value for value in values or () if value > 0]
    if values is not None and len(positive) < len(values):
        axes.set_xscale("symlog", base=2, linthresh=min(positive, default=1.0))
    else:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2) if values is None else FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e4 else f"{value / 1024:g}k")


def _set_value_axis(axes: "matplotlib.axes.Axes", values: Sequence[float]) -> None:
    """Make the axis logarithmic where values span more than a factor of ten, and otherwise begin it at 0."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(values, default=0.0), max(values, default=0.0)
    if 0 < 10 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif low >= 0 < high:
        axes.set_ylim(0, 1.1 * high)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))


def _number(row: EvaluationRow, metric: str) -> float | None:
    value = getattr(row, metric)
    return value if value is not None and math.isfinite(value) else None
