"""What each latent responds to, gathered from a stream of codes in bounded memory."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mxd.layers.selection import SparseCode
from mxd.metrics import in_float64, widest_dtype


class Activation(NamedTuple):
    """One token on which a latent fires."""

    value: float
    """The latent's value on this token."""
    context: int
    """Number of the context that holds the token."""
    position: int
    """The token's position in that context."""


class _Entries(NamedTuple):
    """Nonzero entries of codes, one an element."""

    latents: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    contexts: Int[Tensor, " entries"]
    positions: Int[Tensor, " entries"]

    def at(self, which: Tensor) -> "_Entries":
        return _Entries(*(column[which] for column in self))


def _first_of_each(keys: Int[Tensor, " entries"]) -> Int[Tensor, " entries"]:
    """Return, for each element of sorted keys, where the run of its key begins."""
    places = torch.arange(len(keys), device=keys.device)
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = keys[1:] != keys[:-1]
    return torch.where(begins, places, 0).cummax(0).values


def _best_of_each_context(entries: _Entries) -> _Entries:
    """Keep the largest value of each latent in each context, the earliest of equal ones."""
    # Stable sorts from the least to the most significant key.
    entries = entries.at(torch.sort(entries.positions, stable=True).indices)
    entries = entries.at(torch.sort(entries.values, stable=True, descending=True).indices)
    entries = entries.at(torch.sort(entries.contexts, stable=True).indices)
    entries = entries.at(torch.sort(entries.latents, stable=True).indices)
    begins = torch.ones_like(entries.latents, dtype=torch.bool)
    begins[1:] = (entries.latents[1:] != entries.latents[:-1]) | (entries.contexts[1:] != entries.contexts[:-1])
    return entries.at(begins)


class TopTable(NamedTuple):
    """The strongest activations of all latents, at most one a context, the strongest first."""

    values: Float[Tensor, "num_latents kept"]
    """The latent's values; 0 where a place is not taken."""
    contexts: Int[Tensor, "num_latents kept"]
    """Numbers of the contexts."""
    positions: Int[Tensor, "num_latents kept"]
    """Positions in them."""


