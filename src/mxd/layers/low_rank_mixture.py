"""The mixture of low-rank experts: what a mixture of decoders is when its experts are factorised the usual way."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.kernels import cp_combine, cp_matrix, linear, mix
from mxd.layers.activations import Activation
from mxd.layers.dense_encoder import Encoder, dense_encoder, num_branches
from mxd.layers.initialization import normalize_rows_, uniform, uniform_by_column, zeros
from mxd.layers.request import LayerRequest
from mxd.layers.selection import SelectionName, SparseCode
from mxd.layers.sparse_layer import LinearMap, SparseLayer, require_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankMixtureConfig:
    """Shape and sparsity of a `LowRankMixture`."""

    d_in: int
    """Width of the input."""
    d_hidden: int
    """Number of dense hidden units; the decomposed MLP's own hidden width as a rule."""
    d_out: int
    """Width of the output."""
    num_experts: int
    """Number of experts."""
    rank: int
    """Largest rank that an expert can have."""
    k: int = 32
    """Number of experts active for each token, at most."""
    activation: Activation = "gelu"
    """Activation of the dense encoder; the decomposed MLP's own as a rule."""
    encoder: Encoder = "mlp"
    """Dense encoder: `mlp` has one branch, `glu` two."""
    normalize_experts: bool = True
    """Whether each expert's vector is kept at unit length, which fixes the scale that it shares with the maps."""
    selection: SelectionName = "topk"
    """How active latents are chosen: `topk`, `batch-topk` or `l1`."""

    @property
    def num_latents(self) -> int:
        """Size of the code: the number of experts."""
        return self.num_experts

    @property
    def num_parameters(self) -> int:
        """Gate and expert table; dense encoder; the maps into the rank and out of it; output bias."""
        dense = num_branches(self.encoder) * self.d_hidden * (self.d_in + 1) + self.rank * (self.d_hidden + self.d_out)
        return self.num_experts * (self.d_in + 1 + self.rank) + dense + self.d_out

    @property
    def flops_per_token(self) -> int:
        """All gate scores, `k` rows of the expert table, dense encoder and the maps into the rank and out of it."""
        dense = num_branches(self.encoder) * self.d_in * self.d_hidden + self.rank * (self.d_hidden + self.d_out)
        return 2 * (self.num_experts * self.d_in + self.k * self.rank + dense)

    @classmethod
    def from_request(cls, request: LayerRequest) -> "LowRankMixtureConfig":
        """Return the configuration that was asked for.

        Raises:
            ValueError: If a size does not fit, or no activation is given.
        """
        return cls(
            d_in=request.d_in,
            d_hidden=request.d_hidden,
            d_out=request.d_out,
            num_experts=request.num_latents,
            rank=request.chosen_rank,
            k=request.k,
            activation=request.require_activation(),
            encoder=request.encoder,
            normalize_experts=request.normalize,
            selection=request.selection,
        )

    def __post_init__(self) -> None:
        require_sizes(self, d_hidden=self.d_hidden, rank=self.rank)


class LowRankMixture(SparseLayer):
    r"""A sparse mixture of linear decoders of low rank: the CP decomposition of the experts' tensor.

    $$y = \sum_n a_n W_n^\top z + b, \quad z = \phi(E^\top x + b_E), \quad
      a = \mathrm{topk}(\mathrm{relu}(G^\top x + b_G)), \quad W_n = U_2\,\mathrm{diag}(u_n)\,U_3$$

    with $u_n$ the rows of $U_1$ (`W_expert`), $U_2$ the map into the rank (`W_down`) and $U_3$ the map out of it
    (`W_dec`). It is computed as $((U_1^\top a) \odot (U_2^\top z)) U_3 + b$ and reads `k` rows of the table. No $W_n$
    has a higher rank than `rank`: it is the mixture that Oldfield et al. (2025) compare theirs with, after the CP
    experts of Oldfield et al. (2024). With $U_3 = 1$ and `rank` = `d_out` it is a `MixtureOfDecoders`.

    Its start is that of the `MixtureOfDecoders`, so that the two differ in rank alone (no source says how the
    comparison was started): rows of $U_1$ have unit length and $U_3 = 0$, so the layer predicts its output bias. $U_2$
    is uniform, bound 1/√d_hidden, as in the released CP layers.
    """

    kind = "low-rank"
    config: LowRankMixtureConfig
    W_gate: Float[nn.Parameter, "d_in num_experts"]
    b_gate: Float[nn.Parameter, " num_experts"]
    W_expert: Float[nn.Parameter, "num_experts rank"]
    W_down: Float[nn.Parameter, "d_hidden rank"]
    W_dec: Float[nn.Parameter, "rank d_out"]
    b_dec: Float[nn.Parameter, " d_out"]

    def __init__(self, config: LowRankMixtureConfig, generator: torch.Generator | None = None):
        super().__init__(selection=config.selection)
        self.config = config
        self.encoder = dense_encoder(config.encoder, config.d_in, config.d_hidden, config.activation, generator)
        self.W_gate = uniform_by_column(config.d_in, config.num_experts, config.d_in**-0.5, generator)
        self.b_gate = zeros(config.num_experts)
        expert_bound = 1.0 if config.normalize_experts else config.num_experts**-0.5
        self.W_expert = uniform(config.num_experts, config.rank, bound=expert_bound, generator=generator)
        self.W_down = uniform(config.d_hidden, config.rank, bound=config.d_hidden**-0.5, generator=generator)
        self.W_dec = zeros(config.rank, config.d_out)
        self.b_dec = zeros(config.d_out)
        for table in self.unit_length_tables():
            normalize_rows_(table)

    @property
    def scorer(self) -> LinearMap:
        """The gate."""
        return LinearMap(self.W_gate, self.b_gate)

    def decode(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        r"""Return $((U_1^T a) \odot (U_2^T z)) U_3 + b$."""
        terms = mix(code.values, code.indices, self.W_expert), linear(self.encoder(x), self.W_down)
        return cp_combine(terms, self.W_dec, self.b_dec)

    def base(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the output bias: with no expert active, nothing else is left."""
        return self.b_dec.expand(*x.shape[:-1], -1)

    def atoms(
        self, x: Float[Tensor, "*batch d_in"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k d_out"]:
        r"""Return $(u_n \odot (U_2^T z)) U_3$ for each named expert."""
        return (self.W_expert[indices] * linear(self.encoder(x), self.W_down)[..., None, :]) @ self.W_dec

    def expert_weight(self, n: int) -> Float[Tensor, "d_hidden d_out"]:
        r"""Return expert n's own decoder, $W_n = U_2\,\mathrm{diag}(u_n)\,U_3$, used as `z @ W_n`.

        Raises:
            ValueError: If there is no expert n.
        """
        if not 0 <= n < self.config.num_experts:
            raise ValueError(f"expert must lie in [0, {self.config.num_experts - 1}]; got {n}.")
        return cp_matrix([self.W_expert[n]], self.W_down, self.W_dec)

    def unit_length_tables(self) -> tuple[nn.Parameter, ...]:
        """Return the expert table where it is kept normalised."""
        return (self.W_expert,) if self.config.normalize_experts else ()

    @property
    def latent_table(self) -> nn.Parameter:
        """$U_1$, the experts' vectors."""
        return self.W_expert

    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return the gate and the dense encoder's branches."""
        return self.scorer, *self.encoder.input_maps()
