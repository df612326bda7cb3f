"""Products of activations with weights, by the fastest library at hand.

PyTorch multiplies float32 matrices on a CPU through MKL, which leaves much of a processor that is not Intel's unused,
and in every call rearranges the weight for the caches. oneDNN, part of every x86 build of PyTorch and what
`torch.compile` calls through these same two operators, makes better use of it and takes a weight rearranged once.
On two threads of an AMD EPYC (benchmarks/kernels.py), a gate product at GPT-2's shape takes torch 2.3 times as long for
4,096 rows and 2.6 times for one, in float32; in bfloat16, which torch hands to oneDNN itself, 1.1 times and no longer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxd.kernels.backends import backend, has_onednn_bfloat16


def linear(
    x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*batch d_out"]:
    """Return `x @ weight + bias`, differentiable in all three."""
    if _is_for_onednn(x, weight) and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        rows = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        assert isinstance(rows, Tensor)
        return rows.view(*x.shape[:-1], weight.shape[1])
    return x @ weight if bias is None else x @ weight + bias


def product_by_rows(
    x: Float[Tensor, "rows d_in"], weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"], at_once: int
) -> Iterator[tuple[slice, Float[Tensor, "block d_out"]]]:
    """Yield `x @ weight + bias` in blocks of `at_once` rows, each with the rows that it is of; it knows no gradient."""
    blocks = [slice(start, min(start + at_once, len(x))) for start in range(0, len(x), at_once)]
    if not _is_for_onednn(x, weight):
        yield from ((rows, torch.addmm(bias, x[rows], weight)) for rows in blocks)
        return
    columns = weight.t()
    if len(blocks) > 1:
        columns = torch.ops.mkldnn._reorder_linear_weight(columns.contiguous(), at_once)
    yield from ((rows, _times_transpose(x[rows], columns, bias)) for rows in blocks)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        backend(x.device) == "onednn"
        and x.dtype == weight.dtype
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_onednn_bfloat16()))
        and x.numel() > 0
        and weight.numel() > 0
        # It takes other layouts too, and is then slower by orders of magnitude.
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times_transpose(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        # A sum's gradient, for one, is expanded.
        gradient = gradients[0].contiguous()
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _times_transpose(gradient, weight, None) if wants_x else None,
            _times_transpose(x.t(), gradient.t(), None) if wants_weight else None,
            gradient.sum(0) if wants_bias else None,
        )


def _times_transpose(rows: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """Return `rows @ columns.t() + bias`: oneDNN takes its weights as (out, in)."""
    return torch.ops.mkldnn._linear_pointwise(rows, columns, bias, "none", [], "")
