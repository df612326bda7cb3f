"""What is probed for: texts that bear one label each, and texts in which spans of characters bear labels."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

PART_NAMES = ("train", "validation", "test")
"""Probes are fitted on the first part, chosen on the second and judged on the third."""
PART_SHARES = (0.6, 0.2, 0.2)
"""How large they are for texts."""
TOKEN_SHARES = (0.5, 0.2, 0.3)
"""How large they are for tokens, which come in documents, of which few are rarely enough."""
TOKENS = 131_072
"""Tokens of labelled documents that are looked at unless told otherwise."""
TEXTS = 10_000
"""Texts of one set that are used, drawn at random where there are more, unless told otherwise; as in the paper."""
LEAST_IN_PART = 5
"""Examples of a class, or tokens of a concept, that each part must have for the class to be probed for."""


class Example(NamedTuple):
    """A text with one label."""

    text: str
    """The text."""
    label: str
    """Its class."""
    span: tuple[int, int] | None = None
    """The characters, from and to, over whose tokens codes are averaged; None for the whole text."""
    group: str | None = None
    """Whom or what it is about, such as a surname or a repository: all texts of a group are in one part, for a latent
    that knows a group's name would tell the class of its other texts. None for a text of no group."""


class Span(NamedTuple):
    """Characters of a text that bear a label."""

    start: int
    """First character."""
    end: int
    """Behind the last one."""
    label: str
    """The concept."""


class Unlabelled(ValueError):
    """A text that cannot be labelled, and is left out."""


Labeller = Callable[[str], Sequence[Span]]
"""Returns the labelled parts of a text, which may overlap, or raises `Unlabelled`."""


class Parts(NamedTuple):
    """Which examples are for what."""

    train: Int[np.ndarray, " train"]
    """For fitting."""
    validation: Int[np.ndarray, " validation"]
    """For choosing."""
    test: Int[np.ndarray, " test"]
    """For judging."""


class Skipped(NamedTuple):
    """A class or concept that has too few examples to be probed for."""

    label: str
    """Its name."""
    found: int
    """How many there are."""
    needed: int
    """How many there should be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSet:
    """Texts with one label each, ready to be probed for."""

    name: str
    """Its name in results."""
    examples: Sequence[Example]
    """The texts, in a random order; no text twice."""
    skipped: Sequence[Skipped] = ()
    """Classes that were left out because they have too few texts."""
    duplicates: int = 0
    """Texts that were left out because they are there already."""
    blank: int = 0
    """Rows that were left out because they have no text."""
    keep: Literal["first", "last"] = "first"
    """Which tokens stay of a text that is longer than the context."""

    @property
    def labels(self) -> list[str]:
        """The classes, in order of their names."""
        return sorted({example.label for example in self.examples})


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanSet:
    """Documents in which parts are labelled."""

    name: str
    """Its name in results."""
    texts: Sequence[str]
    """The documents."""
    spans_of: Callable[[int], Sequence[Span]]
    """Returns the labelled parts of a document, given its number; they may overlap. Raises `Unlabelled` where it cannot
    be labelled. It is asked for no more documents than are used."""
    groups: Sequence[str | None] = ()
    """Whom or what each document is about: documents of a group are in one part. None for a document of no group; no
    document is of one where empty."""
    for_test: frozenset[int] = frozenset()
    """Numbers of the documents that the test part is made of; where there are none, parts are drawn at random."""


def labelled_by(name: str, texts: Sequence[str], labeller: Labeller, for_test: Collection[int] = ()) -> SpanSet:
    """Return a set of documents that a function labels.

    Args:
        name: Its name in results.
        texts: The documents.
        labeller: The function.
        for_test: Numbers of the documents that the test part is made of.
    """
    return SpanSet(
        name=name, texts=texts, spans_of=lambda number: labeller(texts[number]), for_test=frozenset(for_test)
    )


ProbingSet = TextSet | SpanSet


def make_text_set(
    name: str,
    examples: Sequence[Example],
    *,
    keep: Literal["first", "last"] = "first",
    per_class: int | None = None,
    total: int | None = None,
    blank: int = 0,
    seed: int = 42,
) -> TextSet:
    """Return a set of texts, shuffled, without duplicates and without classes that are too small.

    Args:
        name: Its name in results.
        examples: All there is.
        keep: Which tokens stay of a text that is longer than the context.
        per_class: Texts of a class, at most.
        total: Texts of all classes, at most.
        blank: Rows that were left out because they have no text.
        seed: Seed of the order, and so of which texts are left where there are too many.

    Raises:
        ValueError: If fewer than two classes remain, or `total` is too small for two.
    """
    if total is not None:
        check_texts(total)
    least = least_per_class()
    distinct = list({(example.text, example.span): example for example in reversed(examples)}.values())[::-1]
    order = np.random.default_rng(seed).permutation(len(distinct))
    taken: Counter[str] = Counter()
    chosen: list[Example] = []
    for example in (distinct[place] for place in order):
        if per_class is None or taken[example.label] < per_class:
            taken[example.label] += 1
            chosen.append(example)
    chosen = chosen[:total]
    counts = Counter(example.label for example in chosen)
    skipped = [Skipped(label, counts[label], least) for label in sorted(taken) if counts[label] < least]
    small = {skip.label for skip in skipped}
    if len(counts.keys() - small) < 2:
        found = ", ".join(f"{label!r}: {count}" for label, count in counts.most_common(8)) or "none"
        raise ValueError(
            f"Texts to probe with must be of at least two classes with {least} different texts each; {name} has "
            f"{found}. Give more texts, or ask for more --texts."
        )
    kept = [example for example in chosen if example.label not in small]
    duplicates = len(examples) - len(distinct)
    return TextSet(name=name, examples=kept, skipped=skipped, duplicates=duplicates, blank=blank, keep=keep)


def least_per_class() -> int:
    """Return how many examples a class must have for each part to have its least number."""
    return round(LEAST_IN_PART / min(PART_SHARES))


def check_texts(texts: int) -> None:
    """Raise a ValueError where so few texts cannot have two classes of which each part has its least number."""
    least = 2 * least_per_class()
    if texts < least:
        raise ValueError(
            f"--texts must be at least {least}, {least_per_class()} of each of two classes; got {texts}. Ask for more."
        )


def check_tokens(tokens: int) -> None:
    """Raise a ValueError where so few tokens cannot have a concept, and what is not of it, in each part."""
    least = round(2 * LEAST_IN_PART / min(TOKEN_SHARES))
    if tokens < least:
        raise ValueError(
            f"--tokens must be at least {least}, so that each part has {LEAST_IN_PART} tokens of a concept and as many "
            f"others; got {tokens}. Ask for more."
        )
