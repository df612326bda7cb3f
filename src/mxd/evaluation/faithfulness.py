"""How faithful sparse layers are: to their MLP's output, and to the model when they stand in its place."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.data.tokens import content_positions
from mxd.evaluation.collect import LatentStatistics
from mxd.evaluation.specialisation import Specialisation, specialisation
from mxd.layers import SparseCode, SparseLayer
from mxd.memory import available_memory
from mxd.metrics import ErrorSums, error_sums, kl_divergence, next_token_losses
from mxd.models import MlpPair, ablate_mlp, device_of, mlp_pairs, replace_mlp, vocabulary_size

SPECIALISATION_TOKENS = 8192
"""Content tokens, evenly spaced, on which specialisation is measured."""

LOGITS_AT_ONCE = 2**25
"""Elements of the logits of one forward pass, which bounds the memory of evaluation; on CUDA, what is free does."""
LOGIT_BYTES = 64
"""Bytes that an element costs on CUDA at most: two models' logits and log-probabilities, products, and what the model
itself holds."""
CUDA_TOKENS = 2**15
"""Tokens of one forward pass on CUDA at most, however small the vocabulary."""


Variant = Callable[[], AbstractContextManager[None]]
"""Makes the context in which a model runs as something else, such as with an MLP replaced."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A sparse layer that is to be judged."""

    name: str
    """Its name in the result."""
    layer: int
    """Index of the block whose MLP it replaces."""
    network: SparseLayer
    """The sparse layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationText:
    """What candidates are judged on."""

    contexts: Int[Tensor, "n context"]
    """Held-out tokens."""
    documents: Int[Tensor, "n context"]
    """Number of the document that each of them comes from, counted from 0."""
    special_ids: Collection[int]
    """Tokens that are no content (BOS, padding): reconstruction metrics leave their positions out."""
    passthrough: bool = False
    """Whether the original MLP stays at those positions when it is replaced."""
    module_path: str | None = None
    """Where the MLPs are, in a family that is not listed."""

    def chunks(self, tokens: int) -> Iterator[tuple[int, Int[Tensor, "chunk context"]]]:
        """Yield the contexts in order, about this many tokens at a time, each with the number of its first context."""
        size = max(1, tokens // self.contexts.shape[1])
        for first in range(0, len(self.contexts), size):
            yield first, self.contexts[first : first + size]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """How near a candidate comes to its MLP's output."""

    content: ErrorSums
    """Errors at content positions."""
    everywhere: ErrorSums
    """Errors at all positions."""
    latents: LatentStatistics
    """What its latents fire on, at content positions."""
    specialisation: Specialisation | None
    """How far its experts disagree; None for kinds without a dense branch."""
    base_share: float | None
    """Σ‖base − its mean‖² / Σ‖y − ȳ‖² on a sample; None where one of them does not vary, as where a base is a bias."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ModelLoss:
    """How well a model predicts the tokens of each document, in nats and float64."""

    ce_sums: Float[Tensor, " documents"]
    """Cross-entropy, summed over a document's tokens."""
    kl_sums: Float[Tensor, " documents"]
    """KL(original ‖ this model), summed likewise."""
    tokens: Int[Tensor, " documents"]
    """Tokens of each document that are predicted: all but those that begin a context."""

    @property
    def ce(self) -> float:
        """Mean cross-entropy, in nats a token."""
        return float(self.ce_sums.sum() / self.tokens.sum())

    @property
    def kl(self) -> float:
        """Mean KL(original ‖ this model), in nats a token."""
        return float(self.kl_sums.sum() / self.tokens.sum())


@torch.no_grad()
def reconstructions(
    model: nn.Module, candidates: Sequence[Candidate], text: EvaluationText
) -> dict[str, Reconstruction]:
    """Return how near each candidate comes to its MLP's output, by the candidate's name."""
    judges = {candidate.name: _Judge(candidate, text) for candidate in candidates}
    layers = sorted({candidate.layer for candidate in candidates})
    for first, contexts in text.chunks(4096):
        contexts = contexts.to(device_of(model))
        pairs = mlp_pairs(model, contexts, layers, module_path=text.module_path)
        content = content_positions(contexts, text.special_ids)
        for candidate in candidates:
            judges[candidate.name].observe(pairs[candidate.layer], content, first)
    return {name: judge.result() for name, judge in judges.items()}


