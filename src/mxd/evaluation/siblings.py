"""Students of several runs beside each other: what tells them apart, and which are seeds of one setting."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, cast

from mxd.evaluation.drawing import kind_of, split_student
from mxd.evaluation.rows import EvaluationRow
from mxd.settings import StudentSettings

_NO_SETTINGS = {
    *("model", "revision", "module", "layer", "kind", "k", "seed", "seeds", "eval_tokens", "recipe"),
    *("cache", "device", "threads", "buffer_tokens", "micro_batch_tokens", "special_positions"),
    *StudentSettings._fields,
}
"""What of a run's configuration is named elsewhere, or decides where and how fast it was trained and not what."""


class RunRows(NamedTuple):
    """The rows of one run."""

    run: Path
    """Its folder."""
    config: Mapping[str, Any]
    """The `config` of its run.json."""
    rows: Sequence[EvaluationRow]
    """What was measured of it."""


def beside_each_other(runs: Sequence[RunRows]) -> list[list[EvaluationRow]]:
    """Return each run's rows with ids that are unique among all runs.

    Within a run an id names the settings in which siblings differ; here it names those in which students of one kind
    differ among all runs, so that what is alike has one name and what is not has two: a run's `mxd-k16` becomes
    `mxd-k16-h64` beside a run of another width. Where runs then still have students of one name, those that were
    trained alike but for their seed are seeds of one setting, and their ids name the seed; others are settings of
    their own, and their ids name every option in which the runs differ, as in `mxd-k16-lr=0.001`, and where nothing
    else tells them apart the run's folder, as in `mxd-k16-run=old`.
    """
    runs = _with_settings(runs) if len(runs) > 1 else runs
    renamed = [list(measured.rows) for measured in runs]
    for group in dict.fromkeys(_group(row) for measured in runs for row in measured.rows):
        having = [number for number, measured in enumerate(runs) if any(_group(row) == group for row in measured.rows)]
        if len(having) == 1:
            continue
        suffixes = _suffixes([runs[number] for number in having], group)
        for number, suffix in zip(having, suffixes, strict=True):
            renamed[number] = [_renamed(row, suffix) if _group(row) == group else row for row in renamed[number]]
    return renamed


def _with_settings(runs: Sequence[RunRows]) -> list[RunRows]:
    """Return the runs with ids that name every setting in which students of one kind differ, in any layer."""
    kinds = {row.kind for measured in runs for row in measured.rows}
    differing = {kind: _differing(runs, kind) for kind in kinds}
    return [measured._replace(rows=[_naming(row, differing[row.kind]) for row in measured.rows]) for measured in runs]


def _differing(runs: Sequence[RunRows], kind: str) -> list[str]:
    rows = [row for measured in runs for row in measured.rows if row.kind == kind]
    configs = [measured.config for measured in runs if any(row.kind == kind for row in measured.rows)]
    # What nobody asked for follows from something else, as the number of latents does from matched parameters. A rank
    # does not always: `auto` has not meant the same in every version.
    asked = [
        name
        for name in StudentSettings._fields
        if name == "rank" or len({v for c in configs for v in _values(c.get(name))}) > 1
    ]
    words = {name: {(row.layer, row.settings.words().get(name)) for row in rows} for name in asked}
    return [name for name, found in words.items() if len(found) > len({layer for layer, _ in found})]


def _values(option: Any) -> tuple[Any, ...]:
    return tuple(option) if isinstance(option, list | tuple) else (option,)


def _naming(row: EvaluationRow, names: Sequence[str]) -> EvaluationRow:
    """Return the row with an id that names these settings, each once and in their order, after its K."""
    id, words = row.id, row.settings.words()
    named = [words[name] for name in names if name in words]
    for word in named:
        id = re.sub(rf"-{re.escape(word)}(?=-|$)", "", id, count=1)
    return replace(row, id=re.sub(r"-k\d+(?=-|$)", lambda k: "-".join([k[0], *named]), id, count=1))


def _group(row: EvaluationRow) -> str:
    return split_student(row.student)[0]


def _renamed(row: EvaluationRow, suffix: str) -> EvaluationRow:
    seed = "" if row.seed is None or "-seed" in row.id else f"-seed{row.seed}"
    return replace(row, id=f"{row.id}{suffix}{seed}")


def _suffixes(runs: Sequence[RunRows], group: str) -> list[str]:
    """Return what the ids of a group's students must say beyond their names, run by run."""
    kind = kind_of(group)
    names = sorted({name for measured in runs for name in measured.config} - _NO_SETTINGS)
    options = [{name: _of_kind(measured.config.get(name), kind) for name in names} for measured in runs]
    differing = [name for name in names if any(given[name] != options[0][name] for given in options)]
    suffixes = ["".join(f"-{name}={_word(given[name])}" for name in differing) for given in options]
    seen: dict[tuple[object, ...], set[str]] = {}
    for measured, suffix in zip(runs, suffixes, strict=True):
        for row in measured.rows:
            if _group(row) == group:
                seen.setdefault((suffix, row.layer, row.k, row.seed), set()).add(str(measured.run))
    doubled = {run for found in seen.values() if len(found) > 1 for run in found}
    folders = [_word(str(measured.run)) for measured in runs]
    if len(set(folders)) < len(folders):
        folders = [f"{number}_{folder}" for number, folder in enumerate(folders, 1)]
    return [
        suffix + (f"-run={folder}" if str(measured.run) in doubled else "")
        for measured, suffix, folder in zip(runs, suffixes, folders, strict=True)
    ]


def _of_kind(value: object, kind: str) -> object:
    """Return what an option is for a kind, where it is given kind by kind, as learning rates may be."""
    return cast("Mapping[str, object]", value).get(kind) if isinstance(value, Mapping) else value


def _word(value: object) -> str:
    """Return a value as a part of an id."""
    # "-" would begin another part of the id, also that of 1e-05.
    text = format(Decimal(str(value)), "f") if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        text = "+".join(map(str, cast("Sequence[object]", value)))
    return re.sub(r"[^\w.+=]+", "_", text).strip("_")
