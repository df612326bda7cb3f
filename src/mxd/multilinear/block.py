"""A whole MLP as two multilinear mixtures that share one set of coefficients."""

from dataclasses import dataclass
from typing import get_args

from jaxtyping import Float
from torch import Generator, Tensor, nn

from mxd.layers import Activation
from mxd.layers.activations import activation_function
from mxd.multilinear.experts import CPExpertsConfig, ExpertsConfig, ExpertsKind, TRExpertsConfig
from mxd.multilinear.gate import ExpertGate, GateName, Normalization, require_one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class MultilinearMLPConfig:
    """Shape and gate of a `MultilinearMLP`."""

    kind: ExpertsKind
    """How both layers' experts are factorised: `cp` or `tr`."""
    d_in: int
    """Width of the input."""
    d_hidden: int
    """Width between the two layers."""
    d_out: int
    """Width of the output."""
    num_experts: tuple[int, ...]
    """Number of experts of each level, in both layers."""
    ranks: tuple[int, ...]
    """The one rank of `cp`, or the ranks around the ring of `tr`, as `TRExpertsConfig` has them; of both layers."""
    activation: Activation = "gelu"
    """Activation between the two layers."""
    gate: GateName = "entmax"
    """What makes coefficients of the gate's scores: `entmax` (mostly zeros) or `softmax`."""
    normalization: Normalization = "layer"
    """How the scores are normalised first: over the `batch`, as for images, or over the experts (`layer`)."""
    normalize_input: bool = False
    """Whether the first layer reads its input through a LayerNorm; the gate reads it as it is."""
    dropout: float = 0.0
    """Share of the output's entries that training sets to zero."""

    @property
    def layers(self) -> tuple[ExpertsConfig, ExpertsConfig]:
        """The shapes of the two layers."""
        return self._layer(self.d_in, self.d_hidden), self._layer(self.d_hidden, self.d_out)

    @property
    def num_parameters(self) -> int:
        """Both layers, the gate, and the LayerNorm if there is one."""
        factors = sum(layer.factor_parameters for layer in self.layers)
        return factors + self.d_in * sum(self.num_experts) + 2 * self.d_in * self.normalize_input

    @property
    def flops_per_token(self) -> int:
        """Operations for one input; norms, activation, elementwise products and biases are left out."""
        return sum(layer.factor_flops for layer in self.layers) + 2 * self.d_in * sum(self.num_experts)

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, get_args(ExpertsKind))
        if self.kind == "cp" and len(self.ranks) != 1:
            raise ValueError(f"ranks must be a single number for kind cp; got {self.ranks}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}.")
        activation_function(self.activation)
        _ = self.layers

    def _layer(self, d_in: int, d_out: int) -> ExpertsConfig:
        if self.kind == "cp":
            return CPExpertsConfig(d_in=d_in, d_out=d_out, num_experts=self.num_experts, rank=self.ranks[0])
        return TRExpertsConfig(d_in=d_in, d_out=d_out, num_experts=self.num_experts, ranks=self.ranks)


class MultilinearMLP(nn.Module):
    r"""What stands for an MLP: $y = \mathrm{mix}_2(\phi(\mathrm{mix}_1(x; a)); a)$ with $a$ the gate's of $x$.

    Both layers are mixed by the same coefficients (Oldfield et al., 2024), so the block is a mixture of whole MLPs only
    where one expert is active; it has one gate.
    """

    def __init__(self, config: MultilinearMLPConfig, generator: Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.gate = ExpertGate(config.d_in, config.num_experts, gate=config.gate, normalization=config.normalization)
        first, second = config.layers
        self.input_norm = nn.LayerNorm(config.d_in) if config.normalize_input else nn.Identity()
        self.first = first.build(generator)
        self.activation = activation_function(config.activation)
        self.second = second.build(generator)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the block's output."""
        coefficients = self.gate(x)
        hidden = self.activation(self.first(self.input_norm(x), coefficients))
        return self.dropout(self.second(hidden, coefficients))
