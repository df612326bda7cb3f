"""From finished runs to one frontier: what is not measured yet is measured, what does not compare is refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mxd.atomic import JSON, write_json_atomically, write_text_atomically
from mxd.checkpoint import edits_digest
from mxd.evaluation.drawing import describe
from mxd.evaluation.evaluate import evaluate_run, remove_frontier, report_notes, write_evaluation
from mxd.evaluation.frontier import draw_frontier
from mxd.evaluation.frontier_table import markdown_points, markdown_students
from mxd.evaluation.grid import HOW_INTERVALS_WERE_MADE, METRIC_NAMES, FrontierPoint, frontier_points
from mxd.evaluation.opening import Foreseen, foresee_identity, read_finished_run
from mxd.evaluation.record import (
    EVALUATION_FILE,
    EvaluationIdentity,
    StoredEvaluation,
    is_json,
    read_record,
    write_record,
)
from mxd.evaluation.report import write_report
from mxd.evaluation.rows import EvaluationRow
from mxd.evaluation.siblings import RunRows, beside_each_other
from mxd.evaluation.students import settings_together, student_places
from mxd.evaluation.tables import markdown_table
from mxd.quantities import compact
from mxd.runs.run import is_run

_NAMES = {
    "model": "the language model",
    "context": "the length of a context",
    "special_positions": "what happens at special positions",
    "metrics": "the definition of the metrics",
    "tokens": "the number of evaluation tokens",
    "text": "the evaluation text",
}
"""How messages call the parts of an evaluation's identity."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Frontier:
    """What several runs have in common, side by side."""

    runs: Sequence[Path]
    """The runs' folders."""
    files: Sequence[Path]
    """Where what was measured of each is kept."""
    stored: Sequence[StoredEvaluation]
    """What was measured of each."""
    rows: Sequence[Sequence[EvaluationRow]]
    """Each run's rows of students as they were trained, with ids that are unique among all."""

    @property
    def all_rows(self) -> list[EvaluationRow]:
        """The rows of all runs."""
        return [row for rows in self.rows for row in rows]

    @property
    def points(self) -> list[FrontierPoint]:
        """What is drawn."""
        return frontier_points(self.all_rows)

    @property
    def facts(self) -> dict[str, str]:
        """What a reader must know to repeat it, and holds for all runs."""
        first = self.stored[0].facts
        shared = {name: value for name, value in first.items() if all(s.facts.get(name) == value for s in self.stored)}
        return {**shared, "runs": ", ".join(map(str, self.runs))}

    def to_json(self) -> dict[str, JSON]:
        """Return what frontier.json holds."""
        rows: list[JSON] = [
            {"run": str(run), **row.to_json()} for run, rows in zip(self.runs, self.rows, strict=True) for row in rows
        ]
        return {
            "runs": [str(run) for run in self.runs],
            "facts": self.facts,
            # Which edits are in force is each run's own.
            "identity": {name: value for name, value in asdict(self.stored[0].identity).items() if name != "edits"},
            "intervals": HOW_INTERVALS_WERE_MADE,
            "metrics": {str(metric): name for metric, name in METRIC_NAMES.items()},
            "points": [point.to_json() for point in self.points],
            "rows": rows,
        }


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """On what runs are to be compared."""

    text: Sequence[str]
    tokens: int | None
    together: bool
    model: str | None

    def wanted(self, run: Path, description: Mapping[str, Any]) -> Foreseen | None:
        """Return what a run's evaluation must have been made on; None where any on the run's own text will do."""
        if not self.text and self.tokens is None:
            return None
        found = self.foreseen(run, description)
        return None if self.tokens is None and found.on_own_text else found

    def foreseen(self, run: Path, description: Mapping[str, Any]) -> Foreseen:
        """Return what a run would be evaluated on now."""
        return foresee_identity(run, description, self.text, self.tokens, self.model)

    def source(self, description: Mapping[str, Any]) -> object:
        """Return what tells the text that a run is evaluated on from other runs'."""
        text = description["text"]
        names = text.get("names") if text["digest"] is None else None
        return None if self.text else (text["digest"], text["revision"], text["split"], names)


def _file(run: Path, wanted: Foreseen | None) -> Path:
    """Return where a run's evaluation is kept: beside `evaluation.json`, where that is on other text or tokens."""
    own = run / EVALUATION_FILE
    if wanted is None:
        return own
    aside = run / f"evaluation-{wanted.identity.text[:12]}.json"
    if not wanted.on_own_text:
        return aside
    try:
        return own if not own.is_file() or read_record(own).identity.text == wanted.identity.text else aside
    except ValueError:
        # What another version measured stays; a damaged file says nothing any more that could be lost.
        return aside if is_json(own) else own


