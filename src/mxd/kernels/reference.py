"""What the kernels compute, stated as plainly as possible; dense, and meant for float64.

Every fast path is tested against these lines, values and gradients. Rows are named through `embedding`, whose gradient
is summed in one order; that of `table[indices]` is summed in whatever order threads run.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def linear(
    x: Float[Tensor, "rows d_in"], weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "rows d_out"]:
    """Return `x @ weight + bias`."""
    return x @ weight if bias is None else x @ weight + bias


def route(
    x: Float[Tensor, "tokens d_in"], weight: Float[Tensor, "d_in n"], bias: Float[Tensor, " n"], k: int
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """Return the `k` largest entries of `x @ weight + bias` in each row, rectified, and where they stand."""
    values, indices = torch.topk(x @ weight + bias, k, dim=-1)
    return values.relu(), indices


def mix(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens d"]:
    """Return the sum of the named table rows, each times its value."""
    return torch.einsum("tk,tkd->td", values, functional.embedding(indices, table))


def dots(
    dense: Float[Tensor, "tokens d"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens k"]:
    """Return each token's dot products with the table rows that it names."""
    return torch.einsum("td,tkd->tk", dense, functional.embedding(indices, table))
