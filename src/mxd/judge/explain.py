"""Explaining the latents of a run, and handing them to delphi."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn

from mxd.atomic import JSON, write_json_atomically
from mxd.checkpoint import edits_digest
from mxd.evaluation.collect import choose_experts
from mxd.evaluation.delphi import export_latents
from mxd.evaluation.faithfulness import Candidate, reconstructions
from mxd.evaluation.firings import Firings, collect_firings
from mxd.evaluation.opening import OpenedRun, open_run, read_finished_run
from mxd.evaluation.students import load_students
from mxd.judge.endpoint import Estimate, Judge, tokens_about
from mxd.judge.examples import Examples, choose_examples
from mxd.judge.interpretation import ASKED_AT_ONCE, DETECT, LONGEST, Interpretation, Interpreter
from mxd.models import find_mlp

EXPLANATIONS_FILE = "explanations.json"


class LatentToExplain(NamedTuple):
    """A latent for which there are examples."""

    student: str
    """The student, as `<layer>/<id>`."""
    latent: int
    """The latent."""
    rate: float
    """Share of the content tokens on which it fires."""
    examples: Examples
    """Where it fires and where not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents:
    """What of a run is to be explained."""

    opened: OpenedRun
    """The model and the text."""
    chosen: Sequence[LatentToExplain]
    """The latents."""
    skipped: Sequence[tuple[str, int]]
    """Students and latents with too few contexts to explain and test."""


def gather_latents(
    run: Path,
    *,
    students: Sequence[str],
    latents: Sequence[int],
    count: int,
    text: Sequence[str] = (),
    tokens: int | None = None,
    device: str | None = None,
    model: str | None = None,
) -> Latents:
    """Find examples of a run's latents in held-out text.

    Args:
        run: Folder of a finished run.
        students: Ids, or `<layer>/<id>`; all where empty.
        latents: Which latents; where empty, `count` of each student, from the most to the least frequent.
        count: How many, where none are named.
        text: Other held-out text than the run's own.
        tokens: Tokens of it at most.
        device: Where to run; the run's own where None.
        model: Where the model is now; where the run found it if None.

    Raises:
        ValueError: If the run is not finished, has no such student, or a student no such latent.
    """
    opened, chosen = _open(run, students, text, tokens, device, model)
    module, contexts = opened.language_model.module, opened.text.contexts
    found: list[LatentToExplain] = []
    skipped: list[tuple[str, int]] = []
    for student in chosen:
        size = student.network.config.num_latents
        beyond = [latent for latent in latents if not 0 <= latent < size]
        if beyond:
            raise ValueError(f"latents must lie in [0, {size - 1}], those of {student.name}; got {beyond[0]}.")
        statistics = reconstructions(module, [student], opened.text)[student.name].latents
        wanted = list(latents) or choose_experts(statistics, count)
        firings = collect_firings(module, student.layer, student.network, opened.text, wanted)
        for latent in wanted:
            examples = choose_examples(firings.of(latent), contexts, seed=latent)
            if examples is None:
                skipped.append((student.name, latent))
            else:
                rate = float(statistics.firing_rates[latent])
                found.append(LatentToExplain(student.name, latent, rate, examples))
    return Latents(opened=opened, chosen=found, skipped=skipped)


def estimate_explanations(judge: Judge, latents: Latents) -> Estimate:
    """Return what explaining and testing these latents costs, about, with explanations of full length."""
    interpreter = _interpreter(judge, latents)
    total = judge.estimate([interpreter.explain_question(one.examples) for one in latents.chosen])
    tests = 0
    read = total.read
    for one in latents.chosen:
        for cases in (
            interpreter.detection_cases(one.examples),
            interpreter.fuzzing_cases(one.examples, one.latent),
        ):
            asked = -(-len(cases) // ASKED_AT_ONCE)
            tests += asked
            read += sum(tokens_about(text) for text, _ in cases) + asked * tokens_about(DETECT + " " * 500)
    return judge.priced(total.calls + tests, read, total.written + tests * LONGEST)


def explain_latents(
    judge: Judge, latents: Latents, advance: Callable[[int, int, str], None] = lambda done, total, word: None
) -> list[Interpretation]:
    """Return what a judge makes of each latent, as far as it answers."""
    interpreter, found = _interpreter(judge, latents), list[Interpretation]()
    for one in latents.chosen:
        found.append(interpreter.interpret(one.student, one.latent, one.examples))
        advance(len(found), len(latents.chosen), judge.endpoint.model)
    return found


def write_explanations(run: Path, latents: Latents, found: Sequence[Interpretation]) -> Path:
    """Write `explanations.json` into the run's folder, whole or not at all; return it."""
    rates = {(one.student, one.latent): one.rate for one in latents.chosen}
    rows: list[JSON] = [{**row.to_json(), "firing_rate": rates[row.student, row.latent]} for row in found]
    content: dict[str, Any] = {
        "model": latents.opened.language_model.id,
        "text": latents.opened.text_name,
        "tokens": latents.opened.identity.tokens,
        "edits": latents.opened.identity.edits,
        "explanations": rows,
        "skipped": [{"student": student, "latent": latent} for student, latent in latents.skipped],
    }
    path = run / EXPLANATIONS_FILE
    write_json_atomically(path, content)
    return path


def export_run(
    run: Path,
    folder: Path,
    *,
    students: Sequence[str],
    text: Sequence[str] = (),
    tokens: int | None = None,
    device: str | None = None,
    model: str | None = None,
) -> list[Path]:
    """Write where the latents of students fire in delphi's cache format, each student into a cache of its own.

    All entries of one student are held in memory: 16 bytes for each token and active latent.

    Returns:
        The files.

    Raises:
        ValueError: If the run is not finished, or has no such student.
    """
    opened, chosen = _open(run, students, text, tokens, device, model)
    module = opened.language_model.module
    written: list[Path] = []
    for student in chosen:
        firings: Firings = collect_firings(module, student.layer, student.network, opened.text)
        written += export_latents(
            firings,
            opened.text.contexts,
            student.network.config.num_latents,
            folder / student.name.replace("/", "-"),
            hookpoint=_hookpoint(module, student, opened.text.module_path),
            model=opened.language_model.id,
            text=opened.text_name,
        )
    return written


def _hookpoint(model: nn.Module, student: Candidate, module_path: str | None) -> str:
    """Return the path of a student's MLP below the model's base, as delphi names it."""
    base = cast(Any, model).base_model_prefix
    return re.sub(rf"^{re.escape(base)}\.", "", find_mlp(model, student.layer, module_path).path)


def _interpreter(judge: Judge, latents: Latents) -> Interpreter:
    opened = latents.opened
    return Interpreter(judge, opened.text.contexts, opened.language_model.tokenizer)


def _open(
    run: Path,
    students: Sequence[str],
    text: Sequence[str],
    tokens: int | None,
    device: str | None,
    model: str | None,
) -> tuple[OpenedRun, list[Candidate]]:
    description = read_finished_run(run)
    # Before the layers are read: what is edited meanwhile is then found to be of other edits.
    edits = edits_digest(run)
    chosen = [student.candidate for student in load_students(run, description["students"], students)]
    opened = open_run(run, description, text, tokens, device, model)
    for student in chosen:
        student.network.to(opened.language_model.device)
    return replace(opened, identity=replace(opened.identity, edits=edits)), chosen
