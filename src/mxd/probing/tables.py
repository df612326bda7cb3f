"""What probing found, as tables for a terminal."""

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from mxd.evaluation.drawing import student_name
from mxd.printable import printable
from mxd.probing import PROBING_FILE
from mxd.probing.collecting import HIDDEN, RESIDUAL
from mxd.probing.results import CHANCE, KS, NamedLatent, ProbeRow, Probing, SetResult
from mxd.probing.statistics import LEAST_GROUPS
from mxd.probing.token_codes import TOKEN_IDENTITY

MOST_COLUMNS = 9
"""Features that have a column of their own in the table of concepts, baselines counted: a terminal has room for no
more."""
MOST_LISTED = 20
"""Classes that a sentence names."""


def features_name(features: str, kind: str, *, with_layer: bool) -> str:
    """Return what features are called in tables and pictures, such as `MxD K 32` or `Layer 3 MxD K 32`."""
    layer, shown = features.rpartition("/")[0], student_name(features, kind, before_k=" K ")
    return f"Layer {layer} {shown}" if with_layer and layer else shown


def series(result: SetResult) -> list[str]:
    """Return the features of a result, students first, chance last, in the order of the rows."""
    return list(dict.fromkeys(row.features for row in result.rows))


def several_layers(result: SetResult) -> bool:
    """Whether a result is of more than one layer."""
    return len({row.layer for row in result.rows if row.layer is not None}) > 1


def mean_table(result: SetResult) -> Table:
    """Return the mean F1 over a set's classes, for each number of features that a probe sees."""
    parts = " / ".join(f"{count:,}" for count in result.parts)
    table = Table(
        title=_text(f"{result.data}: mean F1 of {len(result.examples)} classes on the test part"),
        title_justify="left",
        caption=Text(f"{parts} examples for training, validation and test"),
        caption_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    table.add_column("Features", no_wrap=True)
    columns = [*KS, None]
    for k in columns:
        table.add_column("all" if k is None else f"best {k}", justify="right", no_wrap=True)
    best = {
        k: max(
            (found for name in series(result) if name != CHANCE and (found := result.mean_f1(name, k))), default=None
        )
        for k in columns
    }
    kinds = {row.features: row.kind for row in result.rows}
    for name in series(result):
        cells: list[Text] = []
        for k in columns:
            found = result.mean_f1(name, k)
            is_best = found is not None and found == best[k] and name != CHANCE and k is not None
            cells.append(Text("–" if found is None else f"{found:.3f}", style="bold green" if is_best else ""))
        table.add_row(_text(features_name(name, kinds[name], with_layer=several_layers(result))), *cells)
    return table


def concept_table(result: SetResult) -> Table:
    """Return, for each class, the F1 of the best single feature, for the first few students and all their baselines."""
    names, others = shown_features(result)
    table = Table(
        title=_text(f"{result.data}: F1 of the best single feature"),
        title_justify="left",
        caption=Text(f"{others} students more are in {PROBING_FILE}") if others else None,
        caption_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    kinds = {row.features: row.kind for row in result.rows}
    table.add_column("Class", no_wrap=True, overflow="ellipsis", max_width=22)
    for name in names:
        heading = features_name(name, kinds[name], with_layer=several_layers(result))
        table.add_column(_text(heading), justify="right", overflow="fold")
    table.add_column(CHANCE, justify="right")
    for concept in result.examples:
        found = {row.features: row for row in result.rows if row.concept == concept and row.k == 1}
        chance = next(row for row in result.rows if row.concept == concept and row.features == CHANCE)
        most = max((row.quality.f1 for row in found.values()), default=0.0)
        cells = [_cell(found.get(name), most) for name in names]
        table.add_row(_text(concept), *cells, Text(f"{chance.quality.f1:.2f}", style="dim"))
    return table


def shown_features(result: SetResult) -> tuple[list[str], int]:
    """Return the features that have a column of their own, and how many students have none.

    What students are compared with is never left out, so with many layers there is room for fewer of them.
    """
    layers = {row.features: row.layer for row in result.rows}
    names = [name for name in series(result) if name != CHANCE]
    students = [name for name in names if name.partition("/")[2] not in (HIDDEN, RESIDUAL) and name != TOKEN_IDENTITY]
    shown: list[str] = []
    for count in range(1, len(students) + 1):
        of = {None, *(layers[name] for name in students[:count])}
        wanted = [name for name in names if name in students[:count] or (name not in students and layers[name] in of)]
        if shown and len(wanted) > MOST_COLUMNS:
            return shown, len(students) - count + 1
        shown = wanted
    return shown or names, 0


def _text(text: str) -> Text:
    return Text(printable(text))


def _cell(row: ProbeRow | None, most: float) -> Text:
    if row is None:
        return Text("–")
    return Text(f"{row.quality.f1:.2f}", style="bold green" if row.quality.f1 == most > 0 else "")


def named_table(probing: Probing, count: int = 3) -> Table:
    """Return, of each student, the latents that name different concepts best by the validation part."""
    table = Table(
        title=Text("Latents that name a concept, chosen by validation"),
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    table.add_column("Student", no_wrap=True)
    for heading in ("latent", "concept", "F1", "precision", "recall", "fires on"):
        table.add_column(heading, justify="left" if heading == "concept" else "right", no_wrap=True)
    for student, latents in probing.named.items():
        best: dict[tuple[str, str], NamedLatent] = {}
        for latent in sorted(latents, key=lambda latent: -latent.skill_validation):
            best.setdefault((latent.data, latent.concept), latent)
        for latent in list(best.values())[:count]:
            scores = (f"{score:.2f}" for score in (latent.f1, latent.precision, latent.recall))
            rate = f"{100 * latent.firing_rate:.2g}%"
            table.add_row(_text(student), str(latent.latent), _text(latent.concept), *scores, rate)
    return table


def remarks(results: Sequence[SetResult]) -> list[str]:
    """Return what was left out, in a sentence each."""
    return [printable(f"{result.data}: {remark}") for result in results for remark in _remarks(result)]


def _remarks(result: SetResult) -> Iterator[str]:
    if result.skipped:
        yield (
            f"{len(result.skipped)} classes have too few examples and were skipped "
            f"({max(skip.needed for skip in result.skipped)} are needed, enough of them in each part): "
            f"{_listed({skip.label: skip.found for skip in result.skipped})}."
        )
    for why, count in result.left_out.items():
        if count:
            yield f"{count:,} left out: {why}."
    few = {concept: count for concept, count in result.test_groups.items() if count < LEAST_GROUPS}
    if few:
        what = "texts, or groups of them," if result.documents is None else "documents"
        yield f"fewer than {LEAST_GROUPS} {what} of the test part hold these, which have no interval: {_listed(few)}."
    for features in series(result):
        with_row = {row.concept for row in result.rows if row.features == features}
        unmeasured = {concept: count for concept, count in result.examples.items() if concept not in with_row}
        if unmeasured and features.partition("/")[2] in (HIDDEN, RESIDUAL):
            yield f"{features} was kept at too few tokens of these, which its mean leaves out: {_listed(unmeasured)}."


def _listed(counts: Mapping[str, int]) -> str:
    first = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:MOST_LISTED])
    return first if len(counts) <= MOST_LISTED else f"{first} and {len(counts) - MOST_LISTED:,} more"
