"""The row that `mxd evaluate --json` prints for each student."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args, get_origin

from mxd.atomic import JSON
from mxd.evaluation.intervals import Interval
from mxd.settings import StudentSettings

TOGETHER = "together"
"""Begins the id of a row for students of several layers in place at once; what belongs to one layer is null there."""

METRICS_VERSION = 2
"""Raised whenever a number of a row comes to mean something else, so that no old one stands beside a new one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """How faithful one student is to the MLP that it replaces. Losses are in nats a token."""

    id: str
    """The student's name in its run, such as `mxd-k32`; `together/mxd-k32` for the students of that name on all layers
    in place at once, and `together` alone where their names differ."""
    model: str
    """The language model's id or folder."""
    layer: int | None
    """Number of the block whose MLP is replaced; null for several at once."""
    kind: str
    """Kind of sparse layer; `together` for several of different names."""
    k: int | None
    """Number of latents active on each token, at most; with batch-topk on average."""
    k_trained: int | None
    """`k` in training; it differs where `mxd evaluate --k` asked for others."""
    num_latents: int | None
    """Number of latents; for a mixture of decoders, of experts."""
    d_hidden: int | None
    """Width of the dense branch; null for kinds that have none."""
    activation: str | None
    """Activation of the dense branch; null for kinds that have none."""
    encoder: str | None
    """Dense encoder, `mlp` or `glu`; null for kinds that have none."""
    rank: int | None
    """Largest rank of a latent's map; null for kinds that have no such bound."""
    normalize_experts: bool | None
    """Whether rows that belong to latents were kept at unit length; null for kinds that have no choice."""
    shared_expert: bool | None
    """Whether one more expert was active on every token; null for kinds that have no choice."""
    selection: str | None
    """How latents are selected: `topk`, `batch-topk` or `l1`."""
    shared_penalty: float | None
    """What training charged for the variance that its shared expert carries; null for kinds without one."""
    l1_coefficient: float | None
    """Weight of the L1 penalty in training; null where there was none."""
    random_k: bool | None
    """Whether training drew K anew each step; null where the selection is not topk."""
    init: str | None
    """How the weights were initialised."""
    seed: int | None
    """Seed of the weights."""
    parameters: int | None
    """Number of parameters of the sparse layer, or of all that are in place at once; for a topk-sae on top of those of
    the MLP, which stays."""
    flops_per_token: int | None
    """Floating-point operations of their forward pass, a multiplication and an addition counted as two; with l1, of a
    token with the mean number of active latents."""
    tokens_trained: int | None
    """Number of tokens trained on."""
    tokens_evaluated: int
    """Number of tokens behind the measurements of this row."""
    documents_evaluated: int
    """Number of documents that these tokens are from, which the intervals resample."""
    l0: float | None
    """Mean number of latents active on a token."""
    nmse: float | None
    """Σ‖y−t‖² / Σ‖t‖²."""
    fvu: float | None
    """Σ‖y−t‖² / Σ‖t−t̄‖²."""
    ce_base: float
    """Cross-entropy of the original model."""
    ce: float
    """Cross-entropy of the model with the student in place."""
    ce_increase: float
    """`ce` − `ce_base`; negative where the replaced model predicts better."""
    ce_increase_interval: Interval | None
    """Its 95 % interval over evaluation documents; null where there is one document, or a loss is not finite."""
    ce_zero: float
    """Cross-entropy of the model with the MLP's output set to zero."""
    ce_mean: float | None
    """Cross-entropy of the model with the MLP's output set to its mean over the text; null for `together`."""
    loss_recovered: float
    """(`ce_zero` − `ce`) / (`ce_zero` − `ce_base`); null where `ce_zero` is above `ce_base` by no more than chance: not
    at all, or with 0 in the 95 % interval of the difference over evaluation documents."""
    loss_recovered_interval: Interval | None
    """The same for `loss_recovered`."""
    bits_per_byte_base: float | None
    """`ce_base` in bits a byte of the text; null where the text is token ids alone."""
    bits_per_byte: float | None
    """`ce` in bits a byte of the text."""
    kl: float
    """Mean KL(original ‖ replaced)."""
    kl_interval: Interval | None
    """The same for `kl`."""
    dead_fraction: float | None
    """Share of the latents that fired on none of the evaluated tokens."""
    specialisation: float | None
    """Share of the prediction's variance that needs experts of different direction; null for kinds without a
    dense branch."""
    specialisation_constant_gain: float | None
    """The same where a change of loudness counts too."""
    ngram_agreement: tuple[float, ...]
    """Share of held-out prompts whose greedy continuation begins with the same 1, 2, … 8 tokens as the original's."""
    jacobian_cosine: float | None
    """Mean cosine similarity of the Jacobians of student and MLP, estimated on a sample of tokens."""
    stable_rank: float | None
    """‖W‖_F² / ‖W‖₂² of an expert's matrix, mean over a sample of the experts that fire; null for kinds whose latents
    are no linear maps."""
    numerical_rank: float | None
    """Number of an expert's singular values above float32's rounding, mean over the same experts."""
    gini: float | None
    """Gini coefficient of how often the latents fire: 0 where equally often; null where none fires."""
    top_share: float | None
    """Share of the tokens on which the most used latent fires."""
    effective_latents: float | None
    """exp of the entropy of the latents' shares of the energy that they add to the prediction, on a sample of tokens:
    1 where one latent does everything."""
    top_energy_share: float | None
    """Share of that energy which the strongest latent carries."""
    always_on: int | None
    """Number of latents that fire on more than half of the tokens."""
    always_on_share: float | None
    """Share of the variance of what latents add to the prediction that is carried by these, on a sample of tokens."""
    base_share: float | None = None
    """Share of the prediction's variance that it has without any latent, from a skip connection or a shared expert;
    null where that does not vary, as for kinds with a bias alone, and in evaluations that were made before."""
    fvu_permuted: float | None
    """`fvu` on a sample of tokens with each latent doing another latent's work: a control, which must lie above it."""
    special_positions: str
    """`replace`, or `passthrough` where the original MLP stayed at BOS and padding."""
    nmse_all_positions: float | None
    """`nmse` with BOS, padding and first tokens, which it leaves out; null where they differ by less than a tenth."""
    fvu_all_positions: float | None
    """The same for `fvu`."""

    @property
    def student(self) -> str:
        """The id without `together/`: which student stands in, in one layer or in all."""
        return self.id.removeprefix(f"{TOGETHER}/")

    @property
    def as_trained(self) -> bool:
        """Whether it was measured with the number of active latents that it was trained with."""
        return self.k == self.k_trained

    @property
    def settings(self) -> StudentSettings:
        """What may set the student apart from its siblings."""
        return StudentSettings.of_row(self)

    def to_json(self) -> dict[str, JSON]:
        """Return the row as JSON writes it, with null for what is not finite."""
        return {field.name: _written(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, JSON]) -> "EvaluationRow":
        """Return the row that `to_json` wrote; null where a number is always defined becomes NaN.

        Keys that this version does not know are left out, and those that have come since may be missing.

        Raises:
            ValueError: If a key is missing or its value has another type.
        """
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.name not in value and field.default is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"A row must have the keys of `mxd evaluate --json`; {', '.join(missing)} missing.")
        arguments: dict[str, Any] = {
            field.name: _read(field.name, field.type, value[field.name])
            for field in dataclasses.fields(cls)
            if field.name in value
        }
        return cls(**arguments)


def _written(value: str | int | float | tuple[float, ...] | None) -> JSON:
    if isinstance(value, tuple):
        return [_written(number) for number in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(name: str, kind: object, value: JSON) -> JSON:
    allowed = (kind,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
    length = next((_length(member) for member in allowed if get_origin(member) is tuple), None)
    if length is not None and isinstance(value, list) and _are_numbers(value, length):
        return tuple(float(cast("float", number)) for number in value)
    if value is None and float in allowed and type(None) not in allowed:
        return math.nan
    if type(value) is int and float in allowed:
        return float(value)
    if type(value) not in allowed:
        raise ValueError(f"{name!r} of a row must be {kind}; got {value!r}.")
    return value


def _are_numbers(values: list[Any], length: range) -> bool:
    return len(values) in length and all(type(number) in (int, float) for number in values)


def _length(kind: object) -> range:
    """Return the lengths that a type of tuples allows."""
    members = get_args(kind)
    return range(2**31) if Ellipsis in members else range(len(members), len(members) + 1)
