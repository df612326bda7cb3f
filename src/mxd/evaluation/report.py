"""A run's report: one page that needs nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from mxd.atomic import write_text_atomically
from mxd.evaluation.curves import Curve, curve_svgs
from mxd.evaluation.drawing import KIND_STYLES, describe, kind_style
from mxd.evaluation.expert_use import UseHistogram
from mxd.evaluation.frontier import frontier_svg, has_lines
from mxd.evaluation.grid import (
    HOW_INTERVALS_WERE_MADE,
    METRIC_NAMES,
    FrontierPoint,
    drawn_layers,
    frontier_points,
    layer_name,
)
from mxd.evaluation.histograms import use_svgs
from mxd.evaluation.interactive import frontier_data, frontier_script
from mxd.evaluation.rows import EvaluationRow
from mxd.evaluation.tables import COLUMNS, SCRUTINY_COLUMNS, group_rows

HOW_EXPERTS_WERE_CHOSEN = (
    "Chosen by firing rate alone, without a look at how well they read: of the experts that fired in enough contexts, "
    "ordered from the most to the least frequent and cut into equal groups, the middle one of each."
)
_TOKENS_BEFORE, _TOKENS_AFTER = 28, 14
_EXAMPLES_OPEN = 3
_GLYPHS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "p": "⬟", "X": "✖"}
_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
# Control characters are not allowed in HTML; Unicode has a picture of each.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
"""For `str.translate`: control characters -> pictures of them."""


class ExpertExample(NamedTuple):
    """A context in which an expert fires."""

    tokens: list[str]
    """The context's text, token by token."""
    values: list[float]
    """The expert's value on each token; 0 where it is silent."""
    peak: int
    """Which token it fires on most."""


@dataclass(frozen=True, slots=True)
class ExpertPage:
    """What the report shows of an expert."""

    index: int
    """Its number in the layer."""
    firing_rate: float
    """Share of the tokens on which it fires."""
    max_value: float
    """Its largest value on any token."""
    examples: list[ExpertExample]
    """Its top contexts, the strongest first."""


class _Token(NamedTuple):
    """A token as the page shows it."""

    lines: list[str]
    """Its text, cut at its line breaks."""
    value: str
    """The expert's value, empty where it is silent."""
    strength: float
    """Depth of the shade, from 0 to 1."""
    peak: bool


class _Excerpt(NamedTuple):
    """The tokens of an example that the page shows."""

    tokens: list[_Token]
    value: str
    cut_before: bool
    cut_after: bool


class _Card(NamedTuple):
    """An expert as the page shows it."""

    number: int
    rate: str
    max_value: str
    open: list[_Excerpt]
    folded: list[_Excerpt]


class _LayerPictures(NamedTuple):
    """The panels of one layer."""

    name: str
    panels: list[str]
    legend: list[tuple[str, str, str]]
    """Kind, glyph and name of each line; empty where the points have labels."""


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    rows: Sequence[EvaluationRow],
    curves: Sequence[Curve] = (),
    use: Mapping[str, UseHistogram] | None = None,
    experts: Sequence[ExpertPage] = (),
    experts_of: str = "",
    experts_note: str = HOW_EXPERTS_WERE_CHOSEN,
    notes: Sequence[str] = (),
    footer: str = "",
) -> None:
    """Write a report as one HTML file that needs no other and no network, whole or not at all.

    Its one script lets a reader choose what the frontier shows; without scripts the frontier is a picture.
    Sections for which there is nothing to show are left out.

    Args:
        path: The file; its folder must exist.
        title: Heading of the page.
        facts: What a reader must know to repeat it, by name: model, layer, data, tokens, hardware, date.
        rows: The tables and the picture of faithfulness against sparsity.
        curves: The picture of training.
        use: The picture of how often latents fire, by the student's id.
        experts: A card each.
        experts_of: Id of the student whose experts these are.
        experts_note: How these experts were chosen.
        notes: Sentences below the table: what does not hold, or must be known to read it.
        footer: The page's last line, such as the version and the command.
    """
    points = frontier_points(rows)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(files("mxd").joinpath("evaluation/report.html.jinja").read_text("utf-8"))
    page = template.render(
        title=title,
        facts=facts,
        summary=describe(rows),
        columns=COLUMNS,
        groups=group_rows(rows),
        scrutiny_columns=SCRUTINY_COLUMNS,
        scrutiny_groups=group_rows(rows, SCRUTINY_COLUMNS),
        several_layers=len({row.layer for row in rows}) > 1,
        notes=notes,
        pictures=_pictures(points),
        frontier_data=frontier_data(points),
        frontier_script=frontier_script(),
        intervals_note=HOW_INTERVALS_WERE_MADE,
        layer_name=layer_name,
        curves=curve_svgs(curves) if curves else [],
        use=use_svgs(use) if use else [],
        cards=[_card(expert) for expert in experts],
        experts_heading=_experts_heading(len(experts), experts_of),
        experts_note=experts_note,
        colours={kind: style.colour for kind, style in KIND_STYLES.items()},
        footer=footer,
    )
    write_text_atomically(path, page)


def _experts_heading(count: int, student: str) -> str:
    number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    return f"{number} expert{'' if count == 1 else 's'}" + (f" of {student}" if student else "")


def _pictures(points: Sequence[FrontierPoint]) -> list[_LayerPictures]:
    pictures: list[_LayerPictures] = []
    for layer in drawn_layers(points):
        kinds = dict.fromkeys(point.kind for point in points if point.layer == layer)
        styles = {kind: kind_style(kind) for kind in kinds if has_lines(points, layer)}
        legend = [(kind, _GLYPHS[style.marker], style.name) for kind, style in styles.items()]
        panels = [frontier_svg(points, layer, metric) for metric in METRIC_NAMES]
        pictures.append(_LayerPictures(layer_name(layer), panels, legend))
    return pictures


def _card(expert: ExpertPage) -> _Card:
    excerpts = [_excerpt(example, expert.max_value) for example in expert.examples]
    rate = f"{100 * expert.firing_rate:.2g}%"
    return _Card(expert.index, rate, _value(expert.max_value), excerpts[:_EXAMPLES_OPEN], excerpts[_EXAMPLES_OPEN:])


def _excerpt(example: ExpertExample, max_value: float) -> _Excerpt:
    start, stop = max(example.peak - _TOKENS_BEFORE, 0), example.peak + _TOKENS_AFTER + 1
    shown = list(enumerate(zip(example.tokens, example.values, strict=True)))[start:stop]
    tokens = [
        _Token(
            text.replace("\r\n", "\n").translate(VISIBLE).split("\n"),
            _value(value) if value > 0 else "",
            min(max(value / max_value, 0.0), 1.0) if max_value > 0 else 0.0,
            place == example.peak,
        )
        for place, (text, value) in shown
    ]
    return _Excerpt(tokens, _value(example.values[example.peak]), start > 0, stop < len(example.tokens))


def _value(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
