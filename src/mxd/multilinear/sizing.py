"""Which rank makes a mixture as large as what it replaces."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple, get_args

from mxd.multilinear.block import MultilinearMLPConfig
from mxd.multilinear.experts import ExpertsKind
from mxd.multilinear.gate import require_experts, require_one_of
from mxd.multilinear.mixture import CPMixtureConfig, TRMixtureConfig

RING = 4
"""Every rank of the paper's rings but the last free one (Oldfield et al., 2024)."""


class Match(NamedTuple):
    """A rank, and how near it brings a mixture to a budget."""

    rank: int
    """The rank of `cp`, or R3 of `tr`: the one between input and output core."""
    parameters: int
    """Parameters with that rank, gate included."""
    budget: int
    """Parameters of what is replaced."""

    @property
    def excess(self) -> float:
        """By which share of the budget the mixture is larger; negative where it is smaller."""
        return self.parameters / self.budget - 1


def ranks_of(kind: ExpertsKind, rank: int, num_levels: int, ring: int = RING) -> tuple[int, ...]:
    """Return the `ranks` of a `MultilinearMLPConfig`: the rank itself, or the ring that has it as its last free rank.

    Example:
        >>> ranks_of("cp", 556, 1), ranks_of("tr", 149, 1), ranks_of("tr", 149, 2)
        ((556,), (4, 4, 149, 4), (4, 4, 4, 149, 4))
    """
    require_one_of("kind", kind, get_args(ExpertsKind))
    return (rank,) if kind == "cp" else (*(ring,) * (num_levels + 1), rank, ring)


def matched_rank(
    kind: ExpertsKind,
    d_in: int,
    d_out: int,
    num_experts: tuple[int, ...],
    *,
    ring: int = RING,
    budget: int | None = None,
) -> Match:
    """Return the smallest rank with which a layer has at least as many parameters as a dense one with bias.

    For the 768 → 1000 head of CLIP it is the paper's row: CP 414, 393, 354, 283, 165 for 32 … 512 experts, TR 102, 95,
    81, 52 for 64 … 512 (Oldfield et al., 2024).

    Args:
        kind: How the experts are factorised.
        d_in: Width of the input.
        d_out: Width of the output.
        num_experts: Number of experts of each level.
        ring: The other ranks of a ring.
        budget: Parameters to match, if not the dense layer's.

    Raises:
        ValueError: If a size is not positive, or the gate alone takes the whole budget.

    Example:
        >>> [matched_rank("cp", 768, 1000, (n,)).rank for n in (32, 64, 128, 256, 512)]
        [414, 393, 354, 283, 165]
    """

    def size(rank: int) -> int:
        if kind == "cp":
            return CPMixtureConfig(d_in=d_in, d_out=d_out, num_experts=num_experts, rank=rank).num_parameters
        ranks = ranks_of(kind, rank, len(num_experts), ring)
        return TRMixtureConfig(d_in=d_in, d_out=d_out, num_experts=num_experts, ranks=ranks).num_parameters

    return _match(size(1), size(2), (d_in + 1) * d_out if budget is None else budget, num_experts)


def matched_block_rank(config: MultilinearMLPConfig, *, ring: int = RING, budget: int | None = None) -> Match:
    """Return the smallest rank with which a block has at least as many parameters as a dense MLP with biases.

    Args:
        config: The block; its own ranks are not read.
        ring: The other ranks of a ring.
        budget: Parameters to match, if not the dense MLP's of the same widths.

    Raises:
        ValueError: If the gate alone takes the whole budget.
    """

    def size(rank: int) -> int:
        return replace(config, ranks=ranks_of(config.kind, rank, len(config.num_experts), ring)).num_parameters

    return _match(size(1), size(2), _dense_mlp(config) if budget is None else budget, config.num_experts)


def fractional_block_rank(config: MultilinearMLPConfig, fraction: float, *, ring: int = RING) -> Match:
    """Return the paper's own choice for blocks, a fraction of the input's width, rounded down, and how far off it is.

    GPT-2 with 256 experts: .725 and .195 of 768 make CP 556 and TR 149, 0.6 % and 1.3 % more than the dense MLP.

    Args:
        config: The block; its own ranks are not read.
        fraction: Rank as a share of `d_in`.
        ring: The other ranks of a ring.

    Raises:
        ValueError: If that leaves no rank.
    """
    # As a decimal, since 0.29 · 100 is 28.999… in binary.
    rank = math.floor(Fraction(str(fraction)) * config.d_in)
    if rank < 1:
        raise ValueError(f"the rank must be at least 1; {fraction} of {config.d_in} is {rank}. Raise the fraction.")
    ranks = ranks_of(config.kind, rank, len(config.num_experts), ring)
    return Match(rank, replace(config, ranks=ranks).num_parameters, _dense_mlp(config))


def _dense_mlp(config: MultilinearMLPConfig) -> int:
    return (config.d_in + 1) * config.d_hidden + (config.d_hidden + 1) * config.d_out


def _match(one: int, two: int, budget: int, num_experts: tuple[int, ...]) -> Match:
    """Return the match of a size that grows by the same with each rank."""
    require_experts(num_experts)
    each, fixed = two - one, 2 * one - two
    if budget <= fixed:
        raise ValueError(
            f"the budget must pay for more than the gate and what else does not grow with the rank, {fixed:,} "
            f"parameters for {math.prod(num_experts)} experts; got {budget:,}. Ask for fewer experts."
        )
    rank = -(-(budget - fixed) // each)
    return Match(rank, fixed + each * rank, budget)
