"""What is measured of a language model with students in place, and the parts of the rows that it fills."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.evaluation.continuations import ngram_agreements
from mxd.evaluation.faithfulness import (
    Candidate,
    EvaluationText,
    ModelLoss,
    Reconstruction,
    Variant,
    ablation,
    model_losses,
    replacement,
)
from mxd.evaluation.intervals import Interval, percentile_interval, resampled_sums
from mxd.evaluation.rows import TOGETHER, EvaluationRow
from mxd.metrics import loss_recovered
from mxd.models import LanguageModel
from mxd.settings import StudentSettings


class ModelFields(TypedDict):
    """The fields of a row that speak of the whole model."""

    model: str
    tokens_evaluated: int
    documents_evaluated: int
    special_positions: str
    ce_base: float
    ce: float
    ce_increase: float
    ce_increase_interval: Interval | None
    ce_zero: float
    loss_recovered: float
    loss_recovered_interval: Interval | None
    kl: float
    kl_interval: Interval | None
    ngram_agreement: tuple[float, ...]
    bits_per_byte_base: float | None
    bits_per_byte: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeModel:
    """What was measured of the model with students in place, by the variants' names."""

    id: str
    """The language model's."""
    losses: Mapping[str, ModelLoss]
    """Of the model as it is (`""`), of each replacement, and of each ablation."""
    agreements: Mapping[str, tuple[float, ...]]
    """How often replacements write on as the model does."""
    text: EvaluationText
    """What all of it was measured on."""
    bytes_per_token: float | None
    """Bytes of UTF-8 a predicted token; None where the text is token ids alone."""
    resampled: "_Resampled | None"
    """The same losses on resampled documents; None where there is one document."""

    def fields(self, name: str, zero: str) -> ModelFields:
        """Return the fields of the row of one replacement.

        Args:
            name: The replacement's.
            zero: That of the ablation of the same MLPs.
        """
        base, here, ablated = (self.losses[variant].ce for variant in ("", name, zero))
        bits = None if self.bytes_per_token is None else 1 / (math.log(2) * self.bytes_per_token)
        drawn, does_damage = self.resampled, self._does_damage(zero)
        ratios = drawn.recovered(name, zero) if drawn is not None and does_damage else None
        return {
            "model": self.id,
            "tokens_evaluated": self.text.contexts.numel(),
            "documents_evaluated": int((self.losses[""].tokens > 0).sum()),
            "special_positions": "passthrough" if self.text.passthrough else "replace",
            "ce_base": base,
            "ce": here,
            "ce_increase": here - base,
            "ce_increase_interval": None if drawn is None else percentile_interval(drawn.ce[name] - drawn.ce[""]),
            "ce_zero": ablated,
            "loss_recovered": loss_recovered(here, base, ablated) if does_damage else math.nan,
            "loss_recovered_interval": None if ratios is None else percentile_interval(ratios),
            "kl": self.losses[name].kl,
            "kl_interval": None if drawn is None else percentile_interval(drawn.kl[name]),
            "ngram_agreement": self.agreements[name],
            "bits_per_byte_base": None if bits is None else base * bits,
            "bits_per_byte": None if bits is None else here * bits,
        }

    def _does_damage(self, zero: str) -> bool:
        """Whether an ablation raises the loss by more than chance would: what it costs is what can be recovered."""
        drawn = self.resampled
        interval = None if drawn is None else percentile_interval(drawn.ce[zero] - drawn.ce[""])
        is_certain = drawn is None or (interval is not None and interval[0] > 0)
        return self.losses[zero].ce > self.losses[""].ce and is_certain


class _Resampled:
    """The losses of all variants on the same resampled documents."""

    def __init__(self, losses: Mapping[str, ModelLoss]) -> None:
        tokens = losses[""].tokens
        # A document of which no token is predicted is none that could be drawn.
        there = tokens > 0
        columns = [tokens, *(sums for loss in losses.values() for sums in (loss.ce_sums, loss.kl_sums))]
        totals = resampled_sums(torch.stack([column[there].double() for column in columns], dim=1))
        means = (totals[:, 1:] / totals[:, :1]).T
        self.ce: dict[str, Float[Tensor, " resamples"]] = dict(zip(losses, means[::2], strict=True))
        self.kl: dict[str, Float[Tensor, " resamples"]] = dict(zip(losses, means[1::2], strict=True))

    def recovered(self, name: str, zero: str) -> Float[Tensor, " resamples"]:
        return (self.ce[zero] - self.ce[name]) / (self.ce[zero] - self.ce[""])


def measure_model(
    language_model: LanguageModel,
    candidates: Sequence[Candidate],
    together: Mapping[str, Sequence[Candidate]],
    quality: Mapping[str, Reconstruction],
    text: EvaluationText,
    num_bytes: int | None,
) -> WholeModel:
    """Measure the model with each candidate in place, and with several at once.

    Args:
        language_model: The model.
        candidates: Replaced one by one; beside each stand `zero <layer>` and `mean <layer>`.
        together: Replaced at once, by the name of the result; `zero together` ablates the same layers.
        quality: How near each candidate comes to its MLP.
        text: What the model predicts.
        num_bytes: Bytes of UTF-8 that the predicted tokens stand for.
    """
    model = language_model.module
    replaced = {
        candidate.name: replacement(model, {candidate.layer: candidate.network}, text) for candidate in candidates
    }
    ablated: dict[str, Variant] = {}
    for candidate in candidates:
        sums = quality[candidate.name].everywhere
        ablated[f"mean {candidate.layer}"] = ablation(model, {candidate.layer: sums.target / sums.tokens}, text)
        ablated[f"zero {candidate.layer}"] = ablation(model, {candidate.layer: None}, text)
    for name, members in together.items():
        layers = {member.layer: member.network for member in members}
        replaced[name] = replacement(model, layers, text)
        ablated[f"zero {TOGETHER}"] = ablation(model, dict.fromkeys(layers), text)
    losses = model_losses(model, {**replaced, **ablated}, text)
    return WholeModel(
        id=language_model.id,
        losses=losses,
        agreements=ngram_agreements(model, replaced, text),
        text=text,
        bytes_per_token=None if num_bytes is None else num_bytes / text.contexts[:, 1:].numel(),
        resampled=_Resampled(losses) if int((losses[""].tokens > 0).sum()) > 1 else None,
    )


_COMMON = ("kind", "k", "k_trained", *StudentSettings().row_fields(), "seed", "tokens_trained")
"""What a row of several layers says where they agree."""


def together_row(whole: WholeModel, name: str, members: Sequence[EvaluationRow]) -> EvaluationRow:
    """Return the row of students that were in place at once; what belongs to one layer is null.

    Args:
        whole: What was measured.
        name: The id of the row, and its name among what was measured.
        members: The rows of these students.
    """
    values: dict[str, Any] = {field.name: None for field in fields(EvaluationRow) if type(None) in get_args(field.type)}
    for field in _COMMON:
        found = {getattr(member, field) for member in members}
        values[field] = found.pop() if len(found) == 1 else None
    for field in ("parameters", "flops_per_token"):
        values[field] = sum(getattr(member, field) for member in members)
    values |= {"id": name, "kind": values["kind"] or TOGETHER}
    return EvaluationRow(**(values | cast("dict[str, Any]", whole.fields(name, f"zero {TOGETHER}"))))
