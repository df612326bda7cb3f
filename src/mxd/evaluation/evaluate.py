"""From a finished run to its rows, its pictures and its report."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict, cast, get_args

import torch
from torch import nn

from mxd.atomic import JSON, write_json_atomically
from mxd.bundled import held_out_modules
from mxd.data.text import open_text
from mxd.data.tokens import HeldOut, held_out_contexts, special_tokens
from mxd.evaluation.ablation import draw_ablations
from mxd.evaluation.continuations import ngram_agreements
from mxd.evaluation.curves import read_curves
from mxd.evaluation.expert_use import UseHistogram, collapse_warning, use_histogram
from mxd.evaluation.experts import expert_pages
from mxd.evaluation.faithfulness import (
    Candidate,
    EvaluationText,
    ModelLoss,
    Reconstruction,
    Variant,
    ablation,
    model_losses,
    reconstructions,
    replacement,
)
from mxd.evaluation.frontier import draw_frontier
from mxd.evaluation.report import ExpertPage, write_report
from mxd.evaluation.rows import TOGETHER, EvaluationRow
from mxd.evaluation.scrutiny import Scrutiny, scrutinise
from mxd.evaluation.students import TrainedStudent, load_students, require_one_per_layer
from mxd.evaluation.trade import draw_trade
from mxd.layers import TopKAutoencoder
from mxd.metrics import loss_recovered
from mxd.models import LanguageModel, fingerprint, load_language_model
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import is_finished, read_configuration

NOTABLE_DIFFERENCE = 0.1
"""Relative difference above which reconstruction errors with special positions are reported beside those without."""


STAYS = "A TopK SAE reads the MLP's output: its parameters and FLOPs come on top of those of the MLP, which stays."


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What was measured of a run."""

    rows: Sequence[EvaluationRow]
    """One a student, and one for all of them together where that was asked for."""
    experts: Sequence[ExpertPage]
    """Some experts of one student."""
    experts_of: str
    """That student's id."""
    facts: Mapping[str, str]
    """What a reader must know to repeat it."""
    use: Mapping[str, UseHistogram]
    """How often each student's latents fire, by `<layer>/<id>`."""
    warnings: Sequence[str] = ()
    """A sentence about each student that has collapsed to one latent."""


def evaluate_run(
    run: Path,
    *,
    text: Sequence[str] = (),
    tokens: int | None = None,
    students: Collection[str] = (),
    ks: Collection[int] = (),
    together: bool = False,
    device: str | None = None,
) -> Evaluation:
    """Measure a run's students on held-out text.

    Args:
        run: Folder of a finished run.
        text: Other text than the run's own; its held-out documents are used.
        tokens: Number of tokens at most; the run's own `eval_tokens` where None.
        students: Ids, or `<layer>/<id>`; all where empty.
        ks: Numbers of active latents to measure each student at beside its own.
        together: Whether to measure the model with all students in place at once too, one a layer.
        device: Where to run; the run's own where None.

    Raises:
        ValueError: If the run is not finished, has no such student, or has several in one layer for `together`.
    """
    description = read_configuration(run)
    if not is_finished(run):
        raise ValueError(f"{run} must be a finished run; it is not; finish it with mxd train --resume.")
    _require_described(run, description)
    config = cast(dict[str, Any], description["config"])
    chosen = load_students(run, cast(list[dict[str, Any]], description["students"]), students, ks)
    if together:
        require_one_per_layer(chosen)
    device = device or str(cast(dict[str, Any], description["resources"])["device"])
    dtype = "auto" if config["model_dtype"] == "auto" else getattr(torch, config["model_dtype"])
    revision = cast(dict[str, Any], description["model"])["revision"]
    language_model = load_language_model(config["model"], revision=revision, dtype=dtype, device=device)
    _require_same_model(run, cast(dict[str, Any], description["model"]), language_model)
    for student in chosen:
        student.candidate.network.to(device)
    source = open_text(
        list(text) or config["text"],
        text_field=config["text_field"],
        split=config["split"],
        revision=None if text else cast(dict[str, Any], description["text"])["revision"],
        held_out_modules=held_out_modules(),
    )
    held_out = held_out_contexts(
        source,
        language_model.tokenizer,
        context=config["context"],
        num_tokens=config["eval_tokens"] if tokens is None else tokens,
        vocab_size=cast(Any, language_model.model).get_input_embeddings().weight.shape[0],
    )
    evaluation_text = EvaluationText(
        contexts=held_out.contexts,
        special_ids=special_tokens(language_model.tokenizer),
        passthrough=config["special_positions"] == "passthrough",
        module_path=config["module"],
    )
    return _evaluate(language_model, chosen, held_out, evaluation_text, together, source.name)


