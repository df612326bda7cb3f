"""Pictures of a run: faithfulness against sparsity, and the training curves."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

from mxd.evaluation.rows import TOGETHER, EvaluationRow
from mxd.runs.atomic import JSON, write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metric: TypeAlias = Literal["ce_increase", "nmse", "fvu", "kl"]


class KindStyle(NamedTuple):
    """How a kind of layer looks in every picture and table."""

    name: str
    """Its name in sentences."""
    colour: str
    """Told apart by readers with any colour vision (Okabe and Ito, 2008)."""
    marker: str
    """Its point, for readers without colours."""


KIND_STYLES = {
    "mxd": KindStyle("MxD", "#0072b2", "o"),
    "transcoder": KindStyle("Transcoder", "#d55e00", "s"),
    "skip-transcoder": KindStyle("Skip transcoder", "#009e73", "D"),
    "topk-sae": KindStyle("TopK SAE", "#cc79a7", "^"),
    "low-rank": KindStyle("Low-rank mixture", "#e69f00", "v"),
    "molt": KindStyle("MOLT", "#56b4e9", "P"),
}
INK, MUTED, GRID = "#1f2328", "#667080", "#e3e6ea"
_METRIC_NAMES: dict[Metric, str] = {
    "ce_increase": "Cross-entropy increase (nats/token)",
    "nmse": "Normalised squared error",
    "fvu": "Fraction of variance unexplained",
    "kl": "KL divergence (nats/token)",
}
_STYLE: dict[str, object] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
_CURVE_POINTS = 200


def kind_style(kind: str) -> KindStyle:
    """Return the style of a kind; one that is not ours is grey and keeps its own name."""
    return KIND_STYLES.get(kind, KindStyle(kind, MUTED, "X"))


def split_student(student: str) -> tuple[str, int | None]:
    """Return what a student's id says beside K and the seed, and its K.

    Example:
        >>> split_student("mxd-k16-h64-seed1")
        ('mxd-h64', 16)
    """
    k = re.search(r"-k(\d+)(?=-|$)", student)
    return re.sub(r"-(k|seed)\d+(?=-|$)", "", student), int(k[1]) if k else None


def series_name(row: EvaluationRow) -> str:
    """Return the name of the line a row belongs to: its kind, and the settings its id names beside K and seed."""
    group, _ = split_student(row.id)
    setting = group.removeprefix(row.kind).strip("-").replace("-", " ")
    name = "All layers together" if row.kind == TOGETHER else kind_style(row.kind).name
    return f"{name} {setting}".strip() if row.id.startswith(row.kind) and row.kind != TOGETHER else name


def compact(count: float) -> str:
    """Return a count as people say it.

    Example:
        >>> compact(37_751_808), compact(480e6), compact(0)
        ('37.8M', '480M', '0')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
    return f"{count:g}"


def describe(rows: Sequence[EvaluationRow]) -> str:
    """Return in a line what the rows have in common: parameters, tokens trained, tokens evaluated."""
    parts: list[str] = []
    sizes = [row.parameters for row in rows if row.parameters is not None and row.kind != TOGETHER]
    if sizes and max(sizes) <= 1.02 * min(sizes):
        parts.append(f"{compact(max(sizes))} parameters" + (" each" if len(sizes) > 1 else ""))
    elif sizes:
        parts.append(f"{compact(min(sizes))} to {compact(max(sizes))} parameters")
    for name, counts in (
        ("trained on", [row.tokens_trained for row in rows if row.tokens_trained is not None]),
        ("evaluated on", [row.tokens_evaluated for row in rows]),
    ):
        if counts:
            span = compact(min(counts)) + ("" if min(counts) == max(counts) else f" to {compact(max(counts))}")
            parts.append(f"{name} {span} tokens")
    return " · ".join(parts)


def draw_frontier(
    rows: Sequence[EvaluationRow],
    path: Path,
    *,
    metrics: Sequence[Metric] = ("ce_increase", "nmse"),
    title: str = "Faithfulness against sparsity",
) -> None:
    """Write the picture of metrics against K as a PNG, whole or not at all.

    There is one row of panels a layer and one panel a metric. With three Ks or more each kind is a line over
    a logarithmic K (the mean over seeds, each seed a small point); with fewer, each student is a labelled point.

    Raises:
        ValueError: If no row belongs to a single layer, so that there is nothing to draw.
    """
    write_bytes_atomically(path, _render(lambda: _frontier(rows, metrics, title), "png"))


def frontier_svg(rows: Sequence[EvaluationRow], *, metrics: Sequence[Metric] = ("ce_increase", "nmse")) -> str:
    """Return the picture as an SVG element to put into a page, without a title.

    Its colours are CSS variables (`--ink`, `--muted`, `--grid`, `--kind-<kind>`) with the light theme's as default.

    Raises:
        ValueError: If no row belongs to a single layer, so that there is nothing to draw.
    """
    return _inline(_render(lambda: _frontier(rows, metrics, None), "svg"))
