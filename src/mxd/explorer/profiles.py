"""What the firings of a latent say of it: how strongly, on which tokens, where, and together with which others."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mxd.explorer.code_store import CodeStore, Entries

HISTOGRAM_BINS = 32
POSITION_BINS = 16
QUANTILES = (0.25, 0.5, 0.75, 0.99)
QUARTERS = 4
CONTEXTS_A_QUARTER = 3
LISTED = 10
"""Tokens and latents of each list."""
SAMPLED_FIRINGS = 128
"""Firings of a latent, evenly spaced, in which it is looked up which others fire too."""

_PAIRS_AT_ONCE = 2**22
"""Pairs of a sampled firing and a latent that are in memory at a time."""


class Firings(NamedTuple):
    """Some firings, one an element."""

    owners: Int[np.ndarray, " firings"]
    """Which of the block's latents fires, counted from 0."""
    places: Int[np.ndarray, " firings"]
    """Number of the token."""
    values: Float[np.ndarray, " firings"]
    """The latent's value there."""
    quarters: Int[np.ndarray, " firings"]
    """Which quarter of the latent's values it comes from, 0 the lowest."""


class Ranked(NamedTuple):
    """The first few things of a list that each latent has, one an element, the best of each latent first."""

    owners: Int[np.ndarray, " listed"]
    """Which of the block's latents it belongs to."""
    items: Int[np.ndarray, " listed"]
    """The thing: a token or a latent."""
    counts: Float[np.ndarray, " listed"]
    """How often."""
    scores: Float[np.ndarray, " listed"]
    """What it is ranked by."""


class Profiles(NamedTuple):
    """What is known of the latents of a block from their firings."""

    histograms: Int[np.ndarray, "latents bins"]
    """Firings by value, in even bins from 0 to the latent's largest value."""
    quantiles: Float[np.ndarray, "latents quantiles"]
    """The values at `QUANTILES` of the latent's firings; 0 where it never fires."""
    quarters: Firings
    """Firings spread evenly over the ranks of each quarter, at most one a context."""
    tokens: Ranked
    """The tokens it fires on most often, by count; the score is the share of the token's occurrences."""
    specialisation: Float[np.ndarray, " latents"]
    """How few tokens its firings are on: 1 is one token alone, 0 as many as there could be; NaN below 2 firings."""
    positions: Int[np.ndarray, "latents bins"]
    """Firings by position in the context, in even bins."""
    company: Ranked
    """Latents that fire on the same tokens, by the share of the tokens of either on which both fire."""


class TextTokens(NamedTuple):
    """The text, for statistics."""

    ids: Int[np.ndarray, " places"]
    """Token at each place, context after context."""
    context: int
    """Length of a context."""
    occurrences: Int[np.ndarray, " vocabulary"]
    """How often each token stands at a place that counts."""


