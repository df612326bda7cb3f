"""The codes of the tokens of labelled documents, sparse, and samples of the dense layers beside them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from mxd.probing.alignment import CHARACTERS_A_TOKEN, token_labels, tokenize_texts
from mxd.probing.collecting import BATCH_TOKENS, Probed, Report, flow, say_nothing
from mxd.probing.examples import (
    LEAST_IN_PART,
    TOKEN_SHARES,
    Parts,
    Skipped,
    Span,
    SpanSet,
    Unlabelled,
    check_tokens,
)
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
    """The labels that have enough tokens in each part, in order of their names."""
    labels: Bool[np.ndarray, "tokens concepts"]
    """Which tokens bear which."""
    skipped: list[Skipped]
    """The other labels."""
    documents: Int[np.ndarray, " tokens"]
    """Number of each token's document."""
    groups: Int[np.ndarray, " tokens"]
    """Number of each token's group of documents, or document where that is of none."""
    parts: Parts
    """Which tokens are for what; every group is in one part."""
    unlabelled: int
    """Documents that were left out because they could not be labelled."""
    duplicates: int
    """Documents that were left out because they are there already."""
    codes: list[TokenCodes]
    """Of each student, and the tokens themselves."""
    dense: list[DenseTokens]
    """Of each layer."""


class _Labelled(NamedTuple):
    ids: Int[np.ndarray, " tokens"]
    bearing: Mapping[str, Int[np.ndarray, " bearing"]]
    group: object
    for_test: bool


class _Chosen(NamedTuple):
    documents: list[_Labelled]
    unlabelled: int
    duplicates: int


