"""Sums over the few rows of a large table that each token names.

Three operations are closed under differentiation, and each is a gather: `mix` sums rows, `row_dots` is its gradient
in the values, and `row_sums` its gradient in the table. The last one turns the code around (which tokens name this
row?) and then is a `mix` too, so that no scatter with colliding writes is needed and the result does not depend on
the order in which threads run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxd.kernels.backends import backend
from mxd.kernels.reference import dots as reference_dots
from mxd.kernels.reference import mix as reference_mix
from mxd.kernels.torch_tables import row_dots, row_sums, weighted_rows
from mxd.kernels.turned import Turned, turned


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
    if backend(table.device) == "reference":
        flat = reference_mix(values.reshape(-1, k).to(table.dtype), indices.reshape(-1, k), table)
        return flat.view(*values.shape[:-1], table.shape[1])
    flat = _Mix.apply(values.reshape(-1, k), indices.reshape(-1, k), table)
    assert isinstance(flat, Tensor)
    return flat.view(*values.shape[:-1], table.shape[1])


def dots(
    dense: Float[Tensor, "tokens d"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens k"]:
    """Return each token's dot products with the table rows that it names, differentiable in both."""
    if backend(table.device) == "reference":
        return reference_dots(dense.to(table.dtype), indices, table)
    products = _Dots.apply(dense, indices, table)
    assert isinstance(products, Tensor)
    return products


class Gathers(NamedTuple):
    """What a backend offers."""

    weighted_rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    """`mix` without a gradient."""
    row_dots: Callable[[Tensor, Tensor, Tensor], Tensor]
    """`dots` without a gradient."""
    row_sums: Callable[[Tensor, Turned, Tensor], Tensor]
    """Returns for each table row the sum of the tokens' vectors that name it, each times its value."""


def gathers(device: torch.device) -> Gathers:
    """Return the gathers of the backend that this device uses."""
    if backend(device) == "triton":
        # Imported where it is needed: Triton is not everywhere, and takes long.
        import mxd.kernels.triton_tables as triton

        return Gathers(triton.weighted_rows, triton.row_dots, triton.row_sums)
    return Gathers(weighted_rows, row_dots, row_sums)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, table)
        return gathers(table.device).weighted_rows(values, indices, table)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, table = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        wants_values, _, wants_table = ctx.needs_input_grad
        kernels = gathers(table.device)
        return (
            kernels.row_dots(gradient, indices, table).to(values.dtype) if wants_values else None,
            None,
            kernels.row_sums(values, turned(indices, len(table)), gradient) if wants_table else None,
        )


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(dense, indices, table)
        return gathers(table.device).row_dots(dense, indices, table)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None]:
        dense, indices, table = ctx.saved_tensors
        wants_dense, _, wants_table = ctx.needs_input_grad
        kernels = gathers(table.device)
        named = turned(indices, len(table)) if wants_table else None
        return (
            kernels.weighted_rows(gradients[0], indices, table).to(dense.dtype) if wants_dense else None,
            None,
            None if named is None else kernels.row_sums(gradients[0], named, dense).to(table.dtype),
        )
