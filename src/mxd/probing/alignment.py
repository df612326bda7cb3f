"""From characters to a language model's tokens."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mxd.data.tokenization import Tokenizer, encode_texts, whole_offsets
from mxd.probing.examples import Span

CHARACTERS_A_TOKEN = 64
"""Characters of a long text that are tokenised for each token that is asked for: tokens take a hundred times the memory
of their text, and so many are as good as never in one token."""


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
    with whole_offsets(tokenizer):
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


def token_labels(tokens: TokenizedText, spans: Sequence[Span]) -> dict[str, Int[np.ndarray, " bearing"]]:
    """Return which tokens bear each label: those of whose characters its spans hold at least half.

    Memory is that of the spans and of what is returned, whatever the length of the text and the number of labels.

    Args:
        tokens: The tokens.
        spans: The labelled characters; they may overlap.
    """
    by_label: dict[str, list[tuple[int, int]]] = {}
    for span in spans:
        by_label.setdefault(span.label, []).append((span.start, span.end))
    lengths = tokens.ends - tokens.starts
    found: dict[str, Int[np.ndarray, " bearing"]] = {}
    for label, edges in by_label.items():
        held = _Union(np.array(edges, dtype=np.int64))
        inside = held.before(tokens.ends) - held.before(tokens.starts)
        bearing = np.flatnonzero((2 * inside >= lengths) & (inside > 0))
        if len(bearing):
            found[label] = bearing
    return found


class _Union:
    """The characters that any of some spans holds."""

    def __init__(self, edges: Int[np.ndarray, "spans 2"]) -> None:
        edges = edges[np.argsort(edges[:, 0], kind="stable")]
        reached = np.maximum.accumulate(edges[:, 1])
        begins = np.flatnonzero(edges[:, 0] > np.concatenate([[-1], reached[:-1]]))
        self._starts = edges[begins, 0]
        self._ends = reached[np.append(begins[1:], len(edges)) - 1]
        self._held = np.concatenate([[0], np.cumsum(self._ends - self._starts)])

    def before(self, places: Int[np.ndarray, " places"]) -> Int[np.ndarray, " places"]:
        """Return how many of the characters before each place are held."""
        number = np.searchsorted(self._starts, places, side="right")
        last = np.maximum(number - 1, 0)
        return np.where(number > 0, self._held[last] + np.minimum(places, self._ends[last]) - self._starts[last], 0)
