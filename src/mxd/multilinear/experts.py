"""Experts as one factorised tensor: CP and tensor ring."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from mxd.kernels import cp_combine, cp_matrix, linear, ring_combine, ring_link, ring_matrix
from mxd.layers import LinearMap
from mxd.layers.initialization import uniform
from mxd.multilinear.gate import require_experts

ExpertsKind = Literal["cp", "tr"]
"""How the experts' tensor is factorised: `cp`, a sum of outer products, or `tr`, a tensor ring."""
Coefficients: TypeAlias = Sequence[Tensor]
"""One tensor of coefficients (…, experts of the level) for each level of the hierarchy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CPExpertsConfig:
    """Shape of `CPExperts`."""

    d_in: int
    """Width of the input."""
    d_out: int
    """Width of the output."""
    num_experts: tuple[int, ...]
    """Number of experts of each level; their product is the number of experts."""
    rank: int
    """Rank of the decomposition, and the largest that an expert can have."""
    bias: bool = True
    """Whether each expert has an offset: a constant 1 is appended to the input, so that it is factorised too."""

    @property
    def factor_parameters(self) -> int:
        """Parameters of the factors: R (ΣN + I + 1 + O)."""
        return self.rank * (sum(self.num_experts) + self.d_in + self.bias + self.d_out)

    @property
    def factor_flops(self) -> int:
        """Operations of the factors for one input, elementwise products and biases left out: 2 R (ΣN + I + O)."""
        return 2 * self.rank * (sum(self.num_experts) + self.d_in + self.d_out)

    def __post_init__(self) -> None:
        require_experts(self.num_experts)
        _require_positive(d_in=self.d_in, d_out=self.d_out, rank=self.rank)

    def build(self, generator: Generator | None = None) -> "CPExperts":
        """Return experts of this shape, freshly initialised."""
        return CPExperts(self, generator)


@dataclass(frozen=True, kw_only=True, slots=True)
class TRExpertsConfig:
    """Shape of `TRExperts`."""

    d_in: int
    """Width of the input."""
    d_out: int
    """Width of the output."""
    num_experts: tuple[int, ...]
    """Number of experts of each level; their product is the number of experts."""
    ranks: tuple[int, ...]
    """Ranks around the ring: before the core of each level, of the input and of the output, and the first again, with
    which the ring closes: (4, 4, 149, 4) for one level."""
    bias: bool = True
    """Whether each expert has an offset: a constant 1 is appended to the input, so that it is factorised too."""

    @property
    def factor_parameters(self) -> int:
        """Parameters of the cores: Σ R_e N_e R_{e+1} + R_2 (I + 1) R_3 + R_3 O R_1."""
        return self._experts() + self.ranks[-3] * (self.d_in + self.bias) * self.ranks[-2] + self._output()

    @property
    def factor_flops(self) -> int:
        """Operations of the cores for one input, a multiplication with its addition counted as two, biases left out.

        Beside a product with each core there are those of the links of the ring: R1 R2 R3 for one level.
        """
        first = self.ranks[0]
        joined = sum(first * left * right for left, right in zip(self.ranks[1:-2], self.ranks[2:-1], strict=True))
        return 2 * (self._experts() + self.ranks[-3] * self.d_in * self.ranks[-2] + joined + self._output())

    def _experts(self) -> int:
        return sum(
            left * count * right
            for left, count, right in zip(self.ranks[:-3], self.num_experts, self.ranks[1:-2], strict=True)
        )

    def _output(self) -> int:
        return self.ranks[-2] * self.d_out * self.ranks[-1]

    def __post_init__(self) -> None:
        require_experts(self.num_experts)
        _require_positive(d_in=self.d_in, d_out=self.d_out)
        wanted = len(self.num_experts) + 3
        if len(self.ranks) != wanted:
            raise ValueError(
                f"ranks must be {wanted} numbers for {len(self.num_experts)} levels of experts: one before the core of "
                f"each level, of the input and of the output, and the first again; got {self.ranks}."
            )
        _require_positive(**{f"ranks[{place}]": rank for place, rank in enumerate(self.ranks)})
        if self.ranks[0] != self.ranks[-1]:
            raise ValueError(
                f"ranks must end with the one they begin with, so that the ring closes; got {self.ranks}. "
                f"Make the last {self.ranks[0]}."
            )

    def build(self, generator: Generator | None = None) -> "TRExperts":
        """Return experts of this shape, freshly initialised."""
        return TRExperts(self, generator)


ExpertsConfig: TypeAlias = CPExpertsConfig | TRExpertsConfig
"""Either factorisation."""


class FactorisedExperts(nn.Module, ABC):
    r"""Experts $W_n$ and their mixture $y = \sum_n a_n W_n^\top [z, 1]$, with coefficients given from outside.

    With several levels, $a_n$ is the product of a coefficient of each level. No tensor of experts × d_in × d_out is
    built.
    """

    config: ExpertsConfig

    @abstractmethod
    def mix(self, x: Tensor, coefficients: Coefficients) -> Tensor:
        """Return the mixture of coefficients that `forward` has checked."""

    @abstractmethod
    def expert(self, *indices: int) -> LinearMap:
        """Return one expert's own matrix, used as `x @ weight + bias`; the bias is zero where there is none.

        Args:
            indices: The expert's number in each level.

        Raises:
            ValueError: If there is no such expert.
        """

    def forward(self, x: Float[Tensor, "*batch d_in"], coefficients: Coefficients) -> Float[Tensor, "*batch d_out"]:
        """Return the mixture of the experts' outputs.

        Raises:
            ValueError: If the coefficients are not one for each expert of each level and input.
        """
        counts = self.config.num_experts
        if len(coefficients) != len(counts):
            raise ValueError(
                f"coefficients must be one tensor for each of the {len(counts)} levels of experts; "
                f"got {len(coefficients)}."
            )
        for level, (given, count) in enumerate(zip(coefficients, counts, strict=True)):
            if given.shape != (*x.shape[:-1], count):
                raise ValueError(
                    f"coefficients of level {level} must have shape {(*x.shape[:-1], count)}, one for each input and "
                    f"each of {count} experts; got {tuple(given.shape)}."
                )
        return self.mix(x, coefficients)

    def _require_expert(self, indices: Sequence[int]) -> None:
        counts = self.config.num_experts
        if len(indices) != len(counts) or not all(0 <= n < count for n, count in zip(indices, counts, strict=True)):
            levels = ", ".join(f"0 … {count - 1}" for count in counts)
            raise ValueError(f"an expert must be named by one number for each level ({levels}); got {tuple(indices)}.")


class CPExperts(FactorisedExperts):
    r"""Experts as a CP decomposition: $y = U_{out}^\top [(U_1^\top a_1) \odot \dots \odot (U_{in}^\top [z, 1])]$.

    Expert n is $U_{in}\,\mathrm{diag}(u_n)\,U_{out}$ with $u_n$ its row of $U_1$, of rank at most `rank`. The start is
    the released code's (Oldfield et al., 2024): $U_1 \sim N(1, 1)$ and ones in the factors of further levels, so that
    all experts are about one linear layer; $U_{in}$ uniform, bound 1/√I; $U_{out}$ uniform, bound 1/√R.
    """

    config: CPExpertsConfig
    W_in: Float[nn.Parameter, "d_in rank"]
    b_in: Float[nn.Parameter, " rank"] | None
    W_out: Float[nn.Parameter, "rank d_out"]

    def __init__(self, config: CPExpertsConfig, generator: Generator | None = None) -> None:
        super().__init__()
        self.config, rank = config, config.rank
        first, *further = config.num_experts
        experts = [torch.empty(first, rank).normal_(1.0, 1.0, generator=generator)]
        experts += [torch.ones(count, rank) for count in further]
        self.W_expert = nn.ParameterList(nn.Parameter(factor) for factor in experts)
        bound = config.d_in**-0.5
        self.W_in = uniform(config.d_in, rank, bound=bound, generator=generator)
        self.b_in = uniform(rank, bound=bound, generator=generator) if config.bias else None
        self.W_out = uniform(rank, config.d_out, bound=rank**-0.5, generator=generator)

    def mix(self, x: Tensor, coefficients: Coefficients) -> Tensor:
        """Return the mixture of coefficients that `forward` has checked."""
        pairs = zip(coefficients, self.W_expert, strict=True)
        terms = [linear(given.to(factor.dtype), factor) for given, factor in pairs]
        return cp_combine([*terms, linear(x, self.W_in, self.b_in)], self.W_out)

    def expert(self, *indices: int) -> LinearMap:
        """Return one expert's own matrix and bias; see `FactorisedExperts.expert`."""
        self._require_expert(indices)
        rows = [factor[n] for n, factor in zip(indices, self.W_expert, strict=True)]
        b_in = self.W_in.new_zeros(self.config.rank) if self.b_in is None else self.b_in
        return LinearMap(cp_matrix(rows, self.W_in, self.W_out), cp_matrix(rows, b_in[None], self.W_out)[0])