class _Judge:
    """Gathers one candidate's reconstruction over chunks of text."""

    def __init__(self, candidate: Candidate, text: EvaluationText) -> None:
        self._network = candidate.network
        self._sums: dict[str, ErrorSums] = {}
        self._latents = LatentStatistics(self._network.config.num_latents)
        self._stride = max(1, text.contexts.numel() // SPECIALISATION_TOKENS)
        self._sample: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(self, pair: MlpPair, content: Tensor, first_context: int) -> None:
        target = pair.target.float().flatten(0, 1)
        x = self._network.given(*pair).float().flatten(0, 1)
        prediction, code = self._network(x)
        kept = content.flatten()
        for name, rows in {"content": kept, "everywhere": torch.ones_like(kept)}.items():
            self._add(name, prediction[rows].float(), target[rows])
        context, position = content.cpu().nonzero(as_tuple=True)
        fired = SparseCode(code.values[kept].cpu(), code.indices[kept].cpu())
        self._latents.update(fired, context + first_context, position)
        chosen = kept.nonzero().squeeze(1)[:: self._stride]
        base, dense = self._network.base(x[chosen]), self._network.dense_branch(x[chosen])
        # Of both only how much they vary is read.
        self._add("base", prediction[chosen].float(), base.float())
        self._add("prediction", base.float(), prediction[chosen].float())
        if dense is not None:
            self._sample.append((prediction[chosen].cpu(), dense.cpu(), base.cpu()))

    def _add(self, name: str, prediction: Tensor, target: Tensor) -> None:
        sums = error_sums(prediction, target)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def result(self) -> Reconstruction:
        base, whole = self._sums["base"].variation, self._sums["prediction"].variation
        sample = [torch.cat(parts) for parts in zip(*self._sample, strict=True)]
        return Reconstruction(
            content=self._sums["content"],
            everywhere=self._sums["everywhere"],
            latents=self._latents,
            specialisation=specialisation(*sample, max_tokens=SPECIALISATION_TOKENS) if sample else None,
            base_share=base / whole if base and whole else None,
        )


@torch.no_grad()
def model_losses(model: nn.Module, variants: Mapping[str, Variant], text: EvaluationText) -> dict[str, ModelLoss]:
    """Return the loss of the model in each variant, and its distance from the model as it is, document by document.

    Args:
        model: A language model.
        variants: Makes the context in which the model runs as the variant, by name.
        text: What it predicts.

    Returns:
        The losses by name; `""` is the model as it is.
    """
    variants = {"": lambda: nullcontext(), **variants}
    tokens = torch.bincount(text.documents[:, 1:].flatten())
    sums = {name: torch.zeros(2, len(tokens), dtype=torch.float64) for name in variants}
    for first, contexts in text.chunks(tokens_at_once(model)):
        documents = text.documents[first : first + len(contexts), 1:].flatten()
        contexts = contexts.to(device_of(model))
        original: Tensor | None = None
        for name, variant in variants.items():
            with variant():
                logits = cast(Tensor, model(contexts, use_cache=False).logits)
            original = logits if original is None else original
            ce = next_token_losses(logits, contexts).cpu().double()
            kl = kl_divergence(original[:, :-1], logits[:, :-1]).cpu().double()
            sums[name].index_add_(1, documents, torch.stack([ce.flatten(), kl.flatten()]))
    return {name: ModelLoss(ce_sums=total[0], kl_sums=total[1], tokens=tokens) for name, total in sums.items()}


def replacement(model: nn.Module, layers: Mapping[int, SparseLayer], text: EvaluationText) -> Variant:
    """Return the variant in which these sparse layers stand in for their MLPs."""
    kept = text.special_ids if text.passthrough else ()
    return lambda: replace_mlp(model, layers, passthrough=kept, module_path=text.module_path)


def ablation(model: nn.Module, outputs: Mapping[int, Float[Tensor, " d_out"] | None], text: EvaluationText) -> Variant:
    """Return the variant in which MLPs' outputs are these vectors, or zero, wherever candidates would replace them."""
    kept = text.special_ids if text.passthrough else ()
    return lambda: ablate_mlp(model, outputs, passthrough=kept, module_path=text.module_path)


def tokens_at_once(model: nn.Module) -> int:
    """Return how many tokens a forward pass may read whose logits are all wanted; at least one."""
    return logits_fit(device_of(model), vocabulary_size(model))


def logits_fit(device: torch.device, vocabulary: int) -> int:
    """Return for how many tokens logits over a vocabulary fit on a device, at least one.

    On CUDA the bytes that are free are rounded down to a power of two, so that a little more or less does not cut the
    text in another way, which would round otherwise.
    """
    if device.type != "cuda":
        return max(1, LOGITS_AT_ONCE // vocabulary)
    free = available_memory(str(device)) or 0
    elements = 2 ** max(0, free.bit_length() - 1) // LOGIT_BYTES
    return max(1, min(CUDA_TOKENS, elements // vocabulary))
