"""Sparse codes and how they are selected from scores: which latents are active, and how that is decided."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mxd.kernels import dots, route, score_blocks

SelectionName = Literal["topk", "batch-topk", "l1"]
"""How active latents are chosen: k of each token, k of each token on average, or all with a positive score."""

MOST_LATENTS = 8192
"""Latents up to which a selection other than top-k is offered: it looks at all scores of a batch at once, and its codes
may be as wide as there are latents. 4,096 tokens then take 128 MiB of scores."""

THRESHOLD_RATE = 0.1
"""Weight of one batch in the running mean of thresholds. A batch of thousands of tokens tells its threshold precisely,
so a short memory adds little noise; a long one lags behind what is learnt (on stories260K, after 74 steps of 4,096
tokens, 0.01 left a transcoder of k 8 with 2.6 active latents in evaluation)."""


class SparseCode(NamedTuple):
    """The active latents of each input and where they stand, in as many slots a row as the fullest one needs.

    With top-k there are `k` slots; for other selections the name stands for the number that it came to.
    """

    values: Float[Tensor, "*batch k"]
    """Nonnegative coefficients; a slot that is not in use holds 0."""
    indices: Int[Tensor, "*batch k"]
    """Index of each coefficient's latent, distinct within a row where the value is not 0."""

    def dense(self, num_latents: int) -> Float[Tensor, "*batch num_latents"]:
        """The code as a vector over all latents: for small layers and for tests."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], num_latents)
        return zeros.scatter_add(-1, self.indices, self.values)


def topk_relu(scores: Float[Tensor, "*batch n"], k: int) -> SparseCode:
    """Keep the `k` largest entries of each row, rectified.

    A row with fewer than `k` positive entries keeps them all, so the number of nonzeros is *at
    most* `k`. The order within a row and the choice among equal entries are not specified.

    Args:
        scores: One row of scores per input.
        k: Number of entries to keep.

    Returns:
        A code whose gradient reaches the kept, positive entries only.

    Raises:
        ValueError: If `k` does not lie in `[1, n]`.

    Example:
        >>> topk_relu(torch.tensor([3.0, -1.0, 2.0, 1.0]), k=2).values.sort().values
        tensor([2., 3.])
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must lie in [1, {scores.shape[-1]}], the width of the scores; got {k}.")
    values, indices = torch.topk(scores, k, dim=-1, sorted=False)
    return SparseCode(values.relu(), indices)