def latents_at_once(k: int) -> int:
    """Return how many latents a block should have at most where about `k` fire on a token."""
    return min(max(_PAIRS_AT_ONCE // (SAMPLED_FIRINGS * k), 16), 4096)


def profile(entries: Entries, store: CodeStore, text: TextTokens) -> Profiles:
    """Return what the firings of a block of latents say."""
    num_latents = len(entries.starts) - 1
    owners = entries.owners
    tokens, specialisation = _tokens(entries, owners, text)
    ordered = _by_value(entries, owners)
    return Profiles(
        histograms=_histograms(entries, owners, ordered),
        quantiles=_quantiles(entries, ordered),
        quarters=_quarters(entries, ordered, text.context),
        tokens=tokens,
        specialisation=specialisation,
        positions=_binned(
            owners, entries.places % text.context * POSITION_BINS // text.context, num_latents, POSITION_BINS
        ),
        company=_company(entries, store),
    )


def _by_value(entries: Entries, owners: Int[np.ndarray, " entries"]) -> Int[np.ndarray, " entries"]:
    """Return the order of entries by latent and value."""
    # The bits of positive floats are in the order of the floats.
    keys = owners.astype(np.uint64) << np.uint64(32) | entries.values.view(np.uint32).astype(np.uint64)
    return np.argsort(keys, kind="stable")


def _ranks(entries: Entries, quantile: float) -> Int[np.ndarray, " latents"]:
    """Return where, in the order by value, the quantile of each latent's values stands."""
    return entries.starts[:-1] + np.floor(quantile * np.maximum(entries.counts - 1, 0)).astype(np.int64)


def _quantiles(entries: Entries, ordered: Int[np.ndarray, " entries"]) -> Float[np.ndarray, "latents quantiles"]:
    found = np.zeros((len(entries.starts) - 1, len(QUANTILES)))
    fires = entries.counts > 0
    for column, quantile in enumerate(QUANTILES):
        found[fires, column] = entries.values[ordered[_ranks(entries, quantile)[fires]]]
    return found


def _histograms(
    entries: Entries, owners: Int[np.ndarray, " entries"], ordered: Int[np.ndarray, " entries"]
) -> Int[np.ndarray, "latents bins"]:
    num_latents = len(entries.starts) - 1
    largest = np.ones(num_latents)
    fires = entries.counts > 0
    largest[fires] = entries.values[ordered[entries.starts[1:][fires] - 1]]
    bins = (entries.values / largest[owners] * HISTOGRAM_BINS).astype(np.int64)
    return _binned(owners, np.minimum(bins, HISTOGRAM_BINS - 1), num_latents, HISTOGRAM_BINS)


def _binned(
    owners: Int[np.ndarray, " entries"], bins: Int[np.ndarray, " entries"], num_latents: int, num_bins: int
) -> Int[np.ndarray, "latents bins"]:
    return np.bincount(owners * num_bins + bins, minlength=num_latents * num_bins).reshape(num_latents, num_bins)


def _quarters(entries: Entries, ordered: Int[np.ndarray, " entries"], context: int) -> Firings:
    counts, starts = entries.counts, entries.starts[:-1]
    fires = np.flatnonzero(counts > 0)
    number = np.arange(QUARTERS * CONTEXTS_A_QUARTER)
    shares = (number + 0.5) / len(number)
    owner = np.repeat(fires, len(number))
    quarter = np.tile(number // CONTEXTS_A_QUARTER, len(fires))
    pick = ordered[starts[owner] + np.floor(np.tile(shares, len(fires)) * counts[owner]).astype(np.int64)]
    contexts = entries.places[pick] // context
    # A context is shown once, with the largest of its values.
    order = np.lexsort((-entries.values[pick], contexts, owner))
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (owner[order][1:] != owner[order][:-1]) | (contexts[order][1:] != contexts[order][:-1])
    kept = order[fresh]
    kept = kept[np.lexsort((-entries.values[pick[kept]], owner[kept]))]
    return Firings(owner[kept], entries.places[pick[kept]], entries.values[pick[kept]], quarter[kept])


def _counted(keys: Int[np.ndarray, " n"], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return owner, item and count of each distinct `owner * size + item`."""
    found, counts = np.unique(keys, return_counts=True)
    return found // size, found % size, counts


def _best(
    owners: Int[np.ndarray, " n"],
    items: Int[np.ndarray, " n"],
    counts: Float[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    by: Float[np.ndarray, " n"],
) -> Ranked:
    """Keep the first `LISTED` of each owner by a number, the lower item first where it is equal."""
    order = np.lexsort((items, -by, owners))
    ranked = owners[order]
    begins = np.searchsorted(ranked, ranked)
    order = order[np.arange(len(order)) - begins < LISTED]
    return Ranked(owners[order], items[order], counts[order], scores[order])


def _tokens(
    entries: Entries, owners: Int[np.ndarray, " entries"], text: TextTokens
) -> tuple[Ranked, Float[np.ndarray, " latents"]]:
    size = len(text.occurrences)
    owner, token, counts = _counted(owners * size + text.ids[entries.places], size)
    shares = counts / np.maximum(text.occurrences[token], 1)
    ranked = _best(owner, token, counts.astype(float), shares, counts.astype(float))
    return ranked, token_specialisation(owner, counts, entries.counts, int((text.occurrences > 0).sum()))


def token_specialisation(
    owners: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"], firings: Int[np.ndarray, " latents"], distinct: int
) -> Float[np.ndarray, " latents"]:
    r"""Return how far the tokens that a latent fires on are from being all different.

    $$1 - H(p) / \log \min(n, V), \qquad H(p) = -\sum_t p_t \log p_t$$

    with p_t the share of its n firings that are on token t, and V the number of distinct tokens of the text: the
    largest entropy that n firings can have. It is 1 where all firings are on one token and 0 where no token repeats
    before it must; NaN below 2 firings.

    Args:
        owners: The latent of each pair of a latent and a token.
        counts: Its firings on that token.
        firings: The firings of each latent.
        distinct: V.
    """
    spread = np.bincount(owners, weights=counts * np.log(counts), minlength=len(firings))
    several = firings > 1
    total = np.where(several, firings, 2).astype(float)
    entropy = np.log(total) - spread / total
    most = np.log(np.minimum(total, max(distinct, 2)))
    return np.where(several, np.clip(1 - entropy / most, 0.0, 1.0), np.nan)


def _company(entries: Entries, store: CodeStore) -> Ranked:
    r"""Rank the latents that fire on the same tokens by Jaccard's index, $n_{ab} / (n_a + n_b - n_{ab})$.

    n_ab is estimated from `SAMPLED_FIRINGS` firings of a, and is exact where a fires no oftener.
    """
    counts = entries.counts
    taken = np.minimum(counts, SAMPLED_FIRINGS)
    owners = np.repeat(np.arange(len(counts)), taken)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(taken) - taken, taken)
    picks = entries.starts[:-1][owners] + within * counts[owners] // taken[owners]
    others, which = store.active_at(entries.places[picks])
    size = len(store.firings)
    owner, other, together = _counted(owners[which] * size + others, size)
    apart = other != owner + entries.first
    owner, other, together = owner[apart], other[apart], together[apart]
    shares = together / taken[owner]
    estimated = np.minimum(shares * counts[owner], store.firings[other])
    jaccard = estimated / (counts[owner] + store.firings[other] - estimated)
    return _best(owner, other, shares, jaccard, jaccard)