def compare_runs(
    runs: Sequence[Path],
    *,
    text: Sequence[str] = (),
    tokens: int | None = None,
    together: bool = False,
    device: str | None = None,
    model: str | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda message: None,
) -> Frontier:
    """Return the frontier of finished runs; what is not evaluated yet is, and written at once.

    Args:
        runs: Their folders.
        text: Other text than each run's own, or where that is now.
        tokens: Tokens at most; where None, an evaluation on the run's own text is taken whatever its number.
        together: Whether there must be rows for all layers replaced at once.
        device: Where to evaluate; each run's own where None.
        model: Where the model of all is now; where each run found it if None.
        command: The reports' last line.
        say: Told what is done meanwhile.

    Raises:
        ValueError: If a run is not finished or named twice, has nothing to replace all layers at once with where that
            is asked for, or two were not, or would not be, evaluated alike. Then nothing has been evaluated or written.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError("Each run must be named only once; name every run once.")
    asked = _Asked(text=text, tokens=tokens, together=together, model=model)
    descriptions = [read_finished_run(run) for run in runs]
    places = [student_places(run, description["students"]) for run, description in zip(runs, descriptions, strict=True)]
    for run, students in zip(runs, places, strict=True) if together else ():
        settings_together(run, students)
    wanted = [asked.wanted(run, description) for run, description in zip(runs, descriptions, strict=True)]
    files = [_file(run, ahead) for run, ahead in zip(runs, wanted, strict=True)]
    found = [
        _reusable(asked, file, description, students, ahead)
        for file, description, students, ahead in zip(files, descriptions, places, wanted, strict=True)
    ]
    if len(runs) > 1:
        identities = [
            _without_edits(there.identity)
            if isinstance(there, StoredEvaluation)
            else (ahead or asked.foreseen(run, description)).identity
            for run, there, ahead, description in zip(runs, found, wanted, descriptions, strict=True)
        ]
        _require_alike(runs, identities, [asked.source(description) for description in descriptions])
    stored: list[StoredEvaluation] = []
    for number, (run, there) in enumerate(zip(runs, found, strict=True)):
        if not isinstance(there, StoredEvaluation):
            place = f" ({number + 1} of {len(runs)})" if len(runs) > 1 else ""
            say(f"Evaluating {run}{place}: {there} …")
            there = _evaluated(asked, run, files[number], device, command)
        stored.append(there)
    measured = [
        RunRows(run, description["config"], [row for row in record.rows if row.as_trained])
        for run, description, record in zip(runs, descriptions, stored, strict=True)
    ]
    return Frontier(runs=runs, files=files, stored=stored, rows=beside_each_other(measured))


def _evaluated(asked: _Asked, run: Path, file: Path, device: str | None, command: str) -> StoredEvaluation:
    evaluation = evaluate_run(
        run, text=asked.text, tokens=asked.tokens, together=asked.together, device=device, model=asked.model
    )
    record = evaluation.record
    if file.name != EVALUATION_FILE:
        remove_frontier(run / _frontier_name(file))
        write_record(file, record)
    else:
        write_evaluation(run, evaluation, title=f"Sparse layers of {record.facts['model']}", footer=command)
    return record


def _reusable(
    asked: _Asked,
    file: Path,
    description: Mapping[str, Any],
    students: Sequence[tuple[int, str]],
    wanted: Foreseen | None,
) -> StoredEvaluation | str:
    """Return a run's evaluation, or why there is none that can be used."""
    if not file.is_file():
        return "it is not evaluated yet"
    try:
        stored = read_record(file)
    except ValueError as error:
        return f"its {file.name} cannot be used ({str(error).rstrip('.')})"
    config, identity = description["config"], stored.identity
    own = (description["model"]["fingerprint"], config["context"], config["special_positions"])
    if own != (identity.model, identity.context, identity.special_positions):
        return f"its {file.name} is not of the model, context and special positions of its run.json"
    if identity.edits != edits_digest(file.parent):
        return f"its {file.name} is of other edits of its layers than those in force (mxd edit)"
    if wanted is not None and _without_edits(identity) != wanted.identity:
        return f"its {file.name} is of other text or another number of tokens"
    if {(row.layer, row.id) for row in stored.rows if row.layer is not None and row.as_trained} != set(students):
        return f"its {file.name} does not have all of its students"
    if asked.together and not any(row.layer is None for row in stored.rows):
        return f"its {file.name} has no rows for all layers together"
    return stored


