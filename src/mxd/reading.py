"""What a layer makes of texts, in Python: sparse codes with their tokens, and what excites each latent most."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from mxd.data.tokenization import bos_token, encode_texts, token_pieces, whole_offsets
from mxd.evaluation.collect import LatentStatistics
from mxd.layers import SparseCode, SparseLayer
from mxd.models import LanguageModel, find_mlp, mlp_pairs, most_positions, require_own_place, require_widths

CONTEXT = 1024
"""Tokens that a model reads together, unless told otherwise or it knows fewer positions."""
BATCH_TOKENS = 4096
"""Tokens of one forward pass, padding counted."""


class TextCode(NamedTuple):
    """The tokens of one text and the code of each; nothing in it is as large as tokens × latents."""

    ids: Int[Tensor, " tokens"]
    """Token ids, without the one that begins a context."""
    pieces: list[str]
    """What each token adds to the text."""
    offsets: list[tuple[int, int]] | None
    """First character of the text that each token stands for, and the one behind its last; None where the tokenizer
    does not know."""
    code: SparseCode
    """Values and indices, one row a token, on the CPU."""


class _Piece(NamedTuple):
    """Some consecutive tokens of one text, which a model reads together."""

    text: int
    ids: list[int]


def codes(
    language_model: LanguageModel,
    layer: SparseLayer,
    texts: str | Sequence[str],
    *,
    block: int | None = None,
    context: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    module_path: str | None = None,
    allow_misplaced: bool = False,
) -> list[TextCode]:
    """Return the sparse code of every token of some texts.

    Each text is read by itself, behind the tokenizer's first token where it has one, whose own code is left out. A text
    longer than a context is read in several, and no token sees what is in another one. Special tokens that are written
    in a text are read as text.

    Args:
        language_model: As `mxd.load_language_model` returns it.
        layer: The layer; where it reads the MLP's output, that is what it is given.
        texts: One text or several.
        block: Index of the block whose MLP the layer belongs to; what its provenance says where None.
        context: Tokens that the model reads together, at most; 1024, or as many as it has positions for, where None.
        batch_tokens: Tokens of one forward pass, padding counted.
        module_path: Where the MLPs are, for a family that is not listed.
        allow_misplaced: As in `mxd.replace_mlp`.

    Raises:
        TypeError: If there are no texts or no loaded model with its tokenizer.
        ValueError: If the block is not known, the layer does not belong there, or the context does not fit the model.

    Example:
        >>> [found] = codes(lm, layer, "import os")  # doctest: +SKIP
        >>> found.pieces, found.code.indices.shape  # doctest: +SKIP
        (['import', ' os'], torch.Size([2, 32]))
    """
    reader = _Reader(language_model, layer, block, context, batch_tokens, module_path, allow_misplaced)
    return list(reader.read([texts] if isinstance(texts, str) else texts))


def latent_statistics(
    language_model: LanguageModel,
    layer: SparseLayer,
    texts: Iterable[str],
    *,
    contexts_kept: int = 8,
    block: int | None = None,
    context: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    module_path: str | None = None,
    allow_misplaced: bool = False,
) -> LatentStatistics:
    """Return how often and how strongly each latent fires on some texts, and where it fires most strongly.

    Texts are read as by `codes`, one batch at a time, and no more is kept of them than the statistics. Of a tokenizer
    without a first token, what begins a context does not count, as in all of mxd's metrics.

    Args:
        language_model: As `mxd.load_language_model` returns it.
        layer: The layer.
        texts: The texts; anything that yields them.
        contexts_kept: Strongest texts that are kept for each latent.
        block: As in `codes`.
        context: As in `codes`.
        batch_tokens: As in `codes`.
        module_path: As in `codes`.
        allow_misplaced: As in `codes`.

    Returns:
        The statistics, in which an activation's `context` is the number of the text, counted from 0, and its
        `position` that of the token among the text's own.

    Raises:
        TypeError: As `codes`.
        ValueError: As `codes`.

    Example:
        >>> for found in latent_statistics(lm, layer, texts).top_contexts(17):  # doctest: +SKIP
        ...     [text] = codes(lm, layer, texts[found.context])
        ...     print(found.value, text.pieces[found.position])
    """
    reader = _Reader(language_model, layer, block, context, batch_tokens, module_path, allow_misplaced)
    statistics = LatentStatistics(layer.num_latents, contexts_kept=contexts_kept)
    for number, found in enumerate(reader.read(texts)):
        positions = torch.arange(len(found.ids))
        counts = torch.ones(len(found.ids), dtype=torch.bool) if reader.bos is not None else positions % reader.body > 0
        code = SparseCode(*(part[counts] for part in found.code))
        statistics.update(code, torch.full_like(positions, number)[counts], positions[counts])
    return statistics


class _Reader:
    """A model and a layer that read texts."""

    def __init__(
        self,
        language_model: LanguageModel,
        layer: SparseLayer,
        block: int | None,
        context: int | None,
        batch_tokens: int,
        module_path: str | None,
        allow_misplaced: bool,
    ) -> None:
        if not isinstance(language_model, LanguageModel):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"language_model must be a model with its tokenizer; got {type(language_model).__name__}. "
                "mxd.load_language_model returns one; or make a mxd.LanguageModel(model, tokenizer, id, revision)."
            )
        block = layer.provenance.layer if block is None else block
        if block is None:
            raise ValueError("The layer's provenance does not say whose MLP it stands for: give block, its index.")
        site = find_mlp(language_model.module, block, module_path)
        if not allow_misplaced:
            require_own_place(language_model.module, site, layer.provenance)
        require_widths(site, layer)
        self._language_model, self._layer, self._block, self._module_path = language_model, layer, block, module_path
        self.bos = bos_token(language_model.tokenizer)
        """The token that begins a context."""
        longest = most_positions(language_model.model)
        context = min(CONTEXT, longest or CONTEXT) if context is None else context
        if longest is not None and context > longest:
            raise ValueError(f"context must be at most {longest}, the model's number of positions; got {context}.")
        self.body = context - (self.bos is not None)
        """Tokens of text in a context, at most."""
        if self.body < 1 or batch_tokens < 1:
            raise ValueError(
                f"context must leave room for a token, and batch_tokens be positive; got {context} and {batch_tokens}."
            )
        self._at_once = max(1, batch_tokens // context)

    def read(self, texts: Iterable[str]) -> Iterator[TextCode]:
        """Yield the texts' codes in their order, reading some texts ahead."""
        waiting: list[str] = []
        tokens = 0
        for text in texts:
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"texts must be strings; got {type(text).__name__}. Decode token ids first.")
            waiting.append(text)
            # An estimate will do: a token has some four characters.
            tokens += 1 + len(text) // 4
            if tokens >= self._at_once * self.body:
                yield from self._texts(waiting)
                waiting, tokens = [], 0
        yield from self._texts(waiting)

    def _texts(self, texts: Sequence[str]) -> Iterator[TextCode]:
        tokenizer = self._language_model.tokenizer
        if not texts:
            return
        is_fast = bool(getattr(tokenizer, "is_fast", False))
        with whole_offsets(tokenizer):
            encoded = encode_texts(tokenizer, texts, return_offsets_mapping=is_fast)
        every: list[list[int]] = encoded["input_ids"]
        offsets = encoded["offset_mapping"] if is_fast else [None] * len(texts)
        pieces = [
            _Piece(number, ids[first : first + self.body])
            for number, ids in enumerate(every)
            for first in range(0, len(ids), self.body)
        ]
        # Those of about one length together, so that little is padding.
        order = sorted(range(len(pieces)), key=lambda number: len(pieces[number].ids))
        found: dict[int, SparseCode] = {}
        for first in range(0, len(order), self._at_once):
            batch = order[first : first + self._at_once]
            found |= zip(batch, self._batch([pieces[number].ids for number in batch]), strict=True)
        parts: list[list[SparseCode]] = [[] for _ in texts]
        for number, piece in enumerate(pieces):
            parts[piece.text].append(found[number])
        for ids, spelt, where, some in zip(every, token_pieces(tokenizer, every), offsets, parts, strict=True):
            yield TextCode(torch.tensor(ids, dtype=torch.long), spelt, where, _joined(some, self._layer))

    @torch.no_grad()
    def _batch(self, contexts: Sequence[Sequence[int]]) -> Iterator[SparseCode]:
        """Yield the codes of some contexts, which the model reads at one time."""
        first = int(self.bos is not None)
        ids = torch.zeros(len(contexts), first + max(map(len, contexts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, context in enumerate(contexts):
            ids[row, first : first + len(context)] = torch.tensor(context)
            mask[row, : first + len(context)] = 1
        if self.bos is not None:
            ids[:, 0] = self.bos
        device = self._language_model.device
        pair = mlp_pairs(
            self._language_model.module, ids.to(device), [self._block], mask.to(device), self._module_path
        )[self._block]
        wanted = mask.bool()
        wanted[:, :first] = False
        code = self._encode(self._layer.given(*pair)[wanted.to(device)])
        ends = accumulate(map(len, contexts), initial=0)
        for begin, end in pairwise(ends):
            yield SparseCode(code.values[begin:end], code.indices[begin:end])

    def _encode(self, x: Tensor) -> SparseCode:
        was_training = self._layer.training
        # A selection that learns its threshold would learn it from these texts.
        self._layer.eval()
        try:
            code = self._layer.encode(x.to(self._layer.scorer.weight))
        finally:
            self._layer.train(was_training)
        return SparseCode(code.values.cpu(), code.indices.cpu())


def _joined(parts: Sequence[SparseCode], layer: SparseLayer) -> SparseCode:
    """Return codes one below the other, padded to the widest."""
    if not parts:
        empty = torch.zeros(0, layer.k, dtype=layer.scorer.bias.dtype)
        return SparseCode(empty, empty.long())
    width = max(part.values.shape[-1] for part in parts)
    padded = ([pad(part, (0, width - part.shape[-1])) for part in column] for column in zip(*parts, strict=True))
    return SparseCode(*map(torch.cat, padded))