def collect_tokens(
    probed: Probed, data: SpanSet, num_tokens: int, report: Report = say_nothing, seed: int = 42
) -> LabelledTokens:
    """Return the labels of a set's tokens, and what flows through the layers at them.

    Documents are taken in a random order, of a long one only its beginning. Memory is that of the codes'
    nonzero entries (12 bytes each), of `DENSE_ELEMENTS` numbers for each dense layer, and of a byte for each token and
    concept that has enough tokens.

    Args:
        probed: The model and the layers.
        data: The documents.
        num_tokens: Tokens at most.
        report: Is told how far it is.
        seed: Seed of the order of documents.

    Raises:
        ValueError: If fewer than three documents, or groups of them, can be used, or none of those that are for the
            test, or a span does not fit its text.
    """
    check_tokens(num_tokens)
    chosen = _choose(probed, data, num_tokens, seed)
    numbers: dict[object, int] = {}
    groups = [numbers.setdefault(document.group, len(numbers)) for document in chosen.documents]
    group_of = np.array(groups, dtype=np.int64)
    part_of = _part_of_each(chosen.documents, group_of, data)
    sizes = [len(document.ids) for document in chosen.documents]
    documents = np.repeat(np.arange(len(sizes)), sizes)
    parts = Parts(*(np.flatnonzero(part_of[documents] == number) for number in range(len(TOKEN_SHARES))))
    concepts, labels, skipped = _labels(chosen.documents, parts)
    flown = _Flown(probed, len(documents))
    contexts = [
        document.ids[first : first + probed.body]
        for document in chosen.documents
        for first in range(0, len(document.ids), probed.body)
    ]
    size, done = max(1, BATCH_TOKENS // probed.context), 0
    for first in range(0, len(contexts), size):
        batch = contexts[first : first + size]
        flown.add(batch, done)
        done += sum(map(len, batch))
        report(f"Reading {data.name}", done, len(documents))
    ids = np.concatenate([document.ids for document in chosen.documents])
    ones = np.ones(len(ids), dtype=np.float32)
    vocabulary = len(probed.tokenizer)
    identity = sparse.csr_array((ones, (np.arange(len(ids)), ids)), shape=(len(ids), max(vocabulary, ids.max() + 1)))
    return LabelledTokens(
        concepts=concepts,
        labels=labels,
        skipped=skipped,
        documents=documents,
        groups=group_of[documents],
        parts=parts,
        unlabelled=chosen.unlabelled,
        duplicates=chosen.duplicates,
        codes=[*flown.codes(), TokenCodes(TOKEN_IDENTITY, identity)],
        dense=flown.dense(),
    )


def _choose(probed: Probed, data: SpanSet, num_tokens: int, seed: int) -> _Chosen:
    # The same text in two parts would be known before it is tested, and one of the training's is for no test.
    first = {text: place for place, text in reversed([*enumerate(data.texts)]) if place in data.for_test}
    first |= {text: place for place, text in reversed([*enumerate(data.texts)]) if place not in data.for_test}
    distinct = sorted(first.values())
    order: list[int] = np.random.default_rng(seed).permutation(distinct).tolist()
    most = max(probed.body, int(num_tokens * LARGEST_SHARE))
    known = [place for place in order if place not in data.for_test]
    test = int(num_tokens * TOKEN_SHARES[-1]) if data.for_test else 0
    found = [
        *_within(probed, data, known, num_tokens - test, most),
        *_within(probed, data, [place for place in order if place in data.for_test], test, most),
    ]
    documents = [document for document in found if document is not None]
    return _Chosen(documents, len(found) - len(documents), len(data.texts) - len(distinct))


def _within(
    probed: Probed, data: SpanSet, order: Sequence[int], num_tokens: int, most: int
) -> Iterator[_Labelled | None]:
    """Yield the beginnings of documents until there are so many tokens, and None for each that cannot be labelled."""
    for place in order:
        if num_tokens <= 0:
            return
        wanted = min(most, num_tokens)
        [text] = tokenize_texts(probed.tokenizer, [data.texts[place][: wanted * CHARACTERS_A_TOKEN]])
        text = text.at(0, wanted)
        try:
            spans = data.spans_of(place)
        except Unlabelled:
            yield None
            continue
        if len(text.ids):
            num_tokens -= len(text.ids)
            _check_spans(spans, data, place)
            group = data.groups[place] if data.groups else None
            yield _Labelled(
                text.ids, token_labels(text, spans), place if group is None else group, place in data.for_test
            )


def _check_spans(spans: Sequence[Span], data: SpanSet, place: int) -> None:
    length = len(data.texts[place])
    for span in spans:
        if not 0 <= span.start < span.end <= length:
            raise ValueError(
                f"A span must fit its text, 0 ≤ start < end ≤ {length} characters; document {place + 1} of {data.name} "
                f"has {span.start} to {span.end}. Mend what labels it."
            )


def _part_of_each(
    documents: Sequence[_Labelled], group_of: Int[np.ndarray, " documents"], data: SpanSet
) -> Int[np.ndarray, " documents"]:
    sizes = np.bincount(group_of, weights=[len(document.ids) for document in documents]).astype(int).tolist()
    for_test = [False] * len(sizes)
    for group, document in zip(group_of.tolist(), documents, strict=True):
        for_test[group] |= document.for_test
    if data.for_test and not any(for_test):
        raise ValueError(
            f"Some of the documents that are for the test must be used; of {data.name} none can. Ask for more --tokens."
        )
    parts = np.array(_parts(sizes, for_test), dtype=np.int64)
    if len(set(parts.tolist())) < len(TOKEN_SHARES):
        raise ValueError(
            f"Documents to probe with must be three or more, so that training, validation and test have their own; of "
            f"{data.name} {len(sizes)} can be used, documents of a group counted once. Give more documents, or ask for "
            "more --tokens."
        )
    return parts[group_of]


def _labels(
    documents: Sequence[_Labelled], parts: Parts
) -> tuple[list[str], Bool[np.ndarray, "tokens concepts"], list[Skipped]]:
    """Return the concepts that have enough tokens, and enough others, in each part, with their tokens."""
    offsets = np.cumsum([0, *(len(document.ids) for document in documents)])
    bearing: dict[str, list[Int[np.ndarray, " bearing"]]] = {}
    for offset, document in zip(offsets.tolist(), documents, strict=False):
        for label, tokens in document.bearing.items():
            bearing.setdefault(label, []).append(offset + tokens)
    part_of = np.empty(offsets[-1], dtype=np.int64)
    for number, part in enumerate(parts):
        part_of[part] = number
    sizes = np.array([len(part) for part in parts])
    kept: dict[str, Int[np.ndarray, " bearing"]] = {}
    skipped: list[Skipped] = []
    for label in sorted(bearing):
        tokens = np.concatenate(bearing.pop(label))
        with_it = np.bincount(part_of[tokens], minlength=len(parts))
        if np.all((with_it >= LEAST_IN_PART) & (sizes - with_it >= LEAST_IN_PART)):
            kept[label] = tokens
        else:
            skipped.append(Skipped(label, len(tokens), LEAST_IN_PART * len(parts)))
    labels = np.zeros((len(part_of), len(kept)), dtype=bool)
    for column, tokens in enumerate(kept.values()):
        labels[tokens, column] = True
    return list(kept), labels, skipped


def have_enough(labels: Bool[np.ndarray, "tokens concepts"], parts: Parts) -> Bool[np.ndarray, " concepts"]:
    """Return which concepts have enough tokens, and enough others, in each part to be probed for."""
    with_it = np.stack([labels[part].sum(axis=0) for part in parts])
    sizes = np.array([[len(part)] for part in parts])
    return np.all((with_it >= LEAST_IN_PART) & (sizes - with_it >= LEAST_IN_PART), axis=0)


def _parts(sizes: Sequence[int], for_test: Sequence[bool]) -> list[int]:
    """Give each document, or group of them, in turn to the part that lacks most of its share, the longest first.

    Some are for the test.
    """
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

    def __init__(self, probed: Probed, num_tokens: int) -> None:
        self._probed, self._num_tokens = probed, num_tokens
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
