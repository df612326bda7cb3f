"""From a finished run to its rows, its pictures and its report."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from mxd.checkpoint import edits_digest
from mxd.edits import edits_of
from mxd.evaluation.ablation import draw_ablations
from mxd.evaluation.curves import read_curves
from mxd.evaluation.expert_use import UseHistogram, collapse_warnings, use_histogram
from mxd.evaluation.experts import expert_pages
from mxd.evaluation.faithfulness import Reconstruction, reconstructions
from mxd.evaluation.frontier import draw_frontier
from mxd.evaluation.opening import OpenedRun, open_run, read_finished_run
from mxd.evaluation.record import EVALUATION_FILE, EvaluationIdentity, StoredEvaluation, write_record
from mxd.evaluation.report import ExpertPage, write_report
from mxd.evaluation.rows import EvaluationRow
from mxd.evaluation.scrutiny import Scrutiny, scrutinise
from mxd.evaluation.students import TrainedStudent, load_students, settings_together
from mxd.evaluation.trade import draw_trade
from mxd.evaluation.whole_model import WholeModel, measure_model, together_row
from mxd.layers import L1, SparseLayerConfig, TopKAutoencoder
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import METRICS_FILE

NOTABLE_DIFFERENCE = 0.1
"""Relative difference above which reconstruction errors with special positions are reported beside those without."""


STAYS = "A TopK SAE reads the MLP's output: its parameters and FLOPs come on top of those of the MLP, which stays."


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What was measured of a run."""

    rows: Sequence[EvaluationRow]
    """One a student, and where that was asked for one at each other K, and one a setting that stands in all layers."""
    experts: Sequence[ExpertPage]
    """Some experts of one student."""
    experts_of: str
    """That student's id."""
    facts: Mapping[str, str]
    """What a reader must know to repeat it."""
    use: Mapping[str, UseHistogram]
    """How often each student's latents fire, by `<layer>/<id>`."""
    identity: EvaluationIdentity
    """What it was measured on."""
    on_own_text: bool
    """Whether that is held-out documents of the text that the run was trained on."""

    @property
    def record(self) -> StoredEvaluation:
        """What is kept of it."""
        return StoredEvaluation(self.identity, self.facts, self.rows)


def evaluate_run(
    run: Path,
    *,
    text: Sequence[str] = (),
    tokens: int | None = None,
    students: Collection[str] = (),
    ks: Collection[int] = (),
    together: bool = False,
    device: str | None = None,
    model: str | None = None,
) -> Evaluation:
    """Measure a run's students on held-out text.

    Args:
        run: Folder of a finished run.
        text: Other text than the run's own, or where that is now; its held-out documents are used.
        tokens: Number of tokens at most; the run's own `eval_tokens` where None.
        students: Ids, or `<layer>/<id>`; all where empty.
        ks: Numbers of active latents to measure each student at beside its own.
        together: Whether to measure the model with all layers replaced at once too, by each student that all layers
            have.
        device: Where to run; the run's own where None.
        model: Where the model is now; where the run found it if None.

    Raises:
        FileNotFoundError: If the model or a file of the text is missing.
        ValueError: If the run is not finished, has no such student, or has none that all layers have for `together`,
            or the model is another one.
    """
    description = read_finished_run(run)
    # Before the layers are read: what is edited meanwhile is then found to be of other edits.
    edits = edits_digest(run)
    chosen = load_students(run, description["students"], students, ks)
    places = [(student.candidate.layer, student.id) for student in chosen if student.as_trained]
    at_once = settings_together(run, places) if together else {}
    opened = open_run(run, description, text, tokens, device, model)
    for student in chosen:
        student.candidate.network.to(opened.language_model.device)
    return _evaluate(replace(opened, identity=replace(opened.identity, edits=edits)), chosen, at_once)


_OF_FRONTIER_ALONE = ("frontier.svg", "frontier.md", "frontier.json")
"""What `mxd frontier` writes into a run's folder beside the files of an evaluation."""


def write_evaluation(run: Path, evaluation: Evaluation, *, title: str, footer: str) -> list[str]:
    """Write the pictures, `report.html` and last `evaluation.json` into the run's folder; return the files' names.

    What `mxd frontier` wrote there of an earlier evaluation is removed: it would stand beside numbers of today.
    """
    remove_frontier(run)
    own = [row for row in evaluation.rows if row.as_trained]
    pictures = [path.name for path in draw_ablations(evaluation.rows, run)]
    pictures += ["trade.png"] if draw_trade(own, run / "trade.png") else []
    draw_frontier(own, run / "frontier.png")
    metrics = run / METRICS_FILE
    write_report(
        run / "report.html",
        title=title,
        facts={**evaluation.facts, "date": datetime.now(UTC).date().isoformat()},
        rows=own,
        curves=read_curves(read_metrics(metrics) if metrics.is_file() else []),
        experts=evaluation.experts,
        experts_of=evaluation.experts_of,
        use=evaluation.use,
        notes=report_notes(own),
        footer=footer,
    )
    # Whoever finds it may rely on the pictures beside it being of the same numbers.
    write_record(run / EVALUATION_FILE, evaluation.record)
    return [EVALUATION_FILE, "frontier.png", *pictures, "report.html"]


