"""Sparse codes and how they are selected from scores."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SparseCode(NamedTuple):
    """The active latents of each input: at most `k` nonzero values and where they stand."""

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
