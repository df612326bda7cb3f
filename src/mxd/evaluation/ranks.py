"""The rank of trained experts: how many directions each of them uses."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.evaluation.collect import LatentStatistics
from mxd.layers import SparseLayer
from mxd.metrics import in_float64

EPS = torch.finfo(torch.float32).eps
"""Layers are trained in float32: smaller differences are rounding."""


@runtime_checkable
class HasExpertWeights(Protocol):
    """A layer each of whose latents is a linear map."""

    def expert_weight(self, n: int) -> Tensor:
        """Return the matrix of latent n."""
        ...


class Ranks(NamedTuple):
    """Two measures of a matrix's rank."""

    stable: float
    """‖W‖_F² / ‖W‖₂²: how many directions carry it, from 1 to the numerical rank; 0 for a matrix of zeros."""
    numerical: float
    """Number of singular values above max(shape) · ε · σ₁, with float32's ε."""


def ranks(matrix: Float[Tensor, "rows columns"]) -> Ranks:
    r"""Return a matrix's stable rank, $\sum_i \sigma_i^2 / \sigma_1^2$ (Rudelson & Vershynin, 2007), and its rank.

    The squares of the singular values are the eigenvalues of the smaller Gram matrix, in float64, where what squaring
    loses is far below float32's rounding.
    """
    wide = in_float64(matrix.detach())
    gram = wide.t() @ wide if wide.shape[0] > wide.shape[1] else wide @ wide.t()
    squares = torch.linalg.eigvalsh(gram).clamp_min(0)
    largest = squares[-1]
    if not largest > 0:
        return Ranks(0.0, 0.0)
    threshold = (max(matrix.shape) * EPS) ** 2 * largest
    return Ranks((squares.sum() / largest).item(), float((squares > threshold).sum()))


def expert_ranks(layer: SparseLayer, experts: Sequence[int]) -> list[Ranks] | None:
    """Return the ranks of some experts' matrices; None for a kind whose latents are no linear maps.

    The matrix of an expert is the kind's `expert_weight`; for a mixture of decoders W_n = D diag(c_n), which has the
    rank of D (Oldfield et al., 2025, Lemma 1). Where a kind has none but declares `fixed_atoms`, as transcoders and
    autoencoders do, a latent maps x to (e·x) d while it is active: a matrix of rank one.
    """
    if isinstance(layer, HasExpertWeights):
        return [ranks(layer.expert_weight(n)) for n in experts]
    if not layer.fixed_atoms:
        return None
    found: list[Ranks] = []
    with torch.no_grad():
        for n in experts:
            reads = layer.scorer.weight[:, n]
            writes = layer.atoms(reads.new_zeros(1, layer.config.d_in), torch.tensor([[n]], device=reads.device))
            rank = float(bool(reads.any()) and bool(writes.any()))
            found.append(Ranks(rank, rank))
    return found


def sample_latents(statistics: LatentStatistics, count: int, seed: int = 0) -> list[int]:
    """Return a random sample of the latents that fired, in ascending order: at most `count` of them."""
    used = statistics.firings.nonzero().squeeze(-1).cpu()
    order = torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))
    return sorted(used[order[:count]].tolist())
