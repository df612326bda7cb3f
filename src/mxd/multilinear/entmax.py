"""The 1.5-entmax: like softmax, but most coefficients are exactly zero."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_ROUNDS = 60
"""Newton takes 6 to 10 rounds; the bound ends it where a score is NaN."""


def enough_rounds(n: int) -> int:
    """Return how many of Newton's rounds suffice for any n scores, in float64 too.

    Far from the root a round halves the distance, and the root of n equal scores is √n times as near as where the
    rounds begin; the last few rounds double the digits. The hardest of many random scores took 6 + log₂(n)/2.
    """
    return 10 + n.bit_length() // 2


def entmax15(scores: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    r"""Return $p_i = [s_i/2 - \tau]_+^2$ of each row, with $\tau$ such that $\sum_i p_i = 1$ (Peters et al., 2019).

    $\sum_i [s_i/2 - \tau]_+^2 - 1$ is convex and falling, so Newton's method, begun where it cannot be negative
    (half the largest score, less 1), climbs to the root without passing it, and is exact once it knows which entries
    are positive. It needs no sort: the `entmax` package, which sorts, takes about six times as long for 256 scores on a
    CPU, forward and backward (benchmarks/multilinear.py).
    """
    # Some of the operations would be computed in bfloat16, and the root be found to two digits.
    with torch.autocast(scores.device.type, enabled=False):
        result = _Entmax15.apply(scores)
    assert isinstance(result, Tensor)
    return result


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        halves = scores / 2
        halves = halves - halves.amax(-1, keepdim=True)
        # Whether a round was the last is read on a CPU alone: any other device would wait for each answer.
        threshold = find_threshold(halves, ask=scores.device.type == "cpu")
        roots = (halves - threshold).clamp_min_(0)
        ctx.save_for_backward(roots)
        return roots.square()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> Tensor:
        (roots,) = ctx.saved_tensors
        along = gradients[0] * roots
        return along - roots * (along.sum(-1, keepdim=True) / roots.sum(-1, keepdim=True))


def find_threshold(halves: Float[Tensor, "*batch n"], *, ask: bool) -> Float[Tensor, "*batch 1"]:
    """Return τ of each row by Newton's method.

    Args:
        halves: Halves of the scores, less the row's largest.
        ask: Whether to look after each round if it was the last, in place of `enough_rounds`.
    """
    threshold = torch.full_like(halves[..., :1], -1.0)
    tolerance = 2 * torch.finfo(halves.dtype).eps
    for _ in range(MOST_ROUNDS if ask else enough_rounds(halves.shape[-1])):
        above = (halves - threshold).clamp_min_(0)
        excess = torch.linalg.vecdot(above, above)[..., None] - 1
        step = excess / (2 * above.sum(-1, keepdim=True))
        threshold = threshold + step
        if ask and bool((step <= tolerance).all()):
            break
    return threshold