class LatentStatistics:
    """How often and how strongly each latent fires, and the contexts that excite it most.

    A latent fires where its value is above 0. Memory is O(num_latents · contexts_kept) and, during an
    update, O(tokens · k); nothing of size tokens × num_latents is ever made. The counts, maxima and top
    contexts depend neither on how the tokens are cut into batches nor on their order; the sums are kept
    in float64 and depend on it by rounding only.
    """

    def __init__(self, num_latents: int, *, contexts_kept: int = 8, device: torch.device | str = "cpu") -> None:
        if num_latents < 1 or contexts_kept < 1:
            raise ValueError(
                f"num_latents and contexts_kept must be at least 1; got {num_latents} and {contexts_kept}."
            )
        self.num_latents = num_latents
        self.contexts_kept = contexts_kept
        self.num_tokens = 0
        self.firings: Int[Tensor, " num_latents"] = torch.zeros(num_latents, dtype=torch.int64, device=device)
        """Number of tokens on which each latent fired."""
        self.sums: Float[Tensor, " num_latents"] = torch.zeros(
            num_latents, dtype=widest_dtype(torch.device(device)), device=device
        )
        """Sum of each latent's values, in float64 where the device has it."""
        self.maxima: Float[Tensor, " num_latents"] = torch.zeros(num_latents, device=device)
        """Largest value of each latent; 0 where it never fired."""
        self._top_values = torch.zeros(num_latents, contexts_kept, device=device)
        self._top_contexts = torch.zeros(num_latents, contexts_kept, dtype=torch.int64, device=device)
        self._top_positions = torch.zeros(num_latents, contexts_kept, dtype=torch.int64, device=device)

    def update(self, code: SparseCode, contexts: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"]) -> None:
        """Count the codes of a batch of tokens.

        Args:
            code: One row a token. Leave out the tokens that shall not count (BOS, padding).
            contexts: Number of each token's context; one context may come in several updates.
            positions: Each token's position in its context.

        Raises:
            ValueError: If the code does not have one row for each of these tokens, or names a latent
                that does not exist.
        """
        if code.values.shape[:-1] != contexts.shape:
            raise ValueError(f"The code must have {len(contexts)} rows of slots; got {tuple(code.values.shape)}.")
        self.num_tokens += len(contexts)
        device = self.firings.device
        values = code.values.detach().to(device, torch.float32)
        rows, slots = (values > 0).nonzero(as_tuple=True)
        entries = _Entries(
            code.indices.to(device, torch.int64)[rows, slots],
            values[rows, slots],
            contexts.to(device, torch.int64)[rows],
            positions.to(device, torch.int64)[rows],
        )
        if len(rows) == 0:
            return
        if not 0 <= int(entries.latents.min()) <= int(entries.latents.max()) < self.num_latents:
            raise ValueError(f"The code's indices must lie in [0, {self.num_latents}), the latents counted here.")
        self.firings.index_add_(0, entries.latents, torch.ones_like(entries.latents))
        self.sums.index_add_(0, entries.latents, entries.values.to(self.sums.dtype))
        self.maxima.scatter_reduce_(0, entries.latents, entries.values, "amax")
        self._keep_best(entries)

    def _keep_best(self, entries: _Entries) -> None:
        # What is below a full table's last place cannot enter it, nor better a context that is in it:
        # after the first batches hardly anything is left to sort.
        entries = entries.at(entries.values >= self._top_values[entries.latents, -1])
        touched = torch.unique(entries.latents)
        kept = self._top_values[touched]
        places, slots = (kept > 0).nonzero(as_tuple=True)
        latents = touched[places]
        held = _Entries(
            latents, kept[places, slots], self._top_contexts[latents, slots], self._top_positions[latents, slots]
        )
        merged = _best_of_each_context(_Entries(*(torch.cat(pair) for pair in zip(entries, held, strict=True))))
        # The entries stand by latent and context, and stable sorts keep that order among equal values.
        merged = merged.at(torch.sort(merged.values, stable=True, descending=True).indices)
        merged = merged.at(torch.sort(merged.latents, stable=True).indices)
        ranks = torch.arange(len(merged.latents), device=merged.latents.device) - _first_of_each(merged.latents)
        best = ranks < self.contexts_kept
        merged, ranks = merged.at(best), ranks[best]
        self._top_values[merged.latents, ranks] = merged.values
        self._top_contexts[merged.latents, ranks] = merged.contexts
        self._top_positions[merged.latents, ranks] = merged.positions

    @property
    def firing_rates(self) -> Float[Tensor, " num_latents"]:
        """The share of the tokens on which each latent fired, in float64."""
        return in_float64(self.firings) / max(self.num_tokens, 1)

    @property
    def dead_fraction(self) -> float:
        """The share of the latents that fired on no token."""
        return (self.firings == 0).cpu().double().mean().item()

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a token."""
        return self.firings.sum().item() / max(self.num_tokens, 1)

    @property
    def top(self) -> TopTable:
        """The table behind `top_contexts`, which the next update changes."""
        return TopTable(self._top_values, self._top_contexts, self._top_positions)

    @property
    def num_contexts(self) -> Int[Tensor, " num_latents"]:
        """The number of contexts in which each latent fired, as far as they are kept."""
        return (self._top_values > 0).sum(-1)

    def top_contexts(self, latent: int) -> list[Activation]:
        """Return the latent's largest activation in each of its best contexts, largest first.

        Among equal values the lower context comes first, and within a context the earlier position.
        """
        return [
            Activation(value, context, position)
            for value, context, position in zip(
                self._top_values[latent].tolist(),
                self._top_contexts[latent].tolist(),
                self._top_positions[latent].tolist(),
                strict=True,
            )
            if value > 0
        ]


def choose_experts(statistics: LatentStatistics, count: int = 10) -> list[int]:
    """Choose the latents to show, without looking at how well they read.

    Those that fired in at least `statistics.contexts_kept` contexts are ordered by firing rate (equal
    rates by number) and cut into `count` groups of equal size; the middle one of each group is taken.
    What is shown is therefore typical of the common and of the rare alike, and the same in every run.

    Returns:
        At most `count` latents, from the most to the least frequent; fewer if fewer fire often enough.
    """
    eligible = (statistics.num_contexts >= statistics.contexts_kept).nonzero().squeeze(-1)
    order = torch.sort(statistics.firings[eligible], stable=True, descending=True).indices
    ranked: list[int] = eligible[order].tolist()
    count = min(count, len(ranked))
    return [ranked[(2 * group + 1) * len(ranked) // (2 * count)] for group in range(count)]
