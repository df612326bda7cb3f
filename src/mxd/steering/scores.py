"""What can be said of steered texts without a judge, by the original model."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.data.tokens import content_positions
from mxd.evaluation.faithfulness import EvaluationText, Variant, tokens_at_once
from mxd.evaluation.sampling import evenly_spaced
from mxd.metrics import kl_divergence, next_token_losses
from mxd.models import device_of

CENTRE_CONTEXTS = 64
"""Held-out contexts whose mean hidden state is taken off every text's."""


class Reading(NamedTuple):
    """What the original model makes of texts."""

    states: Float[Tensor, "samples d_model"]
    """Mean over a text's tokens of the last hidden states, in float64."""
    losses: Float[Tensor, " samples"]
    """Mean cross-entropy of a text's tokens, given the prompt, in nats and float64."""


class Likeness(NamedTuple):
    """How much texts resemble each other: mean cosine similarities of their centred mean hidden states."""

    within: float
    """Between two different texts of the set."""
    across: float
    """Between a text of the set and another one than its own counterpart, which was drawn by the same chances."""

    @property
    def coherence(self) -> float:
        """How much more the texts resemble each other than the others: 0 for texts that steering left as they were."""
        return self.within - self.across


@torch.no_grad()
def read_texts(model: nn.Module, prompt: Int[Tensor, "one seq"], texts: Int[Tensor, "samples new_tokens"]) -> Reading:
    """Return what a model makes of texts that continue a prompt."""
    whole = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    output = cast(Any, model)(input_ids=whole, output_hidden_states=True, use_cache=False)
    states = cast(Tensor, output.hidden_states[-1])[:, prompt.shape[1] :]
    losses = next_token_losses(cast(Tensor, output.logits)[:, prompt.shape[1] - 1 :], whole[:, prompt.shape[1] - 1 :])
    return Reading(states.cpu().double().mean(1), losses.cpu().double().mean(1))


@torch.no_grad()
def mean_state(model: nn.Module, text: EvaluationText) -> Float[Tensor, " d_model"]:
    """Return the mean last hidden state over the content of some held-out contexts, in float64.

    Hidden states share a large common direction, which says nothing of a text and makes all cosines large.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    size = max(1, tokens_at_once(model) // text.contexts.shape[1])
    for contexts in text.contexts[evenly_spaced(len(text.contexts), CENTRE_CONTEXTS)].split(min(size, 8)):
        contexts = contexts.to(device_of(model))
        output = cast(Any, model)(input_ids=contexts, output_hidden_states=True, use_cache=False)
        content = content_positions(contexts, text.special_ids)
        total = total + cast(Tensor, output.hidden_states[-1])[content].cpu().double().sum(0)
        count += int(content.sum())
    return total / max(count, 1)


def likeness(
    states: Float[Tensor, "samples d_model"],
    others: Float[Tensor, "samples d_model"],
    centre: Float[Tensor, " d_model"],
) -> Likeness:
    """Return how much texts resemble each other, and how much they resemble others.

    Args:
        states: Mean hidden states of the texts.
        others: Those of their counterparts, in the same order: what the same random numbers gave without steering.
        centre: What is taken off all of them.

    Raises:
        ValueError: If there are fewer than two texts, of which no two can be compared.
    """
    if len(states) < 2:
        raise ValueError(f"Coherence needs at least two samples; got {len(states)}. Ask for more --samples.")
    one, two = (torch.nn.functional.normalize(rows - centre, dim=1) for rows in (states, others))
    return Likeness(_between_different(one @ one.t()), _between_different(one @ two.t()))


def _between_different(similarities: Float[Tensor, "samples samples"]) -> float:
    """Return the mean over pairs of different numbers."""
    count = len(similarities)
    return float((similarities.sum() - similarities.diagonal().sum()) / (count * (count - 1)))


class Reference(NamedTuple):
    """The distributions of a replaced, not steered model along the texts that it wrote."""

    tokens: Int[Tensor, "samples seq"]
    """Prompt and texts."""
    logits: Float[Tensor, "samples new_tokens vocab"]
    """What each of the texts' tokens was drawn from, before temperature and the rest."""


@torch.no_grad()
def reference_logits(
    model: nn.Module, replaced: Variant, prompt: Int[Tensor, "one seq"], texts: Int[Tensor, "samples new_tokens"]
) -> Reference:
    """Return the distributions of a model with its MLP replaced along texts."""
    tokens = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    with replaced():
        return Reference(tokens, _logits(model, tokens, prompt.shape[1]))


@torch.no_grad()
def moved(model: nn.Module, steered: Variant, prompt: Int[Tensor, "one seq"], reference: Reference) -> float:
    """Return KL(replaced ‖ steered), in nats a token: how far steering moves the distribution along unsteered texts."""
    with steered():
        logits = _logits(model, reference.tokens, prompt.shape[1])
    return float(kl_divergence(reference.logits, logits).cpu().double().mean())


def _logits(model: nn.Module, tokens: Tensor, prompt_length: int) -> Tensor:
    # One sample after another: the logits of all are many, and the reference's are kept already.
    parts: Sequence[Tensor] = [
        cast(Tensor, cast(Any, model)(input_ids=part, use_cache=False).logits)[:, prompt_length - 1 : -1]
        for part in tokens.split(4)
    ]
    return torch.cat(list(parts))
