"""Whether a model writes on as before when its MLPs are replaced."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.evaluation.faithfulness import EvaluationText, Variant, tokens_at_once
from mxd.evaluation.sampling import evenly_spaced
from mxd.models import device_of

LONGEST = 8
"""Tokens of a continuation: agreement is reported from the first 1 to the first 8 of them (the paper's own protocol is
not known)."""

NUM_PROMPTS = 256
"""Prompts at most. A share of 0.9 then has a standard error of 0.02, and all students are given the same prompts."""

PROMPT_TOKENS = 32
"""Tokens of a prompt, or fewer where a context would not hold prompt and continuation: enough for a model to know what
it is reading, and a fraction of the work of the losses, which read whole contexts."""

_TOKENS_AT_ONCE = 4096
"""Tokens of the prompts of one batch."""


@torch.no_grad()
def greedy_continuations(
    model: nn.Module, prompts: Int[Tensor, "prompts seq"], num_tokens: int = LONGEST
) -> Int[Tensor, "prompts num_tokens"]:
    """Return the tokens that a model writes behind each prompt if it always takes the likeliest.

    The model runs with its key-value cache, as it does for a user. It writes on behind an end-of-text token, and
    nothing but its logits decides: no generation config is read.

    Args:
        model: A Hugging Face language model.
        prompts: Token ids, without padding.
        num_tokens: How many tokens to write.
    """
    last = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    written: list[Tensor] = []
    given, cache = prompts, None
    for _ in range(num_tokens):
        mask = prompts.new_ones(len(prompts), prompts.shape[1] + len(written))
        output = cast(Any, model)(input_ids=given, attention_mask=mask, past_key_values=cache, use_cache=True, **last)
        cache = output.past_key_values
        given = cast(Tensor, output.logits)[:, -1:].argmax(-1)
        written.append(given)
    return torch.cat(written, 1)


def agreement(
    original: Int[Tensor, "prompts num_tokens"], replaced: Int[Tensor, "prompts num_tokens"]
) -> Float[Tensor, " num_tokens"]:
    """Return the share of the prompts whose first 1, 2, … tokens are all the same, in float64."""
    return (original == replaced).cumprod(1).cpu().double().mean(0)


def ngram_agreements(
    model: nn.Module, variants: Mapping[str, Variant], text: EvaluationText
) -> dict[str, tuple[float, ...]]:
    """Return how often each variant of a model continues held-out prompts exactly as the model itself does.

    The n-gram agreement of Oldfield et al. (2025): the share of prompts whose first n = 1 … 8 tokens, greedily
    continued, are the model's own; it falls with n. Two models that differ by rounding alone may differ where two
    tokens are equally likely, which in bfloat16 is not rare; model and variants therefore run on the same batches.

    Args:
        model: A language model.
        variants: Makes the context in which the model runs as the variant, by name.
        text: The prompts are the beginnings of some of its contexts, evenly spaced.

    Returns:
        The shares by name, each from n = 1 to n = 8.
    """
    same = {name: torch.zeros(LONGEST, dtype=torch.float64) for name in variants}
    num_prompts = 0
    for prompts in _batches(model, text):
        num_prompts += len(prompts)
        original = greedy_continuations(model, prompts)
        for name, variant in variants.items():
            with variant():
                replaced = greedy_continuations(model, prompts)
            same[name] += agreement(original, replaced) * len(prompts)
    return {name: tuple((total / num_prompts).tolist()) for name, total in same.items()}


def _batches(model: nn.Module, text: EvaluationText) -> Iterator[Int[Tensor, "prompts seq"]]:
    length = max(1, min(PROMPT_TOKENS, text.contexts.shape[1] - LONGEST))
    prompts = text.contexts[evenly_spaced(len(text.contexts), NUM_PROMPTS), :length]
    tokens = _TOKENS_AT_ONCE if _keeps_logits(model) else tokens_at_once(model)
    size = max(1, tokens // length)
    for first in range(0, len(prompts), size):
        yield prompts[first : first + size].to(device_of(model))


def _keeps_logits(model: nn.Module) -> bool:
    """Return whether the model can compute the logits of the last position alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
