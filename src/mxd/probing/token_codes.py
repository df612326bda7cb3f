"""The codes of the tokens of labelled documents, sparse, and samples of the dense layers beside them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from mxd.probing.alignment import TokenizedText, token_labels, tokenize_texts
from mxd.probing.collecting import BATCH_TOKENS, Probed, Report, flow, say_nothing
from mxd.probing.examples import TOKEN_SHARES, Parts, Span, SpanSet, Unlabelled
from mxd.probing.thresholds import SortedEntries

DENSE_ELEMENTS = 2**26
"""Elements of a dense layer that are kept: where all tokens have more, every second or third token is taken."""
TOKEN_IDENTITY = "token identity"
"""Names the features that a token's own id is: what can be told of it without any layer."""
LARGEST_SHARE = 1 / 20
"""Share of the tokens that may be of one document."""


class TokenCodes(NamedTuple):
    """One student's codes of all tokens."""

    name: str
    """`<layer>/<student>`, or `token identity`."""
    values: sparse.csr_array
    """One row a token."""

    @property
    def num_latents(self) -> int:
        """Size of the code."""
        return int(cast("Any", self.values).shape[1])

    def entries(self, part: Int[np.ndarray, " part"]) -> SortedEntries:
        """Return the codes of some tokens, which are numbered anew from 0."""
        rows = cast("sparse.csr_array", self.values[part]).tocoo()
        return SortedEntries.of(rows.col, rows.data, rows.row, len(part), self.num_latents)


class DenseTokens(NamedTuple):
    """A dense layer at some tokens."""

    name: str
    """`<layer>/dense hidden` or `<layer>/residual stream`."""
    tokens: Int[np.ndarray, " kept"]
    """Numbers of the tokens, ascending."""
    values: Float[np.ndarray, "kept width"]
    """One row for each of them, in float32."""


class LabelledTokens(NamedTuple):
    """Tokens with their labels, in the order of documents, and what flowed at them."""

    concepts: list[str]
    """The labels, in order of their names."""
    labels: Bool[np.ndarray, "tokens concepts"]
    """Which tokens bear which."""
    documents: Int[np.ndarray, " tokens"]
    """Number of each token's document."""
    parts: Parts
    """Which tokens are for what; every document is in one part."""
    unlabelled: int
    """Documents that were left out because they could not be labelled."""
    duplicates: int
    """Documents that were left out because they are there already."""
    codes: list[TokenCodes]
    """Of each student, and the tokens themselves."""
    dense: list[DenseTokens]
    """Of each layer."""


class _Labelled(NamedTuple):
    tokens: TokenizedText
    spans: Sequence[Span]
    length: int
    for_test: bool


class _Chosen(NamedTuple):
    tokens: list[TokenizedText]
    labels: Bool[np.ndarray, "tokens concepts"]
    concepts: list[str]
    parts: list[int]
    unlabelled: int
    duplicates: int


