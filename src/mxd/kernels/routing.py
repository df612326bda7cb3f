"""Selection: score all latents, keep the `k` largest of each token, forget the rest."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxd.kernels.backends import backend
from mxd.kernels.products import product_by_rows
from mxd.kernels.reference import route as reference_route
from mxd.kernels.selection import largest
from mxd.kernels.tables import gathers
from mxd.kernels.turned import turned

BLOCK_BYTES = {"cpu": 2**24}
"""Bytes of scores that are held at one time, by sort of device: the product is taken in blocks of rows, and each block
is selected from while it is in the cache. On two threads of an AMD EPYC, 2**24 and 2**25 were the fastest of 2**20 …
2**28 in float32 and bfloat16; 2**28 takes 1.2 to 1.8 times as long (benchmarks/kernels.py)."""
BLOCK_BYTES_ELSEWHERE = 2**28
"""The same where launching a kernel costs more than a cache miss: a guess, not measured yet."""


def route(
    x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_in n"], bias: Float[Tensor, " n"], k: int
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """Return the `k` largest entries of `x @ weight + bias` in each row, rectified, and where they stand.

    Only the kept entries are saved for the backward pass, and the gradients are sums over them: there is no second
    dense product. `weight` is read by columns, so a weight whose columns are contiguous in memory (the transpose of
    a contiguous table) is fastest. Under autocast the product runs in autocast's type; values have the weight's.

    Raises:
        ValueError: If `k` does not lie in `[1, n]`.
    """
    if not 1 <= k <= weight.shape[1]:
        raise ValueError(f"k must lie in [1, {weight.shape[1]}], the number of latents; got {k}.")
    rows = x.reshape(-1, x.shape[-1])
    if backend(x.device) == "reference":
        values, indices = reference_route(_for_product(rows), _for_product(weight), _for_product(bias), k)
        return values.to(weight.dtype).view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)
    values, indices = _Route.apply(rows, weight, bias, k)  # pyright: ignore[reportGeneralTypeIssues]
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def score_blocks(
    x: Float[Tensor, "rows d_in"], weight: Float[Tensor, "d_in n"], bias: Float[Tensor, " n"]
) -> Iterator[tuple[slice, Float[Tensor, "block n"]]]:
    """Yield `x @ weight + bias` in blocks of rows, each with the rows that it is of; it knows no gradient.

    Under autocast the product runs in autocast's type.
    """
    x, weight, bias = (_for_product(tensor.detach()) for tensor in (x, weight, bias))
    score_bytes = weight.shape[1] * weight.element_size()
    at_once = max(1, BLOCK_BYTES.get(x.device.type, BLOCK_BYTES_ELSEWHERE) // score_bytes)
    yield from product_by_rows(x, weight, bias, at_once)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = weight.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.long, device=x.device)
        select = _selection(x.device)
        for rows, scores in score_blocks(x, weight, bias):
            kept_values, indices[rows] = select(scores, k)
            values[rows] = kept_values.relu_()
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, weight, values, indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, values, indices = ctx.saved_tensors
        wants = ctx.needs_input_grad
        kept = torch.where(values > 0, gradients[0], 0)
        kernels = gathers(x.device)
        named = turned(indices, weight.shape[1]) if wants[1] or wants[2] else None
        weight_gradient = bias_gradient = None
        if named is not None and wants[1]:
            weight_gradient = kernels.row_sums(kept, named, x.to(weight.dtype)).t()
        if named is not None and wants[2]:
            # A popular latent's sum over thousands of tokens stalls in bfloat16; index_add_ would be simpler, but not
            # deterministic on CUDA.
            ones = kept.new_ones(len(kept), 1, dtype=torch.promote_types(kept.dtype, torch.float32))
            bias_gradient = kernels.row_sums(kept, named, ones)[:, 0].to(kept.dtype)
        x_gradient = kernels.weighted_rows(kept, indices, weight.t()).to(x.dtype) if wants[0] else None
        return x_gradient, weight_gradient, bias_gradient, None


def _selection(device: torch.device) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    if backend(device) == "triton":
        # Imported where it is needed: Triton is not everywhere, and takes long.
        from mxd.kernels.triton_selection import largest as largest_by_triton

        return largest_by_triton
    return largest


def _for_product(tensor: Tensor) -> Tensor:
    """Cast once what autocast would cast again for every block of rows; like autocast, leave float64 alone."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))
