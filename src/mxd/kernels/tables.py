"""Sums over the few rows of a large table that each token names.

Three operations are closed under differentiation, and each is a gather: `mix` sums rows, `row_dots` is its gradient
in the values, and `row_sums` its gradient in the table. The last one turns the code around (which tokens name this
row?) and then is a `mix` too, so that no scatter with colliding writes is needed and the result does not depend on
the order in which threads run.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

BLOCK_ELEMENTS = 2**23
"""Elements of the largest temporary: rows are gathered in blocks of this size."""


def mix(
    values: Float[Tensor, "*batch k"], indices: Int[Tensor, "*batch k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "*batch d"]:
    """Return the sum of the named table rows, each times its value.

    Args:
        values: Weight of each named row.
        indices: The rows that each token names.
        table: Rows to sum; the gradient that reaches it is dense, as dense optimisers want it.
    """
    k = values.shape[-1]
    flat = _Mix.apply(values.reshape(-1, k), indices.reshape(-1, k), table)
    assert isinstance(flat, Tensor)
    return flat.view(*values.shape[:-1], table.shape[1])


def dots(
    dense: Float[Tensor, "tokens d"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens k"]:
    """Return each token's dot products with the table rows that it names, differentiable in both."""
    products = _Dots.apply(dense, indices, table)
    assert isinstance(products, Tensor)
    return products


def weighted_rows(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens d"]:
    """`mix` without a gradient."""
    if len(values) == 0:
        return table.new_zeros(0, table.shape[1])
    return embedding_bag(indices, table, per_sample_weights=values.to(table.dtype), mode="sum")


def row_dots(
    dense: Float[Tensor, "tokens d"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens k"]:
    """`dots` without a gradient."""
    products = dense.new_empty(indices.shape)
    block = max(1, BLOCK_ELEMENTS // (indices.shape[1] * table.shape[1]))
    for start in range(0, len(indices), block):
        rows = slice(start, start + block)
        torch.bmm(table[indices[rows]], dense[rows].to(table.dtype)[..., None], out=products[rows][..., None])
    return products


def row_sums(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], dense: Float[Tensor, "tokens d"], num_rows: int
) -> Float[Tensor, "num_rows d"]:
    """Return for each table row the sum of the tokens' vectors that name it, each times its value."""
    if indices.numel() == 0:
        return dense.new_zeros(num_rows, dense.shape[1])
    rows, order = torch.sort(indices.flatten(), stable=True)
    first = torch.searchsorted(rows, torch.arange(num_rows, device=rows.device))
    weights = values.flatten()[order].to(dense.dtype)
    return embedding_bag(order // indices.shape[1], dense, first, per_sample_weights=weights, mode="sum")


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, table)
        return weighted_rows(values, indices, table)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, table = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        wants_values, _, wants_table = ctx.needs_input_grad
        return (
            row_dots(gradient, indices, table).to(values.dtype) if wants_values else None,
            None,
            row_sums(values, indices, gradient, len(table)) if wants_table else None,
        )


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(dense, indices, table)
        return row_dots(dense, indices, table)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None]:
        dense, indices, table = ctx.saved_tensors
        wants_dense, _, wants_table = ctx.needs_input_grad
        return (
            weighted_rows(gradients[0], indices, table).to(dense.dtype) if wants_dense else None,
            None,
            row_sums(gradients[0], indices, dense, len(table)).to(table.dtype) if wants_table else None,
        )
