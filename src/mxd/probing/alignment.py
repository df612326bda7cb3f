"""From characters to a language model's tokens."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from mxd.data.tokenization import Tokenizer, encode_texts
from mxd.probing.examples import Span


class TokenizedText(NamedTuple):
    """The tokens of a text, and which of its characters each stands for."""

    ids: Int[np.ndarray, " tokens"]
    """Token ids, without special tokens."""
    starts: Int[np.ndarray, " tokens"]
    """First character of each token that is no white space; of a token of white space, its first."""
    ends: Int[np.ndarray, " tokens"]
    """Behind its last character, likewise."""

    def at(self, first: int, last: int) -> "TokenizedText":
        """Return the tokens from `first` to before `last`."""
        return TokenizedText(*(column[first:last] for column in self))


def tokenize_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[TokenizedText]:
    """Yield each text's tokens with the characters that they stand for; white space at a token's ends is left out.

    Raises:
        ValueError: If the tokenizer cannot say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "Probing needs a tokenizer that knows each token's characters (tokenizer.json); this model's does not. "
            "Convert it to a fast tokenizer of transformers."
        )
    encoded = encode_texts(tokenizer, texts, return_offsets_mapping=True)
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = _without_blanks(text, bounds[:, 0], bounds[:, 1])
        yield TokenizedText(np.array(ids, dtype=np.int64), starts, ends)


def _without_blanks(
    text: str, starts: Int[np.ndarray, " tokens"], ends: Int[np.ndarray, " tokens"]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    blank = np.array([*map(str.isspace, text), True])
    places = np.arange(len(blank))
    # The next character at or behind each place that is not blank, and the last before it.
    following = np.minimum.accumulate(np.where(blank, len(text), places)[::-1])[::-1]
    preceding = np.maximum.accumulate(np.where(blank, -1, places))
    first, last = following[starts], preceding[np.maximum(ends - 1, 0)] + 1
    empty = first >= last
    return np.where(empty, starts, first), np.where(empty, ends, last)


def token_labels(
    tokens: TokenizedText, spans: Sequence[Span], concepts: Sequence[str], length: int
) -> Bool[np.ndarray, "tokens concepts"]:
    """Return which tokens bear which labels: those of whose characters a labelled span holds at least half.

    Args:
        tokens: The tokens.
        spans: The labelled characters; spans of other labels than `concepts` are left out.
        concepts: The labels.
        length: Number of characters of the text.
    """
    numbers = {concept: number for number, concept in enumerate(concepts)}
    edges = np.zeros((length + 1, len(concepts)), dtype=np.int32)
    for span in spans:
        if span.label in numbers:
            edges[span.start, numbers[span.label]] += 1
            edges[span.end, numbers[span.label]] -= 1
    held = np.zeros((length + 1, len(concepts)), dtype=np.int32)
    held[1:] = np.cumsum(np.cumsum(edges, axis=0)[:-1] > 0, axis=0)
    inside = held[tokens.ends] - held[tokens.starts]
    return (2 * inside >= (tokens.ends - tokens.starts)[:, None]) & (inside > 0)
