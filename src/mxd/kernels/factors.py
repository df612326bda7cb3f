"""The algebra of experts whose matrices are factors of one tensor: CP and tensor ring.

An experts' tensor $W$ of shape (experts of each level …, d_in, d_out) is never built. Each function takes what the
factors have made of one mode (coefficients times an expert factor, inputs times the input factor) and joins them; the
last product, with the output factor, is the only one as wide as the output (Oldfield et al., 2024).
"""

from collections.abc import Sequence
from functools import reduce
from operator import mul

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.kernels.products import linear


def cp_combine(
    terms: Sequence[Float[Tensor, "*batch rank"]],
    W_out: Float[Tensor, "rank d_out"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    r"""Return $(t_1 \odot \dots \odot t_m)\,U_{out} + b$, the terms being what each other mode makes of its vector."""
    return linear(reduce(mul, terms), W_out, bias)


def cp_matrix(
    rows: Sequence[Float[Tensor, " rank"]], W_in: Float[Tensor, "d_in rank"], W_out: Float[Tensor, "rank d_out"]
) -> Float[Tensor, "d_in d_out"]:
    r"""Return $U_{in}\,\mathrm{diag}(u_1 \odot \dots \odot u_E)\,U_{out}$, the matrix of one expert.

    Args:
        rows: The expert's row in the factor of each level.
        W_in: Factor of the input mode.
        W_out: Factor of the output mode.
    """
    return (W_in * reduce(mul, rows)) @ W_out


def ring_link(
    vector: Float[Tensor, "*batch d"], core: Float[Tensor, "d left right"], bias: Float[Tensor, "left right"] | None
) -> Float[Tensor, "*batch left right"]:
    """Return the sum of a core's slices, each times the vector's entry, plus the slice of a constant 1."""
    left, right = core.shape[1:]
    flat = linear(vector, core.flatten(1), None if bias is None else bias.flatten())
    return flat.unflatten(-1, (left, right))


def ring_combine(
    links: Sequence[Float[Tensor, "*batch _ _"]], W_out: Float[Tensor, "first last d_out"]
) -> Float[Tensor, "*batch d_out"]:
    r"""Return $y_o = \mathrm{trace}(L_1 L_2 \cdots L_m\, U_{out}(:, o, :))$, the ring closed by the output core.

    Args:
        links: What each other mode's core makes of its vector; neighbours share a rank.
        W_out: The output core as (first rank of the ring, last rank, d_out): its slices transposed.
    """
    chain = reduce(torch.matmul, links)
    return linear(chain.flatten(-2), W_out.flatten(0, 1))


def ring_matrix(
    slices: Sequence[Float[Tensor, "_ _"]],
    W_in: Float[Tensor, "d_in left last"],
    W_out: Float[Tensor, "first last d_out"],
) -> Float[Tensor, "d_in d_out"]:
    """Return the matrix of one expert.

    Args:
        slices: The expert's slice of each level's core.
        W_in: The input core, without the slice of the constant 1.
        W_out: The output core, as `ring_combine` takes it.
    """
    expert = reduce(torch.matmul, slices)
    return (expert @ W_in).flatten(1) @ W_out.flatten(0, 1)
