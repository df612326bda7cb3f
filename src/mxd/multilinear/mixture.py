"""Multilinear mixtures of experts that stand where a linear layer stood."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Generator, Tensor, nn

from mxd.multilinear.experts import (
    Coefficients,
    CPExpertsConfig,
    FactorisedExperts,
    TRExpertsConfig,
)
from mxd.multilinear.gate import ExpertGate, GateName, Normalization


@dataclass(frozen=True, kw_only=True, slots=True)
class CPMixtureConfig(CPExpertsConfig):
    """Shape and gate of a `CPMixture`."""

    gate: GateName = "entmax"
    """What makes coefficients of the gate's scores: `entmax` (mostly zeros) or `softmax`."""
    normalization: Normalization = "layer"
    """How the scores are normalised first: over the `batch`, as for images, or over the experts (`layer`)."""

    @property
    def num_parameters(self) -> int:
        """Factors and gate."""
        return self.factor_parameters + self.d_in * sum(self.num_experts)

    @property
    def flops_per_token(self) -> int:
        """Operations for one input, of factors and gate; elementwise products and biases are left out."""
        return self.factor_flops + 2 * self.d_in * sum(self.num_experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class TRMixtureConfig(TRExpertsConfig):
    """Shape and gate of a `TRMixture`."""

    gate: GateName = "entmax"
    """What makes coefficients of the gate's scores: `entmax` (mostly zeros) or `softmax`."""
    normalization: Normalization = "layer"
    """How the scores are normalised first: over the `batch`, as for images, or over the experts (`layer`)."""

    @property
    def num_parameters(self) -> int:
        """Cores and gate."""
        return self.factor_parameters + self.d_in * sum(self.num_experts)

    @property
    def flops_per_token(self) -> int:
        """Operations for one input, of cores and gate; biases are left out."""
        return self.factor_flops + 2 * self.d_in * sum(self.num_experts)


class Mixture(nn.Module):
    r"""A layer $y = \sum_n a_n W_n^\top [x, 1]$ whose coefficients a gate makes of x itself.

    Args:
        config: Shape and gate; it says which of the two factorisations the experts are in.
        generator: Draws the weights.
    """

    def __init__(self, config: CPMixtureConfig | TRMixtureConfig, generator: Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.gate = ExpertGate(config.d_in, config.num_experts, gate=config.gate, normalization=config.normalization)
        self.experts: FactorisedExperts = config.build(generator)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], coefficients: Coefficients | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the layer's output.

        Args:
            x: The inputs.
            coefficients: Coefficients to use in place of the gate's, one tensor a level.

        Raises:
            ValueError: If the coefficients do not fit the experts or the inputs.
        """
        return self.experts(x, self.gate(x) if coefficients is None else coefficients)


class CPMixture(Mixture):
    """A mixture of experts in a CP decomposition; see `CPExperts` and `ExpertGate`."""

    def __init__(self, config: CPMixtureConfig, generator: Generator | None = None) -> None:
        super().__init__(config, generator)


class TRMixture(Mixture):
    """A mixture of experts in a tensor ring; see `TRExperts` and `ExpertGate`."""

    def __init__(self, config: TRMixtureConfig, generator: Generator | None = None) -> None:
        super().__init__(config, generator)