def remove_frontier(folder: Path) -> None:
    """Remove what only `mxd frontier` writes: beside other numbers it would say what is no longer so."""
    for name in _OF_FRONTIER_ALONE:
        (folder / name).unlink(missing_ok=True)


def report_notes(rows: Sequence[EvaluationRow]) -> list[str]:
    """Return what must be known to read these rows."""
    return [*([STAYS] if any(row.kind == TopKAutoencoder.kind for row in rows) else []), *collapse_warnings(rows)]


def _evaluate(
    opened: OpenedRun, students: Sequence[TrainedStudent], at_once: Mapping[str, Sequence[str]]
) -> Evaluation:
    language_model, text = opened.language_model, opened.text
    model = language_model.module
    named = {student.candidate.name: student for student in students}
    candidates = [student.candidate for student in students]
    quality = reconstructions(model, candidates, text)
    together = {name: [named[member].candidate for member in members] for name, members in at_once.items()}
    whole = measure_model(language_model, candidates, together, quality, text, opened.held_out.num_bytes)
    latents = {name: judged.latents for name, judged in quality.items()}
    scrutiny = scrutinise(model, candidates, latents, text)
    rows = {name: _row(whole, student, quality[name], scrutiny[name]) for name, student in named.items()}
    several = [together_row(whole, name, [rows[member] for member in members]) for name, members in at_once.items()]
    shown = next(
        (student for student in students if quality[student.candidate.name].specialisation is not None), students[0]
    )
    experts = expert_pages(
        model,
        shown.candidate,
        quality[shown.candidate.name].latents,
        text.contexts,
        language_model.tokenizer,
        module_path=text.module_path,
    )
    return Evaluation(
        rows=[*rows.values(), *several],
        experts=experts,
        experts_of=shown.id,
        facts=_facts(opened, students),
        use={s.candidate.name: use_histogram(latents[s.candidate.name]) for s in students if s.as_trained},
        identity=opened.identity,
        on_own_text=opened.on_own_text,
    )


def _facts(opened: OpenedRun, students: Sequence[TrainedStudent]) -> dict[str, str]:
    parameter = next(opened.language_model.module.parameters())
    tokens_trained = students[0].provenance.tokens_trained
    layers = sorted({student.candidate.layer for student in students})
    edited = [student.candidate.name for student in students if edits_of(student.candidate.network)]
    return {
        **({"edited": f"{', '.join(edited)} (edits.json beside the layer)"} if edited else {}),
        "model": opened.language_model.id,
        "layer" if len(layers) == 1 else "layers": ", ".join(map(str, layers)),
        "held-out text": opened.text_name,
        "tokens evaluated": f"{opened.identity.tokens:,}",
        "tokens trained": "unknown" if tokens_trained is None else f"{tokens_trained:,}",
        "context": f"{opened.identity.context} tokens",
        "computed on": f"{parameter.device}, model in {parameter.dtype}".replace("torch.", ""),
    }


def _row(whole: WholeModel, student: TrainedStudent, quality: Reconstruction, scrutiny: Scrutiny) -> EvaluationRow:
    network, provenance = student.candidate.network, student.provenance
    layer, config = student.candidate.layer, network.config
    agreement, ranks = quality.specialisation, scrutiny.ranks
    return EvaluationRow(
        id=student.id,
        layer=layer,
        kind=network.kind,
        k=config.k,
        k_trained=student.k_trained,
        seed=provenance.seed,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flops_per_token=_flops(config, student.settings.selection, quality.latents.l0),
        tokens_trained=provenance.tokens_trained,
        l0=quality.latents.l0,
        nmse=quality.content.nmse,
        fvu=quality.content.fvu,
        dead_fraction=quality.latents.dead_fraction,
        specialisation=None if agreement is None else agreement.scalar_gain,
        specialisation_constant_gain=None if agreement is None else agreement.constant_gain,
        jacobian_cosine=scrutiny.jacobian_cosine,
        stable_rank=None if ranks is None else ranks.stable,
        numerical_rank=None if ranks is None else ranks.numerical,
        gini=scrutiny.use.gini,
        top_share=scrutiny.use.top_share,
        effective_latents=scrutiny.energy.effective_latents,
        top_energy_share=scrutiny.energy.top_share,
        always_on=len(scrutiny.use.always_on),
        always_on_share=scrutiny.always_on_share,
        base_share=quality.base_share,
        fvu_permuted=scrutiny.permuted_fvu,
        nmse_all_positions=_notable(quality.everywhere.nmse, quality.content.nmse),
        fvu_all_positions=_notable(quality.everywhere.fvu, quality.content.fvu),
        ce_mean=whole.losses[f"mean {layer}"].ce,
        **student.settings.row_fields(),
        **whole.fields(student.candidate.name, f"zero {layer}"),
    )


def _flops(config: SparseLayerConfig, selection: str | None, l0: float) -> int:
    """Return the operations of a token; with l1, of which any number of latents may be active, of a mean one."""
    if selection == L1.name and math.isfinite(l0):
        config = replace(cast("Any", config), k=max(1, round(l0)))
    return config.flops_per_token


def _notable(everywhere: float, content: float) -> float | None:
    return everywhere if abs(everywhere - content) > NOTABLE_DIFFERENCE * content else None