_DESCRIBED = {
    "config": (
        *("model", "model_dtype", "module", "text", "text_field", "split"),
        *("context", "eval_tokens", "special_positions"),
    ),
    "resources": ("device",),
    "model": ("revision", "fingerprint"),
    "text": ("revision",),
}
"""What evaluation reads of a run.json, beside its students."""


def _require_described(run: Path, description: Mapping[str, JSON]) -> None:
    parts = {name: description.get(name) for name in _DESCRIBED}
    missing = [
        f"{part}.{name}"
        for part, names in _DESCRIBED.items()
        for name in names
        if not isinstance(parts[part], dict) or name not in cast(dict[str, JSON], parts[part])
    ]
    if not description.get("students"):
        missing.append("students")
    if missing:
        raise ValueError(
            f"{run}/run.json must describe a run as mxd train writes it; {', '.join(missing)} missing. "
            "Restore it from a copy, or evaluate with the version of mxd that wrote it."
        )


def _require_same_model(run: Path, described: Mapping[str, Any], found: LanguageModel) -> None:
    if described["fingerprint"] != fingerprint(cast(nn.Module, found.model)):
        raise ValueError(
            f"{run} must be evaluated with the model that it was trained on; the weights of {found.id} are others. "
            "Restore that model, or train anew."
        )


