"""The table of results: one definition of its columns, for the terminal, Markdown and the report."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from mxd.evaluation.drawing import describe, group_name, split_student
from mxd.evaluation.grid import layer_name
from mxd.evaluation.rows import TOGETHER, EvaluationRow
from mxd.quantities import compact, counted


class Column(NamedTuple):
    """A column of numbers."""

    field: str
    """The field of `EvaluationRow`."""
    heading: str
    """Short, for the head of the table."""
    short: str
    """Shorter still, for a terminal."""
    meaning: str
    """What the number is, with its unit and which way is better."""
    write: Callable[[int | float], str]
    """The number as text."""
    better: Literal["lower", "higher"] | None
    """Which way is better; None for a number that is no score."""
    place: int | None = None
    """Which entry, of a field that holds several."""


class Cell(NamedTuple):
    """A number of the table."""

    text: str
    """As it is shown."""
    best: bool
    """Whether no other student of the same layer and K is better, and one is worse."""


class TableLine(NamedTuple):
    """A student's line."""

    name: str
    """Its kind and what else its id names beside K."""
    kind: str
    """Its kind, for the colour."""
    cells: list[Cell]
    """One for each column."""


class TableGroup(NamedTuple):
    """The students that compare: those of one layer with the same K."""

    layer: int | None
    """The layer; None for all layers together."""
    lines: list[TableLine]
    """In the order of the rows."""


