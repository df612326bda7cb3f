"""Steering each of some latents in turn, and what comes of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.atomic import JSON
from mxd.data.tokenization import Tokenizer, decode_tokens
from mxd.edits import Ablate, Add, Clamp, Edit, Operation, Scale, Set, Span, with_edits
from mxd.evaluation.faithfulness import Candidate, EvaluationText, Variant, replacement
from mxd.evaluation.firings import collect_firings
from mxd.models import LanguageModel, device_of
from mxd.steering.sampling import Sampling, prompt_tokens, sample_texts
from mxd.steering.scores import Reading, Reference, likeness, mean_state, moved, read_texts, reference_logits
from mxd.steering.steer import steer

OperationName = Literal["set", "add", "scale", "clamp", "ablate"]
Unit = Literal["value", "p99"]
UNIT_QUANTILE = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervention:
    """What is done to each latent; the default is what Oldfield et al. (2025) do."""

    operation: OperationName = "add"
    """What is done to a latent's value. `clamp` keeps it at or below the strength; `ablate` has none."""
    strength: float = 100.0
    """What is set or added, the factor of `scale`, or the bound of `clamp`."""
    unit: Unit = "value"
    """What the strength of `set`, `add` and `clamp` is given in: the latent's value itself, or the 99th percentile of
    the values that it takes where it fires in the held-out text, in the layer as it was trained."""
    positions: tuple[int, ...] = ()
    """Positions in the sequence that are steered, from 0; all where there is none."""
    generated_only: bool = False
    """Steer the tokens that are written and not the prompt."""

    def __post_init__(self) -> None:
        if self.positions and self.generated_only:
            raise ValueError("positions and generated-only must not both be given; leave one of them out.")
        self.operation_at(1.0)
        Edit(latents=(0,), operation=Ablate(), positions=self.where(1))

    @property
    def needs_unit(self) -> bool:
        """Whether a latent's own values must be known."""
        return self.unit == "p99" and self.operation in ("set", "add", "clamp")

    def operation_at(self, unit: float) -> Operation:
        """Return the operation on a latent whose unit is this."""
        amount = self.strength * unit
        match self.operation:
            case "set":
                return Set(amount=amount)
            case "add":
                return Add(amount=amount)
            case "scale":
                return Scale(factor=self.strength)
            case "clamp":
                return Clamp(high=amount)
            case "ablate":
                return Ablate()

    def where(self, prompt_length: int) -> tuple[int, ...] | Span | None:
        """Return the positions of an edit behind a prompt of this many tokens."""
        return Span(start=prompt_length) if self.generated_only else self.positions or None


