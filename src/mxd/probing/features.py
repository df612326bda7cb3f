"""Mean codes of texts: one row a text, sparse for sparse layers."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse

from mxd.evaluation.drawing import kind_of
from mxd.probing.alignment import CHARACTERS_A_TOKEN, TokenizedText, tokenize_texts
from mxd.probing.collecting import BATCH_TOKENS, Probed, Report, flow, say_nothing
from mxd.probing.examples import Example, TextSet

LEAST_TOKENS = 5
"""Tokens that a text must have to be probed with, unless it names a span."""
TEXTS_AT_ONCE = 256


class Features(NamedTuple):
    """What a probe sees of each example."""

    name: str
    """`<layer>/<student>`, `<layer>/dense hidden` or `<layer>/residual stream`."""
    values: sparse.csr_array | Float[np.ndarray, "examples width"]
    """One row an example."""

    @property
    def layer(self) -> int:
        """The block."""
        return int(self.name.partition("/")[0])

    @property
    def kind(self) -> str:
        """The kind of sparse layer, or what else it is."""
        return kind_of(self.name.partition("/")[2])

    @property
    def is_code(self) -> bool:
        """Whether it is sparse and nonnegative."""
        return not isinstance(self.values, np.ndarray)

    @property
    def width(self) -> int:
        """Number of features."""
        return int(cast("Any", self.values).shape[1])

    def columns(self, chosen: Sequence[int]) -> Float[np.ndarray, "examples chosen"]:
        """Return some columns, dense, in float64."""
        columns = self.values[:, list(chosen)]
        return np.asarray(columns if isinstance(columns, np.ndarray) else columns.toarray(), dtype=np.float64)

    def difference(
        self, positive: Bool[np.ndarray, " part"], part: Int[np.ndarray, " part"]
    ) -> Float[np.ndarray, " width"]:
        """Return the mean over the positive examples of a part less that over the others, of each feature."""
        weights = np.where(positive, 1 / max(positive.sum(), 1), -1 / max((~positive).sum(), 1))
        return np.asarray(weights @ self.values[part]).ravel()


class TextFeatures(NamedTuple):
    """The features of a set of texts."""

    labels: list[str]
    """Each text's class."""
    groups: Int[np.ndarray, " texts"]
    """Number of each text's group; a text of no group is one by itself."""
    features: list[Features]
    """The same rows for each student and each dense layer."""
    too_short: int
    """Texts that were left out because they have too few tokens."""
    duplicates: int
    """Texts that were left out because what is seen of them was there already, in a text that goes on differently."""


class _Prepared(NamedTuple):
    label: str
    group: str | None
    ids: Int[np.ndarray, " tokens"]
    wanted: Bool[np.ndarray, " tokens"]


def collect_text_features(probed: Probed, texts: TextSet, report: Report = say_nothing) -> TextFeatures:
    """Return the mean over each text's content tokens of every student's code and every dense layer.

    A text longer than the context is cut; where it names a span, to the context that ends with the span. Memory grows
    with the number of different latents that fire in each text, not with the number of latents.

    Args:
        probed: The model and the layers.
        texts: The texts.
        report: Is told how far it is.
    """
    prepared, too_short, duplicates = _read(probed, texts)
    # Texts of like length together, so that little is padding.
    order = sorted(range(len(prepared)), key=lambda place: len(prepared[place].ids))
    widths = {student.name: student.network.config.num_latents for student in probed.students}
    codes: dict[str, list[sparse.csr_array]] = {}
    dense: dict[str, list[Float[np.ndarray, "_texts _width"]]] = {}
    done = 0
    for places in _batches(order, prepared):
        batch = [prepared[place] for place in places]
        counts = np.array([item.wanted.sum() for item in batch])
        rows = np.repeat(np.arange(len(batch)), counts)
        flowing = flow(probed, [item.ids for item in batch], [item.wanted for item in batch])
        for name, values in flowing.dense:
            sums = torch.zeros(len(batch), values.shape[1]).index_add_(0, torch.from_numpy(rows), values.cpu())
            dense.setdefault(name, []).append((sums / torch.from_numpy(counts)[:, None]).float().numpy())
        for name, positions, latents, values in flowing.codes:
            means = values / counts[rows[positions]]
            shape = (len(batch), widths[name])
            summed = sparse.coo_array((means.astype(np.float32), (rows[positions], latents)), shape=shape).tocsr()
            codes.setdefault(name, []).append(summed)
        done += len(batch)
        report(f"Reading {texts.name}", done, len(prepared))
    back = np.argsort(order)
    stacked = {name: cast("sparse.csr_array", sparse.vstack(parts, format="csr")) for name, parts in codes.items()}
    found = [Features(name, cast("sparse.csr_array", values[back])) for name, values in stacked.items()]
    found += [Features(name, np.concatenate(parts)[back]) for name, parts in dense.items()]
    return TextFeatures([item.label for item in prepared], _numbered(prepared), found, too_short, duplicates)