def collect_tokens(
    probed: Probed, data: SpanSet, num_tokens: int, report: Report = say_nothing, seed: int = 42
) -> LabelledTokens:
    """Return the labels of a set's tokens, and what flows through the layers at them.

    Documents are taken in a random order, of a long one only its beginning. Memory is that of the codes'
    nonzero entries (12 bytes each), of `DENSE_ELEMENTS` numbers for each dense layer, and of a byte for each concept.

    Args:
        probed: The model and the layers.
        data: The documents.
        num_tokens: Tokens at most.
        report: Is told how far it is.
        seed: Seed of the order of documents.

    Raises:
        ValueError: If fewer than three documents can be used.
    """
    chosen = _choose(probed, data, num_tokens, seed)
    documents = np.repeat(np.arange(len(chosen.tokens)), [len(text.ids) for text in chosen.tokens])
    flown = _Flown(probed, chosen.tokens)
    contexts = [
        text.ids[first : first + probed.body]
        for text in chosen.tokens
        for first in range(0, len(text.ids), probed.body)
    ]
    size, done = max(1, BATCH_TOKENS // probed.context), 0
    for first in range(0, len(contexts), size):
        batch = contexts[first : first + size]
        flown.add(batch, done)
        done += sum(map(len, batch))
        report(f"Reading {data.name}", done, len(documents))
    ids = np.concatenate([text.ids for text in chosen.tokens])
    ones = np.ones(len(ids), dtype=np.float32)
    vocabulary = len(probed.tokenizer)
    identity = sparse.csr_array((ones, (np.arange(len(ids)), ids)), shape=(len(ids), max(vocabulary, ids.max() + 1)))
    return LabelledTokens(
        concepts=chosen.concepts,
        labels=chosen.labels,
        documents=documents,
        parts=Parts(*(np.flatnonzero(np.array(chosen.parts)[documents] == number) for number in range(3))),
        unlabelled=chosen.unlabelled,
        duplicates=chosen.duplicates,
        codes=[*flown.codes(), TokenCodes(TOKEN_IDENTITY, identity)],
        dense=flown.dense(),
    )


def _choose(probed: Probed, data: SpanSet, num_tokens: int, seed: int) -> _Chosen:
    # The same text in two parts would be known before it is tested.
    distinct = sorted({text: place for place, text in reversed([*enumerate(data.texts)])}.values())
    order: list[int] = np.random.default_rng(seed).permutation(distinct).tolist()
    most = max(probed.body, int(num_tokens * LARGEST_SHARE))
    if not data.for_test:
        return _join(list(_within(probed, data, order, num_tokens, most)), data)
    test = int(num_tokens * TOKEN_SHARES[-1])
    known = _within(probed, data, [place for place in order if place not in data.for_test], num_tokens - test, most)
    return _join(
        [*known, *_within(probed, data, [place for place in order if place in data.for_test], test, most)], data
    )


def _within(
    probed: Probed, data: SpanSet, order: Sequence[int], num_tokens: int, most: int
) -> Iterator[_Labelled | None]:
    """Yield the beginnings of documents until there are so many tokens, and None for each that cannot be labelled."""
    for place in order:
        if num_tokens <= 0:
            return
        [text] = tokenize_texts(probed.tokenizer, [data.texts[place]])
        text = text.at(0, min(most, num_tokens))
        try:
            spans = data.spans_of(place)
        except Unlabelled:
            yield None
            continue
        if len(text.ids):
            num_tokens -= len(text.ids)
            yield _Labelled(text, spans, len(data.texts[place]), place in data.for_test)


def _join(found: Sequence[_Labelled | None], data: SpanSet) -> _Chosen:
    documents = [document for document in found if document is not None]
    concepts = sorted({span.label for document in documents for span in document.spans})
    parts = _parts([len(document.tokens.ids) for document in documents], [document.for_test for document in documents])
    if len(set(parts)) < len(TOKEN_SHARES):
        raise ValueError(
            f"Documents to probe with must be three or more, so that training, validation and test have their own; of "
            f"{data.name} {len(documents)} can be used. Give more documents, or ask for more --tokens."
        )
    labels = [token_labels(document.tokens, document.spans, concepts, document.length) for document in documents]
    tokens = [document.tokens for document in documents]
    return _Chosen(
        tokens=tokens,
        labels=np.concatenate(labels),
        concepts=concepts,
        parts=parts,
        unlabelled=len(found) - len(documents),
        duplicates=len(data.texts) - len(set(data.texts)),
    )


def _parts(sizes: Sequence[int], for_test: Sequence[bool]) -> list[int]:
    """Give each document in turn to the part that lacks most of its share, the longest first; some are for test."""
    shares = np.array(TOKEN_SHARES) if not any(for_test) else np.array([*TOKEN_SHARES[:-1], 0.0])
    open_to_all = [place for place, fixed in enumerate(for_test) if not fixed]
    total = sum(sizes[place] for place in open_to_all)
    given = np.zeros(len(shares))
    parts = [len(shares) - 1] * len(sizes)
    for place in sorted(open_to_all, key=lambda place: -sizes[place]):
        parts[place] = int(np.argmax(shares / shares.sum() * total - given))
        given[parts[place]] += sizes[place]
    return parts


class _Flown:
    """Gathers what flows, batch by batch."""

    def __init__(self, probed: Probed, tokens: Sequence[TokenizedText]) -> None:
        self._probed = probed
        self._num_tokens = sum(len(text.ids) for text in tokens)
        self._entries: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self._dense: dict[str, list[np.ndarray]] = {}
        self._kept: dict[str, list[np.ndarray]] = {}

    def add(self, contexts: Sequence[Int[np.ndarray, " _tokens"]], first: int) -> None:
        """Run the model on contexts that begin at this token."""
        flowing = flow(self._probed, contexts, [np.ones(len(ids), dtype=bool) for ids in contexts])
        tokens = np.arange(first, first + sum(map(len, contexts)))
        for name, values in flowing.dense:
            stride = -(-self._num_tokens * values.shape[1] // DENSE_ELEMENTS)
            kept = tokens % stride == 0
            self._kept.setdefault(name, []).append(tokens[kept])
            self._dense.setdefault(name, []).append(values.cpu().numpy()[kept])
        for name, positions, latents, values in flowing.codes:
            rows = (first + positions).astype(np.int32)
            self._entries.setdefault(name, []).append((rows, latents.astype(np.int32), values))

    def codes(self) -> list[TokenCodes]:
        """Return the codes of each student."""
        found: list[TokenCodes] = []
        for student in self._probed.students:
            rows, latents, values = (
                np.concatenate(column) for column in zip(*self._entries.pop(student.name), strict=True)
            )
            shape = (self._num_tokens, student.network.config.num_latents)
            found.append(TokenCodes(student.name, sparse.coo_array((values, (rows, latents)), shape=shape).tocsr()))
        return found

    def dense(self) -> list[DenseTokens]:
        """Return the dense layers."""
        return [
            DenseTokens(name, np.concatenate(self._kept[name]), np.concatenate(parts))
            for name, parts in self._dense.items()
        ]