def _without_edits(identity: EvaluationIdentity) -> EvaluationIdentity:
    """Return what else an evaluation was made on: edited layers compare with others, as layers of another kind do."""
    return replace(identity, edits=None)


def _require_alike(runs: Sequence[Path], identities: Sequence[EvaluationIdentity], sources: Sequence[object]) -> None:
    first = identities[0]
    for run, other, source in zip(runs[1:], identities[1:], sources[1:], strict=True):
        if other == first:
            continue
        differing = {field.name for field in fields(first) if getattr(first, field.name) != getattr(other, field.name)}
        if differing & {"tokens", "context"} and source == sources[0]:
            # Which makes other contexts of the same text.
            differing.discard("text")
        named = [
            name + (f" ({getattr(first, field)} and {getattr(other, field)})" if field not in ("model", "text") else "")
            for field, name in _NAMES.items()
            if field in differing
        ]
        options = [f"--{option}" for option in ("text", "tokens") if option in differing]
        remedy = (
            f"give {' and '.join(options)}, so that all are evaluated on the same"
            if differing <= {"text", "tokens"}
            else "give runs that were trained alike in this, or draw a frontier of each"
        )
        raise ValueError(
            f"The runs of a frontier must be evaluated alike; {runs[0]} and {run} differ in {', '.join(named)}; "
            f"{remedy}."
        )


def require_place(out: Path | None, runs: Sequence[Path]) -> None:
    """Check the folder that a frontier is to be written to, before anything is evaluated.

    Raises:
        ValueError: If no folder is named where it must be, or it is a file, or it is a run's that the frontier would
            misrepresent.
    """
    own = runs[0] if len(runs) == 1 else None
    if out is None and own is None:
        raise ValueError("--out must name a folder for a frontier of several runs; got none.")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder; {out} is a file; name another.")
    if out is not None and is_run(out) and (own is None or out.resolve() != own.resolve()):
        raise ValueError(
            f"--out must not be the folder of a run whose report would be overwritten; got {out}; name another."
        )


def frontier_folder(frontier: Frontier, out: Path | None) -> Path:
    """Return the folder that a frontier is written to: for a single run the run's own, unless another is named.

    Where the evaluation stands beside the run's `evaluation.json`, it is a folder within the run's own: pictures there
    are of the same numbers as the report.
    """
    run, file = frontier.runs[0], frontier.files[0]
    if out is not None and (len(frontier.runs) > 1 or out.resolve() != run.resolve()):
        return out
    return run if file.name == EVALUATION_FILE else run / _frontier_name(file)


def _frontier_name(file: Path) -> str:
    """Return the folder, beside an evaluation that is kept aside, of what is drawn of it."""
    return file.stem.replace("evaluation", "frontier")


def write_frontier(frontier: Frontier, out: Path, *, command: str = "") -> list[str]:
    """Write frontier.png, .svg, .md, .json and report.html into a folder, each whole or not at all.

    In a run's own folder a report that is there stays: `write_evaluation` wrote it from the same rows, and it has what
    the rows alone do not hold, such as experts.

    Returns:
        The names of the files that were written.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows, points = frontier.all_rows, frontier.points
    title = f"Faithfulness against sparsity: {frontier.facts.get('model', 'several models')}"
    draw_frontier(rows, out / "frontier.png", out / "frontier.svg", title=title, note=_flops(points))
    write_text_atomically(out / "frontier.md", _markdown(frontier, title))
    write_json_atomically(out / "frontier.json", frontier.to_json())
    written = ["frontier.png", "frontier.svg", "frontier.md", "frontier.json"]
    if is_run(out) and (out / "report.html").is_file():
        return written
    notes = report_notes(rows)
    write_report(out / "report.html", title=title, facts=frontier.facts, rows=rows, notes=notes, footer=command)
    return [*written, "report.html"]


def _flops(points: Sequence[FrontierPoint]) -> str:
    counts = [point.rows[0].flops_per_token for point in points if point.layer is not None]
    known = [count for count in counts if count is not None]
    if not known:
        return ""
    low, high = compact(min(known)), compact(max(known))
    return f"{low if low == high else f'{low}–{high}'} FLOPs per token"


def _markdown(frontier: Frontier, title: str) -> str:
    rows = frontier.all_rows
    facts = "".join(f"- {name}: {value}\n" for name, value in frontier.facts.items())
    return (
        f"# {title}\n\n{describe(rows)}.\n\n{facts}\n{markdown_points(frontier.points)}\n{HOW_INTERVALS_WERE_MADE}\n\n"
        f"## Each student\n\n{markdown_table(rows)}\n## Each student over documents\n\n{markdown_students(rows)}"
    )
