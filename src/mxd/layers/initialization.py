"""How weights begin."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def uniform(*shape: int, bound: float, generator: torch.Generator | None) -> nn.Parameter:
    """Return a parameter drawn uniformly from ±bound."""
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))


def uniform_by_column(d_in: int, num_columns: int, bound: float, generator: torch.Generator | None) -> nn.Parameter:
    """Return a `(d_in, num_columns)` parameter drawn uniformly from ±bound whose columns are contiguous in memory.

    Selecting a few latents per token reads and writes whole columns; this layout makes each one contiguous read.
    """
    return nn.Parameter(torch.empty(num_columns, d_in).uniform_(-bound, bound, generator=generator).t())


def zeros(*shape: int) -> nn.Parameter:
    """Return a parameter of zeros."""
    return nn.Parameter(torch.zeros(*shape))


@torch.no_grad()
def normalize_rows_(table: Float[Tensor, "rows d"]) -> None:
    """Scale each row to unit length, in place; a row of zeros stays one."""
    table /= torch.linalg.vector_norm(table, dim=1, keepdim=True).clamp_min_(torch.finfo(table.dtype).tiny)
