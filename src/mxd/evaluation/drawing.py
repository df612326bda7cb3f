"""What all pictures share: names, colours, sizes, and how a figure becomes a file or a part of a page."""

import io
import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from mxd.evaluation.rows import EvaluationRow
from mxd.quantities import compact

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    from matplotlib.typing import RcKeyType


class KindStyle(NamedTuple):
    """How a kind of layer looks in every picture and table."""

    name: str
    """Its name in sentences."""
    colour: str
    """Told apart with any colour vision (Okabe and Ito, 2008)."""
    marker: str
    """Its point, for readers without colours."""


KIND_STYLES = {
    "mxd": KindStyle("MxD", "#0072b2", "o"),
    "transcoder": KindStyle("Transcoder", "#d55e00", "s"),
    "skip-transcoder": KindStyle("Skip transcoder", "#009e73", "D"),
    "shared-transcoder": KindStyle("Shared transcoder", "#332288", "p"),
    "topk-sae": KindStyle("TopK SAE", "#cc79a7", "^"),
    "low-rank": KindStyle("Low-rank mixture", "#e69f00", "v"),
    "molt": KindStyle("MOLT", "#56b4e9", "P"),
}
INK, MUTED, GRID = "#1f2328", "#667080", "#e3e6ea"
_SETTINGS: "dict[RcKeyType, Any]" = {
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
    "axes.titlepad": 9,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    # Dollar signs in the names of folders are no formulas.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mxd",
}
_HEADER_INCHES = 0.72
_LEGEND_INCHES = 0.32


def kind_style(kind: str) -> KindStyle:
    """Return the style of a kind; one that is not ours is grey and keeps its own name."""
    return KIND_STYLES.get(kind, KindStyle(kind, MUTED, "X"))


def kind_of(student: str) -> str:
    """Return the kind that a student's id names; the whole id where the kind is not ours."""
    return next((kind for kind in KIND_STYLES if re.match(rf"{kind}(-|$)", student)), student)


def split_student(student: str) -> tuple[str, int | None]:
    """Return what a student's id says beside K and the seed, and its K.

    Example:
        >>> split_student("mxd-k16-h64-seed1")
        ('mxd-h64', 16)
    """
    k = re.search(r"-k(\d+)(?=-|$)", student)
    return re.sub(r"-(k|seed)\d+(?=-|$)", "", student), int(k[1]) if k else None


def group_name(group: str, kind: str) -> str:
    """Return the name of the students that differ in K and seed only: their kind and what else their ids name.

    Example:
        >>> group_name("mxd-h64", "mxd")
        'MxD h64'
    """
    setting = group.removeprefix(kind).strip("-").replace("-", " ") if group.startswith(kind) else ""
    return f"{kind_style(kind).name} {setting}".strip()


def student_name(student: str, kind: str | None = None, *, before_k: str = ", K = ") -> str:
    """Return what a student is called for people.

    Args:
        student: Its id, or `<layer>/<id>`.
        kind: Its kind; what the id names where None.
        before_k: Stands between the name and K.

    Example:
        >>> student_name("3/mxd-k16-h64"), student_name("transcoder-k8", before_k=" K ")
        ('MxD h64, K = 16', 'Transcoder K 8')
    """
    own = student.rpartition("/")[2]
    group, k = split_student(own)
    return group_name(group, kind_of(own) if kind is None else kind) + ("" if k is None else f"{before_k}{k}")


def describe(rows: Sequence[EvaluationRow]) -> str:
    """Return in a line the students' parameters and the tokens they were trained and evaluated on."""
    # Those that stand in together are the same students.
    students = [row for row in rows if row.layer is not None] or rows
    sizes = [row.parameters for row in students if row.parameters is not None]
    parts = [f"{_span(sizes)} parameters" + (" each" if len(sizes) > 1 else "")] if sizes else []
    for name, counts in (
        ("trained", [row.tokens_trained for row in students if row.tokens_trained is not None]),
        ("evaluated", [row.tokens_evaluated for row in students]),
    ):
        parts += [f"{name} on {_span(counts)} tokens"] if counts else []
    return " · ".join(parts)


def _span(counts: Sequence[int]) -> str:
    # Parameters are matched by whole experts, so equal up to a per cent or two is what "the same" means.
    low, high = compact(min(counts)), compact(max(counts))
    return high if max(counts) <= 1.02 * min(counts) else f"{low}–{high}"