@dataclass(frozen=True, kw_only=True, slots=True)
class SteeredRow:
    """What came of steering one latent of one student."""

    student: str
    """The student, as `<layer>/<id>`."""
    kind: str
    """Its kind."""
    latent: int | tuple[int, ...]
    """The latent, or all of them where several were steered at once."""
    edit: JSON
    """What was done, as `Edit.to_json` gives it; a list where several were steered."""
    unit: float | None
    """The latent's 99th percentile on held-out text, where the strength is in its units."""
    within: float
    """Mean cosine similarity of two of the texts (docs/steering.md)."""
    across: float
    """Mean cosine similarity of one of the texts and an unsteered one."""
    coherence: float
    """within − across."""
    loss: float
    """Cross-entropy of the texts in the original model, in nats a token."""
    perplexity: float
    """e to that."""
    kl: float
    """KL(replaced ‖ steered) along the unsteered texts, in nats a token."""
    distinct: float
    """Share of the texts' tokens that are different tokens within their text: a text that repeats itself has few."""
    texts: tuple[str, ...]
    """The texts, without the prompt."""

    def to_json(self) -> dict[str, JSON]:
        """Return the row as JSON takes it."""
        return cast("dict[str, JSON]", asdict(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SteeredRow":
        """Return the row that `to_json` described.

        Raises:
            ValueError: If it has other fields.
        """
        if set(value) != {field.name for field in fields(cls)}:
            raise ValueError("A row must have the fields of SteeredRow; it is of another version of mxd.")
        found: dict[str, Any] = {**value}
        found["texts"] = tuple(found["texts"])
        if isinstance(found["latent"], list):
            found["latent"] = tuple(cast("list[int]", found["latent"]))
        return cls(**found)


class Unsteered(NamedTuple):
    """What texts are when nothing is steered."""

    loss: float
    """Cross-entropy in the original model, in nats a token."""
    within: float
    """Mean cosine similarity of two of the texts."""
    distinct: float
    """As of a `SteeredRow`."""
    texts: Sequence[str]
    """The texts."""


def latent_units(
    model: nn.Module, student: Candidate, text: EvaluationText, latents: Sequence[int]
) -> dict[int, float | None]:
    """Return the 99th percentile of the values that each latent takes where it fires; None for one that never does."""
    # As the layer was trained: a latent that an edit has ablated, or set, still has its unit.
    firings = collect_firings(model, student.layer, with_edits(student.network, ()), text, latents)
    return {latent: firings.quantile(latent, UNIT_QUANTILE) for latent in latents}


class Experiment:
    """Steers latents of one student, one after another, and compares the texts with the unsteered ones.

    Args:
        language_model: The model.
        student: The sparse layer and its place.
        text: Held-out text, for the centre of the hidden states and the units.
        sampling: How texts are sampled.
        intervention: What is done to each latent.
        latents: Those that are to come, whose units are found out in one pass.

    Raises:
        ValueError: If the student has no such latent, or the prompt does not fit.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        student: Candidate,
        text: EvaluationText,
        sampling: Sampling,
        intervention: Intervention,
        latents: Sequence[int],
    ) -> None:
        beyond = [latent for latent in latents if not 0 <= latent < student.network.config.num_latents]
        if beyond:
            raise ValueError(
                f"latents must lie in [0, {student.network.config.num_latents - 1}], those of {student.name}; "
                f"got {beyond[0]}."
            )
        self.student, self.text, self.sampling, self.intervention = student, text, sampling, intervention
        self._model = language_model.module
        self._tokenizer: Tokenizer = language_model.tokenizer
        self._prompt = prompt_tokens(self._tokenizer, sampling.prompt, device_of(self._model))
        self._centre: Float[Tensor, " d_model"] = mean_state(self._model, text)
        self._units = latent_units(self._model, student, text, latents) if intervention.needs_unit else {}
        self._ids = self._sample(self._replaced)
        self._reading: Reading = read_texts(self._model, self._prompt, self._ids)
        self._reference: Reference = reference_logits(self._model, self._replaced, self._prompt, self._ids)

    @property
    def unsteered(self) -> Unsteered:
        """What the replaced model writes when nothing is steered."""
        states = self._reading.states
        return Unsteered(
            loss=float(self._reading.losses.mean()),
            within=likeness(states, states, self._centre).within,
            distinct=distinct_tokens(self._ids),
            texts=self._texts(self._ids),
        )

    def without_unit(self, latents: Sequence[int]) -> list[int]:
        """Return those latents that cannot be steered in units of their own: they fire nowhere in the held-out text."""
        return [latent for latent in latents if self.intervention.needs_unit and self._units.get(latent) is None]

    def rows(self, latents: Sequence[int | tuple[int, ...]]) -> Iterator[SteeredRow]:
        """Yield a row for each latent, or group of latents that are steered at once, but for those without a unit."""
        for latent in latents:
            members = (latent,) if isinstance(latent, int) else latent
            if not self.without_unit(members):
                yield self._row(latent, members)

    def _row(self, latent: int | tuple[int, ...], members: Sequence[int]) -> SteeredRow:
        units = [self._units.get(member) for member in members]
        where = self.intervention.where(self._prompt.shape[1])
        edits = [
            Edit(latents=(member,), operation=self.intervention.operation_at(unit or 1.0), positions=where)
            for member, unit in zip(members, units, strict=True)
        ]
        steered = self._steered(edits)
        ids = self._sample(steered)
        reading = read_texts(self._model, self._prompt, ids)
        like = likeness(reading.states, self._reading.states, self._centre)
        loss = float(reading.losses.mean())
        alone = isinstance(latent, int)
        return SteeredRow(
            student=self.student.name,
            kind=self.student.network.kind,
            latent=latent,
            edit=edits[0].to_json() if alone else [edit.to_json() for edit in edits],
            unit=units[0] if alone else None,
            within=like.within,
            across=like.across,
            coherence=like.coherence,
            loss=loss,
            perplexity=float(torch.tensor(loss, dtype=torch.float64).exp()),
            kl=moved(self._model, steered, self._prompt, self._reference),
            distinct=distinct_tokens(ids),
            texts=tuple(self._texts(ids)),
        )

    def _replaced(self) -> Any:
        return replacement(self._model, {self.student.layer: self.student.network}, self.text)()

    def _steered(self, edits: Sequence[Edit]) -> Variant:
        kept = self.text.special_ids if self.text.passthrough else ()
        layers = {self.student.layer: self.student.network}
        return lambda: steer(
            self._model,
            layers,
            {self.student.layer: edits},
            passthrough=kept,
            module_path=self.text.module_path,
        )

    def _sample(self, variant: Variant) -> Int[Tensor, "samples new_tokens"]:
        with variant():
            return sample_texts(self._model, self._prompt, self.sampling)

    def _texts(self, ids: Int[Tensor, "samples new_tokens"]) -> list[str]:
        return [decode_tokens(self._tokenizer, row) for row in ids.tolist()]


def distinct_tokens(ids: Int[Tensor, "samples new_tokens"]) -> float:
    """Return the share of texts' tokens that are different tokens within their text, its mean over texts."""
    return fmean(len(set(row)) / len(row) for row in ids.tolist())
