"""Dot plots of how well single features tell concepts, kind against kind."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mxd.atomic import write_bytes_atomically
from mxd.evaluation.drawing import INK, MUTED, add_legend, figure, kind_style, png
from mxd.printable import printable
from mxd.probing.collecting import HIDDEN, RESIDUAL
from mxd.probing.results import CHANCE, ProbeRow, Probing, SetResult, number_of_classes
from mxd.probing.tables import features_name
from mxd.probing.token_codes import TOKEN_IDENTITY

if TYPE_CHECKING:
    import matplotlib.axes

ROW_INCHES = 0.36
MOST_CLASSES = 100
"""Classes that are drawn, of each set those with the most examples: a picture has a largest size."""
LONGEST_LABEL = 48
"""Characters of a class's name."""
LONGEST_NAME = 60
"""Characters of a set's name that a file's name has: file systems take 255 bytes."""
SPREAD = 0.62
"""Share of a row's height over which its dots are spread."""
_BASELINES = {HIDDEN: "o", RESIDUAL: "s", TOKEN_IDENTITY: "x"}


class _Line(NamedTuple):
    label: str
    rows: Sequence[ProbeRow]
    classes: int = 1
    """More than one where it is their mean."""


def draw_probing(probing: Probing, folder: Path) -> list[Path]:
    """Draw the best single feature of each class and kind: one picture of texts, one of each set of documents.

    Returns:
        The files: `probing-texts.png` and `probing-<data>.png`.
    """
    drawn: list[Path] = []
    taken = {"texts"}
    if probing.texts:
        what = f"{sum(result.parts[2] for result in probing.texts):,} test texts"
        drawn.append(_draw(probing.texts, folder / "probing-texts.png", "Which latents tell what a text is", what))
    for result in probing.tokens:
        slug = _file_name(result.data, taken)
        title = "Which single latents name a concept"
        what = f"{_label(result.data)}, {result.parts[2]:,} test tokens"
        drawn.append(_draw([result], folder / f"probing-{slug}.png", title, what))
    return drawn


def _file_name(data: str, taken: set[str]) -> str:
    """Return a name for a file that no other set has, on no file system, and add it to those taken."""
    slug = first = re.sub(r"[^\w.-]+", "-", data)[:LONGEST_NAME].strip("-.") or "documents"
    number = 1
    while slug.casefold() in taken:
        number += 1
        slug = f"{first}-{number}"
    taken.add(slug.casefold())
    return slug


def _draw(results: Sequence[SetResult], path: Path, title: str, what: str) -> Path:
    layers = sorted({row.layer for result in results for row in result.rows if row.layer is not None})
    lines = _lines(results)
    left_out = sum(len(result.examples) for result in results) - len(lines) + 1
    what += f" · {left_out:,} classes with fewer examples are not drawn" if left_out else ""
    subtitle = f"F1 on the test part of the best single feature, 95 % intervals · {what}".rstrip(" ·")
    with figure(
        max(8.6, 4.6 * len(layers) + 1.6), ROW_INCHES * len(lines) + 0.6, title=title, subtitle=subtitle, legend=True
    ) as drawing:
        panels = drawing.subplots(1, len(layers), sharey=True, squeeze=False)[0]
        for panel, layer in zip(panels, layers, strict=True):
            _draw_panel(panel, lines, layer)
            if len(layers) > 1:
                panel.set_title(f"Layer {layer}")
        add_legend(drawing, list(panels))
        write_bytes_atomically(path, png(drawing))
    return path


def _lines(results: Sequence[SetResult]) -> list[_Line]:
    """Return the rows of the picture, from the bottom: classes by how well they are told, and their mean on top."""
    lines = [
        _Line(_label(concept if len(results) == 1 else f"{result.data}: {concept}"), _single(result, concept))
        for result in results
        for concept in _most_frequent(result, max(1, MOST_CLASSES // len(results)))
    ]
    if len(results) == 1:
        lines.sort(key=lambda line: max((row.quality.f1 for row in line.rows if row.features != CHANCE), default=0.0))
    else:
        lines.reverse()
    rows = [row for result in results for concept in result.examples for row in _single(result, concept)]
    return [*lines, _Line("mean", rows, sum(len(result.examples) for result in results))]


def _most_frequent(result: SetResult, count: int) -> list[str]:
    frequent = set(sorted(result.examples, key=lambda concept: -result.examples[concept])[:count])
    return [concept for concept in result.examples if concept in frequent]


def _label(text: str) -> str:
    label = printable(text)
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


def _single(result: SetResult, concept: str) -> list[ProbeRow]:
    return [row for row in result.rows if row.concept == concept and (row.k == 1 or row.features == CHANCE)]


def _draw_panel(panel: "matplotlib.axes.Axes", lines: Sequence[_Line], layer: int) -> None:
    names = list(dict.fromkeys(row.features for line in lines for row in line.rows if row.layer in (layer, None)))
    kinds = {row.features: row.kind for line in lines for row in line.rows}
    largest = {
        kind: max(_k_of(name) for name in names if kinds[name] == kind) for kind in {kinds[name] for name in names}
    }
    shown = [name for name in names if name != CHANCE]
    for place, name in enumerate(shown):
        offset = SPREAD * (0.5 - place / max(len(shown) - 1, 1))
        _draw_series(panel, lines, name, kinds[name], offset, filled=_k_of(name) == largest[kinds[name]])
    for height, line in enumerate(lines):
        found = [row.quality.f1 for row in line.rows if row.features == CHANCE]
        if found:
            x = sum(found) / len(found)
            label = "always yes" if height == 0 else None
            panel.plot([x, x], [height - 0.36, height + 0.36], color=MUTED, lw=1.2, label=label, solid_capstyle="butt")
    panel.axhline(len(lines) - 1.5, color=INK, lw=0.7)
    panel.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(lines) - 0.4), xlabel="F1")
    panel.set_yticks(range(len(lines)), [line.label for line in lines])
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="both")


def _draw_series(
    panel: "matplotlib.axes.Axes", lines: Sequence[_Line], name: str, kind: str, offset: float, *, filled: bool
) -> None:
    is_baseline = kind in _BASELINES
    style = kind_style(kind)
    colour, marker = (MUTED, _BASELINES[kind]) if is_baseline else (style.colour, style.marker)
    xs: list[float] = []
    ys: list[float] = []
    for height, line in enumerate(lines):
        rows = [row for row in line.rows if row.features == name]
        if not rows:
            continue
        # A class that no feature tells has no row, and counts as 0.
        xs.append(sum(row.quality.f1 for row in rows) / number_of_classes(name, rows, line.classes))
        ys.append(height + offset)
        interval = rows[0].quality.f1_interval if line is not lines[-1] else None
        if interval is not None and not is_baseline:
            panel.plot(interval, [height + offset] * 2, color=colour, lw=0.9, alpha=0.55, solid_capstyle="butt")
    face = colour if filled and not is_baseline else "white"
    panel.plot(
        xs,
        ys,
        linestyle="none",
        marker=marker,
        markersize=4.7,
        markerfacecolor=face,
        markeredgecolor=colour,
        label=features_name(name, kind, with_layer=False),
        zorder=3,
    )


def _k_of(name: str) -> int:
    found = re.search(r"-k(\d+)", name)
    return int(found[1]) if found else 0