def _read(probed: Probed, texts: TextSet) -> tuple[list[_Prepared], int, int]:
    prepared: list[_Prepared] = []
    seen: set[bytes] = set()
    too_short = duplicates = 0
    for item in _prepare(probed, texts):
        if item is None:
            too_short += 1
            continue
        # The same tokens in two parts would be known before they are tested.
        digest = blake2b(item.ids.tobytes() + item.wanted.tobytes(), digest_size=16).digest()
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        prepared.append(item)
    return prepared, too_short, duplicates


def _numbered(prepared: Sequence[_Prepared]) -> Int[np.ndarray, " texts"]:
    numbers: dict[object, int] = {}
    return np.array(
        [
            numbers.setdefault(place if item.group is None else item.group, len(numbers))
            for place, item in enumerate(prepared)
        ],
        dtype=np.int64,
    )


def _batches(order: Sequence[int], prepared: Sequence[_Prepared]) -> Iterator[list[int]]:
    batch: list[int] = []
    for place in order:
        # The last is the longest.
        if batch and (len(batch) + 1) * len(prepared[place].ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _prepare(probed: Probed, texts: TextSet) -> Iterator[_Prepared | None]:
    for first in range(0, len(texts.examples), TEXTS_AT_ONCE):
        examples = texts.examples[first : first + TEXTS_AT_ONCE]
        examples = [_excerpt(example, texts.keep, probed.body * CHARACTERS_A_TOKEN) for example in examples]
        tokenized = tokenize_texts(probed.tokenizer, [example.text for example in examples])
        for example, tokens in zip(examples, tokenized, strict=True):
            yield _cut(probed, texts, example, tokens)


def _excerpt(example: Example, keep: Literal["first", "last"], most: int) -> Example:
    """Return an example without the characters that its context cannot reach: tokens of a long text take memory."""
    if example.span is None:
        return example._replace(text=example.text[:most] if keep == "first" else example.text[-most:])
    start, end = example.span
    first = max(0, end - most)
    span = (max(start, first) - first, end - first)
    return example._replace(text=example.text[first : end + CHARACTERS_A_TOKEN], span=span)


def _cut(probed: Probed, texts: TextSet, example: Example, tokens: TokenizedText) -> _Prepared | None:
    if example.span is None:
        last = len(tokens.ids) if texts.keep == "last" else min(len(tokens.ids), probed.body)
        tokens = tokens.at(max(0, last - probed.body), last)
        wanted = probed.content(tokens.ids)
        return _Prepared(example.label, example.group, tokens.ids, wanted) if wanted.sum() >= LEAST_TOKENS else None
    start, end = example.span
    # A token counts that any character of the span is in.
    wanted = (tokens.starts < end) & (tokens.ends > start)
    if not wanted.any():
        return None
    last = int(np.flatnonzero(wanted)[-1]) + 1
    kept = slice(max(0, last - probed.body), last)
    return _Prepared(example.label, example.group, tokens.ids[kept], wanted[kept])
