"""What an edit that stays costs: the model's loss where the edited latents matter, and where they should not."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mxd.data.text import TextSource
from mxd.data.tokenization import Tokenizer, bos_token, encoded_documents
from mxd.edits import Edit, with_edits
from mxd.evaluation.faithfulness import Candidate, EvaluationText, replacement, tokens_at_once
from mxd.metrics import kl_divergence, next_token_losses
from mxd.models import device_of, mlp_pairs

FIRING, NEAR, ELSEWHERE, CONCEPT = (
    "tokens on which an edited latent fires",
    "other tokens of their contexts",
    "contexts in which none fires",
    "the concept's text",
)


class Effect(NamedTuple):
    """The losses on one sort of tokens, in nats a token."""

    group: str
    """Which tokens: those behind which the next one is predicted."""
    tokens: int
    """How many."""
    original: float
    """Cross-entropy of the original model."""
    before: float
    """Cross-entropy with the layer in place, with the edits that it had."""
    after: float
    """Cross-entropy with the new ones."""
    kl: float
    """KL(before ‖ after)."""


@torch.no_grad()
def side_effects(
    model: nn.Module,
    place: Candidate,
    before: Sequence[Edit],
    after: Sequence[Edit],
    text: EvaluationText,
    concept: EvaluationText | None = None,
) -> list[Effect]:
    """Return what a change of a layer's edits does to the model's predictions.

    Args:
        model: A language model.
        place: The layer and where it stands.
        before: Its edits.
        after: Those that take their place.
        text: What the model reads; it is parted by where the latents that either names fire, as the layer was trained.
        concept: Text that has the concept, which is one group of its own.

    Returns:
        A row for each group that has tokens.
    """
    latents = sorted({latent for edit in (*before, *after) for latent in edit.latents})
    totals: dict[str, Tensor] = {}
    for part in (text, *([concept] if concept is not None else [])):
        for _, contexts in part.chunks(tokens_at_once(model)):
            contexts = contexts.to(device_of(model))
            groups = {CONCEPT: torch.ones_like(contexts[:, 1:], dtype=torch.bool)}
            if part is text:
                groups = _groups(_fires(model, place, latents, contexts, part))
            numbers = _losses(model, place, before, after, contexts, part)
            for name, mask in groups.items():
                some = numbers[:, mask.cpu()]
                sums = torch.cat([torch.tensor([some.shape[1]], dtype=torch.float64), some.sum(1)])
                totals[name] = totals[name] + sums if name in totals else sums
    return [
        Effect(name, int(sums[0]), *(sums[1:] / sums[0]).tolist())
        for name in (FIRING, NEAR, ELSEWHERE, CONCEPT)
        if (sums := totals.get(name)) is not None and sums[0]
    ]


def concept_text(
    source: TextSource, tokenizer: Tokenizer, like: EvaluationText, *, vocab_size: int, tokens: int
) -> EvaluationText:
    """Return all documents of a text, held out or not, as contexts; a text shorter than one context is one by itself.

    Args:
        source: The text.
        tokenizer: Turns it into tokens.
        like: Text of the run, whose length of contexts and special tokens are taken.
        vocab_size: Size of the model's vocabulary.
        tokens: Tokens to take at most.

    Raises:
        ValueError: If it holds no two tokens.
    """
    documents = itertools.chain(source.documents(held_out=True), source.documents(held_out=False))
    ids: list[int] = []
    for encoded in encoded_documents(documents, tokenizer, vocab_size):
        ids += encoded.ids.tolist()
        if len(ids) >= tokens:
            break
    first = bos_token(tokenizer)
    body = like.contexts.shape[1] - (first is not None)
    ids = ids[:tokens]
    body = min(body, len(ids))
    if body < 2:
        raise ValueError(
            f"The concept's text must hold at least two tokens; {source.name} holds {len(ids)}. Give more."
        )
    rows = np.array(ids[: len(ids) // body * body], dtype=np.int64).reshape(-1, body)
    if first is not None:
        rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=first)
    contexts = torch.from_numpy(rows)
    return EvaluationText(
        contexts=contexts,
        documents=torch.zeros_like(contexts),
        special_ids=like.special_ids,
        passthrough=like.passthrough,
        module_path=like.module_path,
    )


def _fires(
    model: nn.Module, place: Candidate, latents: Sequence[int], contexts: Tensor, text: EvaluationText
) -> Bool[Tensor, "n context"]:
    pair = mlp_pairs(model, contexts, [place.layer], module_path=text.module_path)[place.layer]
    network = with_edits(place.network, ())
    code = network.encode(network.given(*pair).float())
    named = torch.isin(code.indices, torch.tensor(latents, dtype=code.indices.dtype, device=code.indices.device))
    return (named & (code.values > 0)).any(-1)


def _groups(fires: Bool[Tensor, "n context"]) -> Mapping[str, Bool[Tensor, "n positions"]]:
    somewhere = fires.any(1, keepdim=True)
    here = fires[:, :-1]
    return {FIRING: here, NEAR: somewhere & ~here, ELSEWHERE: (~somewhere).expand_as(here)}


def _losses(
    model: nn.Module,
    place: Candidate,
    before: Sequence[Edit],
    after: Sequence[Edit],
    contexts: Int[Tensor, "n context"],
    text: EvaluationText,
) -> Tensor:
    """Return the three losses and the divergence of each predicted token, in float64 on the CPU."""
    original = cast(Tensor, model(contexts, use_cache=False).logits)
    found = [next_token_losses(original, contexts)]
    logits: list[Tensor] = []
    for edits in (before, after):
        with replacement(model, {place.layer: with_edits(place.network, edits)}, text)():
            logits.append(cast(Tensor, model(contexts, use_cache=False).logits))
        found.append(next_token_losses(logits[-1], contexts))
    found.append(kl_divergence(logits[0][:, :-1], logits[1][:, :-1]))
    return torch.stack([part.cpu().double() for part in found])