class Selection(nn.Module, ABC):
    """Decides which latents are active, from their scores `x @ weight + bias`; values are the scores, rectified."""

    name: ClassVar[SelectionName]
    """Its name in configurations and on the command line."""

    @abstractmethod
    def kept(self, scores: Float[Tensor, "tokens n"], k: int) -> Bool[Tensor, "tokens n"]:
        """Return which of a batch's scores are active where they are positive; dense, and what defines the rest."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_in n"], bias: Float[Tensor, " n"], k: int
    ) -> SparseCode:
        """Return the active latents of each input; gradients reach their scores only."""


class TopK(Selection):
    """The `k` largest scores of each input."""

    name = "topk"

    def kept(self, scores: Float[Tensor, "tokens n"], k: int) -> Bool[Tensor, "tokens n"]:
        """Return the `k` largest of each row."""
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, dim=-1).indices, True)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_in n"], bias: Float[Tensor, " n"], k: int
    ) -> SparseCode:
        """Return a code `k` wide."""
        return SparseCode(*route(x, weight, bias, k))


class L1(Selection):
    """Every positive score, however many there are: what an L1 penalty on the values is to make few."""

    name = "l1"

    def kept(self, scores: Float[Tensor, "tokens n"], k: int) -> Bool[Tensor, "tokens n"]:
        """Return the positive ones; `k` plays no part."""
        return scores > 0

    def forward(
        self, x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_in n"], bias: Float[Tensor, " n"], k: int
    ) -> SparseCode:
        """Return a code as wide as the input with the most positive scores needs."""
        rows = x.reshape(-1, x.shape[-1])
        return _shaped(x, _code_of(rows, weight, bias, _active_by_blocks(self, rows, weight, bias, k)))


class BatchTopK(Selection):
    """In training, the `k` · tokens largest scores of the batch; afterwards, every score above a learnt threshold.

    The threshold is the running mean over training batches of the smallest score that was kept, so that in evaluation
    mode a code never depends on what stands beside its input (Bussmann et al., 2024). It is saved with the weights.
    """

    name = "batch-topk"
    threshold: Float[Tensor, ""]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(()))

    def kept(self, scores: Float[Tensor, "tokens n"], k: int) -> Bool[Tensor, "tokens n"]:
        """Return the `k` · tokens largest of the batch in training, those above the threshold otherwise."""
        if not self.training:
            return scores > self.threshold
        kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        largest = scores.flatten().topk(k * len(scores), sorted=False).indices
        return kept.index_fill_(0, largest, True).view_as(scores)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_in n"], bias: Float[Tensor, " n"], k: int
    ) -> SparseCode:
        """Return a code as wide as the input with the most active latents needs; in training, learn the threshold."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.training or len(rows) == 0:
            return _shaped(x, _code_of(rows, weight, bias, _active_by_blocks(self, rows, weight, bias, k)))
        scores = torch.cat([block for _, block in score_blocks(rows, weight, bias)])
        code = _code_of(rows, weight, bias, (self.kept(scores, k) & (scores > 0)).nonzero())
        self._learn(code.values.detach())
        return _shaped(x, code)

    @torch.no_grad()
    def _learn(self, values: Tensor) -> None:
        smallest = torch.where(values > 0, values, torch.inf).amin().to(self.threshold.dtype)
        # Kept scores are positive, so that zero says that no batch has been seen.
        moved = torch.where(self.threshold > 0, torch.lerp(self.threshold, smallest, THRESHOLD_RATE), smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))


SELECTIONS: dict[str, type[TopK] | type[BatchTopK] | type[L1]] = {one.name: one for one in (TopK, BatchTopK, L1)}


def make_selection(name: str) -> Selection:
    """Return the selection of this name, with nothing learnt yet.

    Raises:
        ValueError: If there is none.
    """
    if name not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(get_args(SelectionName))}; got {name!r}.")
    return SELECTIONS[name]()


def scores_at(
    x: Float[Tensor, "tokens d_in"],
    weight: Float[Tensor, "d_in n"],
    bias: Float[Tensor, " n"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens k"]:
    """Return the entries of `x @ weight + bias` that each row names, differentiable, without making the others."""
    return dots(x, indices, weight.t()) + dots(bias.new_ones(len(x), 1), indices, bias[:, None])


@torch.no_grad()
def _active_by_blocks(selection: Selection, rows: Tensor, weight: Tensor, bias: Tensor, k: int) -> Int[Tensor, "n 2"]:
    """Return row and latent of everything that is active, row by row, for a selection that looks at rows one by one."""
    found = [torch.zeros(0, 2, dtype=torch.long, device=rows.device)]
    for block, scores in score_blocks(rows, weight, bias):
        active = (selection.kept(scores, k) & (scores > 0)).nonzero()
        active[:, 0] += block.start
        found.append(active)
    return torch.cat(found)


def _code_of(rows: Tensor, weight: Tensor, bias: Tensor, active: Int[Tensor, "n 2"]) -> SparseCode:
    """Return the code of these rows and latents, padded to the fullest row.

    A slot that is not in use names the latent of its own number, so that no single one is named by them all.
    """
    row, latent = active.unbind(1)
    counts = torch.bincount(row, minlength=len(rows))
    width = max(1, int(counts.max())) if len(rows) else 1
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    indices = torch.arange(width, device=row.device).repeat(len(rows), 1)
    indices[row, slot] = latent
    used = torch.arange(width, device=row.device) < counts[:, None]
    # A score near zero may round to the other side of it when it is computed again.
    values = torch.where(used, scores_at(rows, weight, bias, indices).relu(), 0)
    return SparseCode(values.to(weight.dtype), indices)


def _shaped(x: Tensor, code: SparseCode) -> SparseCode:
    return SparseCode(*(part.view(*x.shape[:-1], part.shape[-1]) for part in code))
