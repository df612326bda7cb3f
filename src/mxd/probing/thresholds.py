"""Every latent as a classifier of its own, "it fires above a threshold", for a hundred thousand of them at once.

All work is over the nonzero entries of codes, sorted by latent and value; nothing of size tokens × latents is made.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class SortedEntries:
    """The nonzero entries of the codes of some tokens: latents ascending, of each latent the largest value first."""

    latents: Int[np.ndarray, " entries"]
    """The latent."""
    values: Float[np.ndarray, " entries"]
    """Its value, above 0."""
    tokens: Int[np.ndarray, " entries"]
    """Number of the token."""
    num_tokens: int
    """Number of tokens, those without any entry counted."""
    num_latents: int
    """Number of latents."""

    @classmethod
    def of(
        cls,
        latents: Int[np.ndarray, " entries"],
        values: Float[np.ndarray, " entries"],
        tokens: Int[np.ndarray, " entries"],
        num_tokens: int,
        num_latents: int,
    ) -> "SortedEntries":
        """Return the entries, sorted."""
        order = np.lexsort((-values, latents))
        return cls(latents[order], values[order], tokens[order], num_tokens, num_latents)

    @property
    def begins(self) -> Int[np.ndarray, " firing"]:
        """Where the entries of each latent that fires begin."""
        return np.flatnonzero(np.diff(self.latents, prepend=-1))

    @property
    def ranks(self) -> Int[np.ndarray, " entries"]:
        """How many entries of the same latent have as large a value or stand before it, itself counted."""
        begins = self.begins
        lengths = np.diff(begins, append=len(self.latents))
        return np.arange(1, len(self.latents) + 1) - np.repeat(begins, lengths)

    @property
    def is_last_of_equals(self) -> Bool[np.ndarray, " entries"]:
        """Whether the next entry is of a smaller value or another latent, so that a threshold can stand behind it."""
        last = np.ones(len(self.latents), dtype=bool)
        last[:-1] = (self.latents[1:] != self.latents[:-1]) | (self.values[1:] != self.values[:-1])
        return last

    def hits(self, positive: Bool[np.ndarray, " entries"]) -> Int[np.ndarray, " entries"]:
        """Return how many entries of the same latent up to each are positive, itself counted."""
        sums = np.cumsum(positive, dtype=np.int64)
        begins = self.begins
        before = sums[begins] - positive[begins]
        return sums - np.repeat(before, np.diff(begins, append=len(self.latents)))


class Thresholds(NamedTuple):
    """The best threshold of each latent for one concept."""

    values: Float[np.ndarray, " num_latents"]
    """Value from which on the latent says yes; infinite where it never fires."""
    f1: Float[np.ndarray, " num_latents"]
    """F1 with it, on the tokens that it was chosen on."""


def best_thresholds(entries: SortedEntries, positive: Bool[np.ndarray, " tokens"]) -> Thresholds:
    r"""Return, for each latent, the threshold that makes its F1 for a concept largest; of equal ones the highest.

    A latent that says yes at its n largest values has $F_1 = 2 h_n / (n + P)$ with $h_n$ of them positive and P tokens
    positive in all. Every n is tried that does not part equal values.
    """
    values = np.full(entries.num_latents, np.inf)
    best = np.zeros(entries.num_latents)
    if len(entries.latents):
        f1 = 2 * entries.hits(positive[entries.tokens]) / (entries.ranks + positive.sum())
        f1[~entries.is_last_of_equals] = -1
        begins = entries.begins
        most = np.maximum.reduceat(f1, begins)
        reaches = np.flatnonzero(f1 == np.repeat(most, np.diff(begins, append=len(f1))))
        _, first = np.unique(entries.latents[reaches], return_index=True)
        firing = entries.latents[begins]
        values[firing] = entries.values[reaches[first]]
        best[firing] = most
    return Thresholds(values, best)


class Counts(NamedTuple):
    """How often each latent says yes, and how often rightly."""

    said: Int[np.ndarray, " num_latents"]
    """Tokens at which it does."""
    hits: Int[np.ndarray, " num_latents"]
    """Those of them that are positive."""
    positives: Int[np.ndarray, " num_latents"]
    """Tokens that are positive in all, of the concept that the latent is counted for."""

    @property
    def f1(self) -> Float[np.ndarray, " num_latents"]:
        """F1 of each; 0 where there is neither a yes nor a positive."""
        return 2 * self.hits / np.maximum(self.said + self.positives, 1)


def count(
    entries: SortedEntries,
    labels: Bool[np.ndarray, "tokens concepts"],
    concepts: Int[np.ndarray, " num_latents"],
    thresholds: Float[np.ndarray, " num_latents"],
) -> Counts:
    """Return how each latent, with its own threshold, tells a concept of its own.

    Args:
        entries: The codes.
        labels: Which tokens are of which concept.
        concepts: The concept that each latent is counted for.
        thresholds: The value from which on each says yes.
    """
    yes = entries.values >= thresholds[entries.latents]
    latents, tokens = entries.latents[yes], entries.tokens[yes]
    right = labels[tokens, concepts[latents]]
    said = np.bincount(latents, minlength=entries.num_latents)
    hits = np.bincount(latents[right], minlength=entries.num_latents)
    return Counts(said, hits, labels.sum(axis=0)[concepts])


def average_precisions(
    entries: SortedEntries, labels: Bool[np.ndarray, "tokens concepts"], concepts: Int[np.ndarray, " num_latents"]
) -> Float[np.ndarray, " num_latents"]:
    r"""Return the average precision of each latent's value for a concept of its own, as scikit-learn defines it.

    $\sum_n (R_n - R_{n-1}) P_n$ over the distinct values from the largest down, the last of which is 0, at which all
    tokens are taken that the latent does not fire on. NaN where the concept has no token.
    """
    positives = labels.sum(axis=0)[concepts].astype(np.float64)
    found = np.zeros(entries.num_latents)
    caught = np.zeros(entries.num_latents)
    if len(entries.latents):
        hits = entries.hits(labels[entries.tokens, concepts[entries.latents]])
        stops = np.flatnonzero(entries.is_last_of_equals)
        latents, at = entries.latents[stops], hits[stops]
        fresh = np.diff(latents, prepend=-1) != 0
        gained = at - np.where(fresh, 0, np.roll(at, 1))
        np.add.at(found, latents, gained * at / entries.ranks[stops])
        np.maximum.at(caught, latents, at)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (found + (positives - caught) * positives / entries.num_tokens) / positives