class TRExperts(FactorisedExperts):
    r"""Experts as a tensor ring: $W(n, i, o) = \mathrm{trace}(U_1(:,n,:)\,U_{in}(:,i,:)\,U_{out}(:,o,:))$.

    In N it grows with R1 R2 alone, which suits many experts. The start is the released code's (Oldfield et al., 2024):
    each expert's slice is diagonal with entries of N(1, 1), the identity in further levels; the input core is uniform,
    bound 1/√I; the output core uniform, bound 1/√(R3 R1).

    Cores are kept with their mode first (experts and input) or last (output), so that a product with one is a single
    matrix product: `W_expert` (N, R1, R2), `W_in` (I, R2, R3), `W_out` (R1, R3, O), the paper's U_out(r3, o, r1).
    """

    config: TRExpertsConfig
    W_in: Float[nn.Parameter, "d_in left last"]
    b_in: Float[nn.Parameter, "left last"] | None
    W_out: Float[nn.Parameter, "first last d_out"]

    def __init__(self, config: TRExpertsConfig, generator: Generator | None = None) -> None:
        super().__init__()
        self.config = config
        left, last, first = config.ranks[-3:]
        cores: list[Tensor] = []
        for level, count in enumerate(config.num_experts):
            core = torch.eye(config.ranks[level], config.ranks[level + 1]).repeat(count, 1, 1)
            if level == 0:
                core *= torch.empty(count, core.shape[1], 1).normal_(1.0, 1.0, generator=generator)
            cores.append(core)
        self.W_expert = nn.ParameterList(nn.Parameter(core) for core in cores)
        bound = config.d_in**-0.5
        self.W_in = uniform(config.d_in, left, last, bound=bound, generator=generator)
        self.b_in = uniform(left, last, bound=bound, generator=generator) if config.bias else None
        self.W_out = uniform(first, last, config.d_out, bound=(last * first) ** -0.5, generator=generator)

    def mix(self, x: Tensor, coefficients: Coefficients) -> Tensor:
        """Return the mixture of coefficients that `forward` has checked."""
        pairs = zip(coefficients, self.W_expert, strict=True)
        links = [ring_link(given.to(core.dtype), core, None) for given, core in pairs]
        return ring_combine([*links, ring_link(x, self.W_in, self.b_in)], self.W_out)

    def expert(self, *indices: int) -> LinearMap:
        """Return one expert's own matrix and bias; see `FactorisedExperts.expert`."""
        self._require_expert(indices)
        slices = [core[n] for n, core in zip(indices, self.W_expert, strict=True)]
        b_in = torch.zeros_like(self.W_in[0]) if self.b_in is None else self.b_in
        bias = ring_matrix(slices, b_in[None], self.W_out)[0]
        return LinearMap(ring_matrix(slices, self.W_in, self.W_out), bias)


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")