def write_evaluation(run: Path, evaluation: Evaluation, *, title: str, footer: str) -> None:
    """Write `evaluation.json`, `frontier.png` and `report.html` into the run's folder."""
    rows: list[JSON] = [row.to_json() for row in evaluation.rows]
    write_json_atomically(run / "evaluation.json", {"facts": dict(evaluation.facts), "rows": rows})
    draw_ablations(evaluation.rows, run)
    draw_trade(evaluation.rows, run / "trade.png")
    own = [row for row in evaluation.rows if row.k == row.k_trained]
    draw_frontier(own, run / "frontier.png")
    metrics = run / "metrics.jsonl"
    write_report(
        run / "report.html",
        title=title,
        facts={**evaluation.facts, "date": datetime.now(UTC).date().isoformat()},
        rows=own,
        curves=read_curves(read_metrics(metrics) if metrics.is_file() else []),
        experts=evaluation.experts,
        experts_of=evaluation.experts_of,
        use=evaluation.use,
        notes=[*([STAYS] if any(row.kind == TopKAutoencoder.kind for row in own) else []), *evaluation.warnings],
        footer=footer,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _WholeModel:
    """What was measured of the model with students in place, by their names."""

    id: str
    losses: Mapping[str, ModelLoss]
    agreements: Mapping[str, tuple[float, ...]]
    text: EvaluationText
    bytes_per_token: float | None


def _evaluate(
    language_model: LanguageModel,
    students: Sequence[TrainedStudent],
    held_out: HeldOut,
    text: EvaluationText,
    together: bool,
    text_name: str,
) -> Evaluation:
    model = cast(nn.Module, language_model.model)
    candidates = [student.candidate for student in students]
    quality = reconstructions(model, candidates, text)
    whole = _measure_model(language_model, candidates, quality, text, together, held_out.num_bytes)
    latents = {name: judged.latents for name, judged in quality.items()}
    scrutiny = scrutinise(model, candidates, latents, text)
    rows = [
        _row(whole, student, quality[student.candidate.name], scrutiny[student.candidate.name]) for student in students
    ]
    if together:
        rows.append(_together_row(whole))
    shown = next(
        (student for student in students if quality[student.candidate.name].specialisation is not None), students[0]
    )
    experts = expert_pages(
        model,
        shown.candidate,
        quality[shown.candidate.name].latents,
        held_out.contexts,
        language_model.tokenizer,
        module_path=text.module_path,
    )
    tokens_trained = students[0].provenance.tokens_trained
    blocks = sorted({candidate.layer for candidate in candidates})
    facts = {
        "model": language_model.id,
        "layer" if len(blocks) == 1 else "layers": ", ".join(map(str, blocks)),
        "held-out text": text_name,
        "tokens evaluated": f"{held_out.contexts.numel():,}",
        "tokens trained": "unknown" if tokens_trained is None else f"{tokens_trained:,}",
        "context": f"{held_out.contexts.shape[1]} tokens",
        "computed on": f"{next(model.parameters()).device}, model in {next(model.parameters()).dtype}".replace(
            "torch.", ""
        ),
    }
    return Evaluation(
        rows=rows,
        experts=experts,
        experts_of=shown.id,
        facts=facts,
        use={
            student.candidate.name: use_histogram(latents[student.candidate.name])
            for student in students
            if student.candidate.network.config.k == student.k_trained
        },
        warnings=[said for name, one in scrutiny.items() if (said := collapse_warning(name, one.energy)) is not None],
    )


def _measure_model(
    language_model: LanguageModel,
    candidates: Sequence[Candidate],
    quality: Mapping[str, Reconstruction],
    text: EvaluationText,
    together: bool,
    num_bytes: int | None,
) -> _WholeModel:
    model = cast(nn.Module, language_model.model)
    replaced = {
        candidate.name: replacement(model, {candidate.layer: candidate.network}, text) for candidate in candidates
    }
    ablated: dict[str, Variant] = {}
    for candidate in candidates:
        sums = quality[candidate.name].everywhere
        ablated[f"mean {candidate.layer}"] = ablation(model, {candidate.layer: sums.target / sums.tokens}, text)
        ablated[f"zero {candidate.layer}"] = ablation(model, {candidate.layer: None}, text)
    if together:
        layers = {candidate.layer: candidate.network for candidate in candidates}
        replaced[TOGETHER] = replacement(model, layers, text)
        ablated[f"zero {TOGETHER}"] = ablation(model, dict.fromkeys(layers), text)
    return _WholeModel(
        id=language_model.id,
        losses=model_losses(model, {**replaced, **ablated}, text),
        agreements=ngram_agreements(model, replaced, text),
        text=text,
        bytes_per_token=None if num_bytes is None else num_bytes / text.contexts[:, 1:].numel(),
    )


def _row(whole: _WholeModel, student: TrainedStudent, quality: Reconstruction, scrutiny: Scrutiny) -> EvaluationRow:
    network, provenance = student.candidate.network, student.provenance
    layer, config = student.candidate.layer, network.config
    d_hidden: int = getattr(config, "d_hidden", 0)
    agreement, ranks = quality.specialisation, scrutiny.ranks
    return EvaluationRow(
        id=student.id,
        model=whole.id,
        layer=layer,
        kind=network.kind,
        k=config.k,
        k_trained=student.k_trained,
        num_latents=config.num_latents,
        d_hidden=d_hidden or None,
        activation=getattr(config, "activation", None),
        encoder=getattr(config, "encoder", None),
        rank=getattr(config, "rank", None),
        normalize_experts=getattr(config, "normalize_experts", getattr(config, "normalize_decoder", None)),
        selection=network.selection.name,
        shared_penalty=student.shared_penalty,
        l1_coefficient=student.l1_coefficient,
        random_k=student.random_k,
        init=provenance.init,
        seed=provenance.seed,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flops_per_token=config.flops_per_token,
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
        fvu_permuted=scrutiny.permuted_fvu,
        nmse_all_positions=_notable(quality.everywhere.nmse, quality.content.nmse),
        fvu_all_positions=_notable(quality.everywhere.fvu, quality.content.fvu),
        ce_mean=whole.losses[f"mean {layer}"].ce,
        **_model_fields(whole, student.candidate.name, f"zero {layer}"),
    )


def _together_row(whole: _WholeModel) -> EvaluationRow:
    of_one_layer = {
        field.name: None for field in fields(EvaluationRow) if type(None) in get_args(field.type)
    }  # what belongs to one layer is null
    return EvaluationRow(
        **of_one_layer  # pyright: ignore[reportArgumentType]
        | {"id": TOGETHER, "kind": TOGETHER, "model": whole.id}
        | _model_fields(whole, TOGETHER, f"zero {TOGETHER}")
    )


class _ModelFields(TypedDict):
    """The fields of a row that speak of the whole model."""

    tokens_evaluated: int
    special_positions: str
    ce_base: float
    ce: float
    ce_increase: float
    ce_zero: float
    loss_recovered: float
    kl: float
    ngram_agreement: tuple[float, ...]
    bits_per_byte_base: float | None
    bits_per_byte: float | None


def _model_fields(whole: _WholeModel, name: str, zero: str) -> _ModelFields:
    base, here, ablated = (whole.losses[variant].ce for variant in ("", name, zero))
    bits = None if whole.bytes_per_token is None else 1 / (math.log(2) * whole.bytes_per_token)
    return {
        "tokens_evaluated": whole.text.contexts.numel(),
        "special_positions": "passthrough" if whole.text.passthrough else "replace",
        "ce_base": base,
        "ce": here,
        "ce_increase": here - base,
        "ce_zero": ablated,
        "loss_recovered": loss_recovered(here, base, ablated),
        "kl": whole.losses[name].kl,
        "ngram_agreement": whole.agreements[name],
        "bits_per_byte_base": None if bits is None else base * bits,
        "bits_per_byte": None if bits is None else here * bits,
    }


def _notable(everywhere: float, content: float) -> float | None:
    return everywhere if abs(everywhere - content) > NOTABLE_DIFFERENCE * content else None
