"""From documents to contexts of token ids: packing, the two kinds of stream, and what is held out."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from mxd.data.documents import Document
from mxd.data.text import LocalText, TextSource
from mxd.data.tokenization import (
    Tokenizer,
    bos_token,
    cached_training_tokens,
    decode_tokens,
    encoded_documents,
    eos_token,
    pad_token,
)


class TokenPosition(NamedTuple):
    """How far a stream of tokens has been read; `_asdict()` is JSON, and `TokenPosition(**that)` reads it back."""

    epoch: int
    """Number of times the text has been read through."""
    item: int
    """The next context of the epoch, or for a streamed text the row of the next document."""
    offset: int = 0
    """Tokens already taken from that document; 0 for local text."""


class TokenStream(ABC):
    """Training contexts without end: a pure function of how it was built and of its position.

    Args:
        context: Length of a context, in tokens.
        bos: Token that begins each context, where the tokenizer has one.
    """

    def __init__(self, context: int, bos: int | None) -> None:
        if context < 2:
            raise ValueError(f"A context must have at least 2 tokens; got {context}. Choose a longer --context.")
        self.context = context
        self.bos = bos

    @property
    def body(self) -> int:
        """Tokens of text in a context: all but the one that begins it."""
        return self.context - (self.bos is not None)

    @property
    @abstractmethod
    def epoch(self) -> int:
        """Number of times the text was read through before the next context."""

    @abstractmethod
    def epochs_for(self, tokens: int) -> float | None:
        """How often `tokens` tokens read through the text, or None where its size is not known."""

    @abstractmethod
    def take(self, count: int) -> Int[Tensor, "count context"]:
        """Return the next `count` contexts as int64."""

    @abstractmethod
    def state(self) -> TokenPosition:
        """The position of the next context."""

    @abstractmethod
    def restore(self, position: TokenPosition) -> None:
        """Go to a position that `state` gave, of a stream built in the same way."""


class LocalTokens(TokenStream):
    """Contexts of tokens that are at hand as one array.

    Epoch e cuts the array into contexts from an offset below the length of a context, and puts them in an order;
    both are drawn from `(seed, e)`, so that no two epochs see the same contexts.

    Args:
        tokens: The training documents, joined.
        context: Length of a context, in tokens.
        bos: Token that begins each context, where the tokenizer has one.
        seed: Seed of offsets and orders.

    Raises:
        ValueError: If the tokens do not fill one context.
    """

    def __init__(self, tokens: Integer[np.ndarray, " num_tokens"], *, context: int, bos: int | None, seed: int) -> None:
        super().__init__(context, bos)
        if len(tokens) < self.body:
            raise ValueError(
                f"The training text must fill one context of {context} tokens; it holds {len(tokens)} tokens. "
                "Give more text, or choose a shorter --context."
            )
        self._tokens = tokens
        self._seed = seed
        self.restore(TokenPosition(0, 0))

    @property
    def epoch(self) -> int:
        """Number of times the text was read through before the next context."""
        return self._epoch

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of one epoch's contexts; an epoch whose offset is large may have one context less."""
        return _full_contexts(len(self._tokens), self.context, self.bos) * self.context

    def epochs_for(self, tokens: int) -> float:
        """How often `tokens` tokens read through the text."""
        return tokens / self.tokens_per_epoch

    def take(self, count: int) -> Int[Tensor, "count context"]:
        """Return the next `count` contexts as int64."""
        contexts = np.full((count, self.context), -1 if self.bos is None else self.bos, dtype=np.int64)
        filled = 0
        while filled < count:
            starts = self._starts[self._index : self._index + count - filled]
            rows = slice(filled, filled + len(starts))
            contexts[rows, self.context - self.body :] = self._tokens[starts[:, None] + np.arange(self.body)]
            filled += len(starts)
            self._index += len(starts)
            if self._index == len(self._starts):
                self.restore(TokenPosition(self._epoch + 1, 0))
        return torch.from_numpy(contexts)

    def state(self) -> TokenPosition:
        """The position of the next context."""
        return TokenPosition(self._epoch, self._index)

    def restore(self, position: TokenPosition) -> None:
        """Go to a position that `state` gave, of a stream built in the same way."""
        random = np.random.default_rng([self._seed, position.epoch])
        offset = random.integers(min(self.body, len(self._tokens) - self.body + 1))
        starts = offset + self.body * random.permutation((len(self._tokens) - offset) // self.body)
        if position.item >= len(starts) or position.offset:
            raise ValueError(
                f"A position in this text must lie below context {len(starts)}; got {position}. "
                "Resume with the text and the context that the run began with."
            )
        self._epoch, self._index, self._starts = position.epoch, position.item, starts


class StreamedTokens(TokenStream):
    """Contexts of documents that are read one after the other, in the source's order, and then again.

    Contexts run on from the last document to the first. A position is a row and a place in its document, and is
    restored by skipping.

    Args:
        source: The documents.
        tokenizer: Turns text into tokens; may be None where all documents have ids.
        context: Length of a context, in tokens.
        vocab_size: Size of the model's vocabulary, which no id may reach.
        batch_tokens: Tokens that one reading of the text must hold at least.
    """

    def __init__(
        self, source: TextSource, tokenizer: Tokenizer | None, *, context: int, vocab_size: int, batch_tokens: int
    ) -> None:
        super().__init__(context, bos_token(tokenizer))
        self._source = source
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._batch_tokens = batch_tokens
        self.restore(TokenPosition(0, 0))

    @property
    def epoch(self) -> int:
        """Number of times the text was read through before the next context."""
        return self._epoch

    def epochs_for(self, tokens: int) -> None:
        """None: the size of a streamed text is not known."""

    def take(self, count: int) -> Int[Tensor, "count context"]:
        """Return the next `count` contexts as int64."""
        contexts = np.full((count, self.context), -1 if self.bos is None else self.bos, dtype=np.int64)
        contexts[:, self.context - self.body :] = self._read(count * self.body).reshape(count, self.body)
        return torch.from_numpy(contexts)

    def state(self) -> TokenPosition:
        """The position of the next context."""
        if self._offset < len(self._document):
            return TokenPosition(self._epoch, self._row, self._offset)
        return TokenPosition(self._epoch, self._row + 1)

    def restore(self, position: TokenPosition) -> None:
        """Go to a position that `state` gave, of a stream built in the same way."""
        self._begin(position.epoch, position.item)
        if position.offset and (not self._next_document() or self._row != position.item):
            raise ValueError(
                f"Row {position.item} of {self._source.name} must be the training document that was being read; "
                "it is none now. Resume with the text and the revision that the run began with."
            )
        self._offset = position.offset

    def _begin(self, epoch: int, row: int) -> None:
        documents = self._source.documents(held_out=False, skip=row)
        self._documents = encoded_documents(documents, self._tokenizer, self._vocab_size)
        self._epoch, self._row, self._offset = epoch, row - 1, 0
        self._document = np.empty(0, dtype=np.uint32)
        # Tokens since the text's first row; None where the reading began further on.
        self._seen = 0 if row == 0 else None

    def _next_document(self) -> bool:
        encoded = next(self._documents, None)
        if encoded is None:
            return False
        self._row, self._document, self._offset = encoded.row, encoded.ids, 0
        if self._seen is not None:
            self._seen += len(encoded.ids)
        return True

    def _read(self, count: int) -> Integer[np.ndarray, " count"]:
        tokens = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            if self._offset >= len(self._document) and not self._next_document():
                if self._seen is not None:
                    _require_batch(self._source, self._seen, self._batch_tokens)
                self._begin(self._epoch + 1, 0)
                continue
            part = self._document[self._offset : self._offset + count - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            self._offset += len(part)
        return tokens


def open_tokens(
    source: TextSource,
    tokenizer: Tokenizer | None,
    *,
    context: int,
    batch_tokens: int,
    vocab_size: int,
    seed: int,
    cache: Path | None = None,
) -> TokenStream:
    """Return the stream of training contexts that suits the source.

    Args:
        source: Where the documents come from. Local text is tokenised whole, once, and kept on disk.
        tokenizer: Turns text into tokens; may be None where all documents have ids.
        context: Length of a context, in tokens.
        batch_tokens: Tokens of a training batch; the text must hold at least as many.
        vocab_size: Size of the model's vocabulary, which no id may reach.
        seed: Seed of the order of local text; streamed text comes in its own order.
        cache: Folder of the tokens of local text; `$MXD_CACHE` or `~/.cache/mxd` where None.

    Raises:
        ValueError: If the text is too short, or does not suit the vocabulary.
    """
    if not isinstance(source, LocalText):
        return StreamedTokens(source, tokenizer, context=context, vocab_size=vocab_size, batch_tokens=batch_tokens)
    tokens = cached_training_tokens(source, tokenizer, vocab_size=vocab_size, cache=cache)
    bos = bos_token(tokenizer)
    _require_batch(source, _full_contexts(len(tokens), context, bos) * context, batch_tokens)
    return LocalTokens(tokens, context=context, bos=bos, seed=seed)


class HeldOut(NamedTuple):
    """Held-out text, packed as training text is."""

    contexts: Int[Tensor, "n context"]
    """Contexts in the order of the documents, none twice."""
    documents: Int[Tensor, "n context"]
    """Number of the document that each token comes from, counted from 0; the token that begins a context counts to the
    document of the next."""
    num_bytes: int | None
    """Bytes of UTF-8 that the scored tokens stand for: all but each context's first. None without a tokenizer."""


def held_out_contexts(
    source: TextSource, tokenizer: Tokenizer | None, *, context: int, num_tokens: int, vocab_size: int
) -> HeldOut:
    """Return at most `num_tokens` tokens of held-out documents, in full contexts.

    Args:
        source: Where the documents come from; a streamed text is read only as far as needed.
        tokenizer: Turns text into tokens; may be None where all documents have ids.
        context: Length of a context, in tokens.
        num_tokens: Tokens that are wanted, the ones that begin contexts counted; fewer where the text has fewer.
        vocab_size: Size of the model's vocabulary, which no id may reach.

    Raises:
        ValueError: If the held-out documents, or `num_tokens`, do not fill one context.
    """
    documents, name = source.documents(held_out=True), f"The held-out documents of {source.name}"
    return packed_contexts(documents, name, tokenizer, context=context, num_tokens=num_tokens, vocab_size=vocab_size)


def packed_contexts(
    source: Iterable[Document],
    name: str,
    tokenizer: Tokenizer | None,
    *,
    context: int,
    num_tokens: int,
    vocab_size: int,
) -> HeldOut:
    """Return at most `num_tokens` tokens of these documents as `held_out_contexts` does; `name` is for messages.

    Raises:
        ValueError: If the documents, or `num_tokens`, do not fill one context.
    """
    if not 2 <= context <= num_tokens:
        raise ValueError(
            f"Held-out tokens must fill one context of at least 2 tokens; got {num_tokens} tokens and a context of "
            f"{context}. Ask for more tokens, or choose another --context."
        )
    bos = bos_token(tokenizer)
    body = context - (bos is not None)
    wanted = num_tokens // context * body
    parts: list[Integer[np.ndarray, " length"]] = []
    length = 0
    for encoded in encoded_documents(source, tokenizer, vocab_size):
        parts.append(encoded.ids)
        length += len(encoded.ids)
        if length >= wanted:
            break
    if length < body:
        raise ValueError(
            f"{name} must fill one context of {context} tokens; they hold {length}. "
            "Give more text, or choose a shorter --context."
        )
    kept = min(wanted, length // body * body)
    stream = np.concatenate(parts)[:kept].astype(np.int64).reshape(-1, body)
    documents = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[:kept].reshape(-1, body)
    if bos is not None:
        stream = np.pad(stream, ((0, 0), (1, 0)), constant_values=bos)
        documents = np.pad(documents, ((0, 0), (1, 0)), mode="edge")
    contexts = torch.from_numpy(stream)
    num_bytes = None if tokenizer is None else _num_bytes(contexts, tokenizer)
    return HeldOut(contexts, torch.from_numpy(documents), num_bytes)


def special_tokens(tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens that are no content: the tokenizer's BOS and padding (for GPT-2, where BOS is EOS, that too)."""
    return frozenset(token for token in (bos_token(tokenizer), pad_token(tokenizer)) if token is not None)


def content_positions(contexts: Int[Tensor, "n context"], special_ids: Collection[int]) -> Bool[Tensor, "n context"]:
    """Where the tokens are content: everything that is none of `special_ids`, but for what begins a context.

    That is BOS where the tokenizer has one. Where it has none, models attend to whatever token begins a context as they
    would to BOS (Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.1), and its
    activations, which are unlike all others, would decide every mean.
    """
    special = torch.tensor(sorted(special_ids), dtype=contexts.dtype, device=contexts.device)
    content = ~torch.isin(contexts, special)
    content[:, :1] = False
    return content


def _full_contexts(tokens: int, context: int, bos: int | None) -> int:
    return tokens // (context - (bos is not None))


def _num_bytes(contexts: Int[Tensor, "n context"], tokenizer: Tokenizer) -> int:
    scored = contexts[:, 1:]
    # Behind a BOS the contexts' texts run on into each other, and characters may be cut between them: decode at once.
    runs = [scored.flatten()] if bos_token(tokenizer) is not None else list(scored)
    added = {bos_token(tokenizer), eos_token(tokenizer)}
    return sum(
        len(
            decode_tokens(tokenizer, [token for token in run.tolist() if token not in added]).encode("utf-8", "replace")
        )
        for run in runs
    )


def _require_batch(source: TextSource, tokens: int, batch_tokens: int) -> None:
    if tokens < batch_tokens:
        raise ValueError(
            f"The training text must fill one batch of {batch_tokens} tokens; {source.name} is a text with too few "
            f"tokens for one batch: {tokens}. Give more text, or lower --batch-tokens."
        )
