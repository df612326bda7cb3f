"""Text as examples: sequences with a class, words with tags, continuations of prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from mxd.privacy.examples import IGNORED, Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TextTask: TypeAlias = Literal["sequence", "token", "causal"]
"""What a model says of text: a class of the whole, a class of every word, or the next token."""


class TextReader(NamedTuple):
    """How text becomes tensors."""

    tokenizer: "PreTrainedTokenizerBase"
    """The model's."""
    task: TextTask
    """What the model does."""
    max_tokens: int = 512
    """Longest text; what is longer is cut at its end."""
    pad: int = 0
    """Token that fills short rows: the one that the model's configuration names, by which some find a row's end."""


def sequence_examples(
    texts: Sequence[str], labels: Sequence[int], reader: TextReader, *, may_cut: bool = True
) -> Examples:
    """Texts with a class each."""
    rows = _cut([_ids(reader, text, special=True) for text in texts], reader, may_cut=may_cut)
    return Examples(inputs=_padded(rows, reader.pad), labels=torch.tensor(labels))


def word_examples(
    words: Sequence[Sequence[str]], tags: Sequence[Sequence[int]], reader: TextReader, *, may_cut: bool = True
) -> Examples:
    """Rows of words with a class each, which the first token of a word carries.

    Raises:
        ValueError: If a row has not as many tags as words, or the tokenizer cannot tell which word a token is of.
    """
    if not reader.tokenizer.is_fast:
        raise ValueError("labels of words need a fast tokenizer, which knows the word of each token; this one is slow.")
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    for place, (row, marks) in enumerate(zip(words, tags, strict=True)):
        if len(row) != len(marks):
            raise ValueError(f"every word must have a tag; row {place} has {len(row)} words and {len(marks)} tags.")
        found: Any = reader.tokenizer(list(row), is_split_into_words=True)
        owners: list[int | None] = found.word_ids()
        first = [owner is not None and owner not in owners[:at] for at, owner in enumerate(owners)]
        marked = [
            marks[owner] if begins and owner is not None else IGNORED
            for owner, begins in zip(owners, first, strict=True)
        ]
        rows.append(cast("list[int]", found["input_ids"]))
        labels.append(marked[: reader.max_tokens])
    return Examples(
        inputs=_padded(_cut(rows, reader, may_cut=may_cut), reader.pad),
        labels=_filled(labels, IGNORED),
        labels_of="token",
    )


def continuation_examples(
    prompts: Sequence[str], texts: Sequence[str], reader: TextReader, *, may_cut: bool = True
) -> Examples:
    """Texts whose tokens are labels, after prompts whose are not; without a prompt a text's first token is not one."""
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    for prompt, text in zip(prompts, texts, strict=True):
        before = _ids(reader, prompt, special=True) if prompt else []
        after = _ids(reader, text, special=not prompt)
        rows.append(before + after)
        labels.append(([IGNORED] * len(before) + after)[: reader.max_tokens])
    return Examples(
        inputs=_padded(_cut(rows, reader, may_cut=may_cut), reader.pad),
        labels=_filled(labels, IGNORED),
        labels_of="next-token",
    )


def _ids(reader: TextReader, text: str, *, special: bool) -> list[int]:
    return cast("list[int]", cast(Any, reader.tokenizer)(text, add_special_tokens=special)["input_ids"])


def _cut(rows: Sequence[list[int]], reader: TextReader, *, may_cut: bool) -> list[list[int]]:
    longer = sum(len(row) > reader.max_tokens for row in rows)
    if longer and not may_cut:
        raise ValueError(
            f"protected text must be read whole; {longer} of {len(rows)} rows are longer than {reader.max_tokens} "
            "tokens, and what is cut off would not be protected; raise --max-tokens."
        )
    return [row[: reader.max_tokens] for row in rows]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    empty = [place for place, row in enumerate(rows) if not row]
    if empty:
        raise ValueError(f"every row of text must have a token; row {empty[0]} is empty ({len(empty)} in all).")
    return {"input_ids": _filled(rows, pad), "attention_mask": _filled([[1] * len(row) for row in rows], 0)}


def _filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