def _fraction(value: int | float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _signed(value: int | float) -> str:
    return f"{value:+.4f}" if round(abs(value), 4) or not value else f"{value:+.0e}"


def _percent(value: int | float) -> str:
    return f"{100 * value:.1f}%"


def _finer_percent(value: int | float) -> str:
    return f"{100 * value:.2f}%"


def _mean(value: int | float) -> str:
    return f"{value:.1f}"


def _whole(value: int | float) -> str:
    return f"{value:g}"


COLUMNS = (
    Column("k", "K", "K", "Latents active on each token, at most", _whole, None),
    Column("parameters", "Parameters", "Params", "Parameters of the sparse layer", compact, None),
    Column("fvu", "FVU", "FVU", "Fraction of the output's variance unexplained; lower is better", _fraction, "lower"),
    Column("nmse", "NMSE", "NMSE", "Squared error over the output's squared norm; lower is better", _fraction, "lower"),
    Column(
        "ce_increase",
        "CE increase",
        "CE +",
        "Cross-entropy with the layer in place minus the model's own, in nats per token; lower is better",
        _signed,
        "lower",
    ),
    Column(
        "loss_recovered",
        "Loss recovered",
        "Recov.",
        "Share of the loss from deleting the MLP that the layer wins back, where deleting it costs more than chance "
        "would; higher is better",
        _finer_percent,
        "higher",
    ),
    Column(
        "kl",
        "KL",
        "KL",
        "KL divergence from the model's own predictions, in nats per token; lower is better",
        _fraction,
        "lower",
    ),
    Column("l0", "L0", "L0", "Latents active on a token, mean", _mean, None),
    Column(
        "dead_fraction", "Dead", "Dead", "Share of the latents that never fired on the evaluated text", _percent, None
    ),
    Column(
        "specialisation",
        "Specialisation",
        "Spec.",
        "Share of the prediction's variance that needs experts of different direction; 0: one expert would do",
        _fraction,
        None,
    ),
)


def _agreement(tokens: int) -> Column:
    tokens_long = counted(tokens, "token")
    meaning = f"Share of prompts whose greedy continuation begins with the model's own {tokens_long}; higher is better"
    return Column("ngram_agreement", f"Same {tokens_long}", str(tokens), meaning, _percent, "higher", tokens - 1)


SCRUTINY_COLUMNS = (
    COLUMNS[0],
    _agreement(1),
    _agreement(4),
    _agreement(8),
    Column(
        "jacobian_cosine",
        "Jacobian cosine",
        "Jac.",
        "Mean cosine similarity of the layer's Jacobian and the MLP's; higher is better",
        _fraction,
        "higher",
    ),
    Column(
        "fvu_permuted",
        "FVU permuted",
        "FVU perm.",
        "Control: the FVU where each latent does another's work, which must lie above the FVU itself",
        _fraction,
        None,
    ),
    Column("stable_rank", "Stable rank", "St. rank", "Of an expert's matrix: ‖W‖F² / ‖W‖₂², mean", _mean, None),
    Column("numerical_rank", "Rank", "Rank", "Of an expert's matrix: singular values above rounding", _mean, None),
    Column("gini", "Gini", "Gini", "Inequality of how often latents fire; 0: equally often", _fraction, None),
    Column("top_share", "Top latent", "Top", "Share of the tokens on which the most used latent fires", _percent, None),
    Column(
        "effective_latents",
        "Effective latents",
        "Eff.",
        "exp of the entropy of the latents' shares of the energy that they add to the prediction; 1: one does it all",
        _mean,
        None,
    ),
    Column("top_energy_share", "Strongest", "Strong.", "Share of that energy which one latent carries", _percent, None),
    Column("always_on", "Always on", "On", "Latents that fire on more than half of the tokens", _whole, None),
    Column(
        "always_on_share",
        "Their share",
        "Share",
        "Share of the variance of what the latents predict that those carry",
        _percent,
        None,
    ),
    Column(
        "base_share",
        "Without latents",
        "Base",
        "Share of the prediction's variance that a skip connection or a shared expert has, active on every token",
        _percent,
        None,
    ),
)
"""What a reviewer asks for, in a table of its own: a terminal has no room for it."""


def group_rows(rows: Sequence[EvaluationRow], columns: Sequence[Column] = COLUMNS) -> list[TableGroup]:
    """Return the table's lines, grouped and ordered by layer and K; all layers together come last."""
    keys = sorted({_key(row) for row in rows})
    groups: list[TableGroup] = []
    for key in keys:
        members = [row for row in rows if _key(row) == key]
        lines = [
            TableLine(_name(row), row.kind, [_cell(row, members, column) for column in columns]) for row in members
        ]
        groups.append(TableGroup(members[0].layer, lines))
    return groups


def format_table(rows: Sequence[EvaluationRow]) -> Table:
    """Return the results as a table for a terminal of 80 columns; the best of each layer and K is bold.

    What all rows share stands below the table, and the parameters too where they are matched.
    """
    matched = len({compact(row.parameters) for row in rows if row.parameters is not None}) <= 1
    shown = [place for place, column in enumerate(COLUMNS) if column.field != "parameters" or not matched]
    several = len({row.layer for row in rows}) > 1
    table = Table(box=None, pad_edge=False, header_style="dim", caption=describe(rows), caption_justify="left")
    table.padding = (0, 1, 0, 0)
    table.add_column("Kind", no_wrap=True)
    for place in shown:
        table.add_column(COLUMNS[place].short, justify="right", no_wrap=True)
    layers: list[int | None] = []
    for group in group_rows(rows):
        if several and group.layer not in layers:
            table.add_row()
            table.add_row(Text(layer_name(group.layer), style="bold"))
        elif layers:
            table.add_row()
        layers.append(group.layer)
        for line in group.lines:
            cells = [line.cells[place] for place in shown]
            table.add_row(
                Text(line.name), *(Text(cell.text, style="bold green" if cell.best else "") for cell in cells)
            )
    return table


def markdown_table(rows: Sequence[EvaluationRow], columns: Sequence[Column] = COLUMNS) -> str:
    """Return the results as a Markdown table; the best of each layer and K is bold."""
    several = len({row.layer for row in rows}) > 1
    head = (["Layer"] if several else []) + ["Kind"] + [column.heading for column in columns]
    rule = (["--:"] if several else []) + [":--"] + ["--:"] * len(columns)
    lines = [head, rule]
    for group in group_rows(rows, columns):
        for line in group.lines:
            layer = ["all" if group.layer is None else str(group.layer)] if several else []
            cells = [f"**{cell.text}**" if cell.best else cell.text for cell in line.cells]
            lines.append([*layer, line.name.replace("|", r"\|"), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _key(row: EvaluationRow) -> tuple[int | float, int | float]:
    return (math.inf if row.layer is None else row.layer, math.inf if row.k is None else row.k)


def _name(row: EvaluationRow) -> str:
    if row.kind == TOGETHER:
        return "One a layer"
    name = group_name(split_student(row.student)[0], row.kind)
    return f"{name}, seed {row.seed}" if "-seed" in row.id else name


def _number(row: EvaluationRow, column: Column) -> int | float | None:
    value: int | float | tuple[float, ...] | None = getattr(row, column.field)
    if isinstance(value, tuple):
        return None if column.place is None else value[column.place]
    return value


def _cell(row: EvaluationRow, members: Sequence[EvaluationRow], column: Column) -> Cell:
    value = _number(row, column)
    if value is None:
        return Cell("–", False)
    if not math.isfinite(value):
        return Cell("n/a", False)
    others = [_number(member, column) for member in members]
    scores = [other for other in others if other is not None and math.isfinite(other)]
    best = {"lower": min, "higher": max}.get(column.better or "")
    wins = best is not None and value == best(scores) and min(scores) < max(scores)
    return Cell(column.write(value).replace("-", "−"), wins)