@contextmanager
def figure(
    width: float, height: float, *, title: str | None = None, subtitle: str = "", legend: bool = False
) -> "Generator[matplotlib.figure.Figure, None, None]":
    """Give a figure with our settings, and room above for a title where there is one.

    Args:
        width: Inches.
        height: Inches, without the title's.
        title: Written at the top left; with None the figure has neither title nor subtitle.
        subtitle: Written below it.
        legend: Leave room for `add_legend` below the subtitle.
    """
    import matplotlib
    from matplotlib.figure import Figure

    total = height + (_HEADER_INCHES if title else 0) + (_LEGEND_INCHES if legend else 0)
    with matplotlib.rc_context(_SETTINGS):
        drawing = Figure(figsize=(width, total))
        drawing.set_layout_engine("constrained", rect=(0, 0, 1, height / total), w_pad=0.1, h_pad=0.08, wspace=0.04)
        if title:
            drawing.text(0.1 / width, 1 - 0.12 / total, title, va="top", size=13, weight="bold")
            drawing.text(0.1 / width, 1 - 0.41 / total, subtitle, va="top", color=MUTED)
        yield drawing


def add_legend(drawing: "matplotlib.figure.Figure", axes: "Sequence[matplotlib.axes.Axes]") -> None:
    """Name the lines of all panels once, below the subtitle; a figure grows by the rows that do not fit into one."""
    named = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    columns, width = max(len(named), 1), drawing.get_figwidth()
    while True:
        legend = drawing.legend(
            list(named.values()),
            list(named),
            loc="upper left",
            ncols=columns,
            borderaxespad=0,
            borderpad=0,
            handlelength=2.4,
            columnspacing=1.6,
        )
        box = legend.get_window_extent()
        if columns == 1 or box.width <= (width - 0.2) * drawing.dpi:
            break
        legend.remove()
        columns -= 1
    rows = math.ceil(len(named) / columns)
    if rows > 1:
        _grow(drawing, box.height / drawing.dpi * (1 - 1 / rows))
    legend.set_bbox_to_anchor((0.1 / width, 1 - 0.69 / drawing.get_figheight()), drawing.transFigure)
    legend.set_in_layout(False)


def _grow(drawing: "matplotlib.figure.Figure", inches: float) -> None:
    """Make a figure of `figure` higher, with the room below its title."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    before, engine = drawing.get_figheight(), drawing.get_layout_engine()
    drawing.set_figheight(before + inches)
    share = before / (before + inches)
    for text in drawing.texts:
        text.set_y(1 - (1 - text.get_position()[1]) * share)
    assert isinstance(engine, ConstrainedLayoutEngine), "figure() chose another layout"
    left, bottom, wide, high = engine.get()["rect"]
    engine.set(rect=(left, bottom, wide, high * share))


def png(drawing: "matplotlib.figure.Figure") -> bytes:
    """Return the figure as a PNG of 160 dots an inch."""
    target = io.BytesIO()
    drawing.savefig(target, format="png", dpi=160, facecolor="white")
    return target.getvalue()


def svg_file(drawing: "matplotlib.figure.Figure") -> bytes:
    """Return the figure as an SVG file, the same for the same figure."""
    target = io.BytesIO()
    drawing.savefig(target, format="svg", facecolor="white", metadata={"Date": None})
    return target.getvalue()


def svg(drawing: "matplotlib.figure.Figure", description: str) -> str:
    """Return the figure as an SVG element for a page, which sets its colours by CSS variables.

    The variables are `--ink`, `--muted`, `--grid` and `--kind-<kind>`; their defaults are the light colours.

    Args:
        drawing: A figure.
        description: What the picture shows, for who does not see it.
    """
    target = io.StringIO()
    drawing.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    raw = target.getvalue()
    body = raw[raw.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # The groups' ids would repeat from picture to picture; nothing refers to them.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = body.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    variables = {f"kind-{kind}": style.colour for kind, style in KIND_STYLES.items()}
    for name, colour in {"ink": INK, "muted": MUTED, "grid": GRID, **variables}.items():
        body = body.replace(colour, f"var(--{name}, {colour})")
    return body
