"""A code turned around: which tokens name each row."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Turned(NamedTuple):
    """The pairs of a token and a row that it names, in order of the rows, and of the pairs where rows are equal."""

    rows: Int[Tensor, " pairs"]
    """Each pair's row."""
    order: Int[Tensor, " pairs"]
    """Where each pair stands in the flattened code."""
    tokens: Int[Tensor, " pairs"]
    """Each pair's token."""
    bounds: Int[Tensor, " num_rows+1"]
    """The first pair of each row, and the number of pairs."""


def turned(indices: Int[Tensor, "tokens k"], num_rows: int) -> Turned:
    """Return the code with these indices turned around; the order is stable, so that it is the same in each run.

    Whatever is summed by the same indices can share it.
    """
    # 32 bits take half the passes of a radix sort.
    rows, order = torch.sort(indices.flatten().to(torch.int32), stable=True)
    bounds = torch.searchsorted(rows, torch.arange(num_rows + 1, dtype=rows.dtype, device=rows.device))
    return Turned(rows, order, order // max(1, indices.shape[1]), bounds)
