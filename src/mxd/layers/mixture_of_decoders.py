"""The Mixture of Decoders: sparse in its experts, full-rank in each of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.kernels import linear, mix
from mxd.layers.activations import Activation
from mxd.layers.dense_encoder import Encoder, dense_encoder, num_branches
from mxd.layers.initialization import normalize_rows_, uniform, uniform_by_column, zeros
from mxd.layers.mlp_weights import MlpWeights
from mxd.layers.request import LayerRequest
from mxd.layers.selection import SelectionName, SparseCode
from mxd.layers.sparse_layer import LinearMap, SparseLayer, require_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureOfDecodersConfig:
    """Shape and sparsity of a `MixtureOfDecoders`."""

    d_in: int
    """Width of the input."""
    d_hidden: int
    """Number of dense hidden units; the decomposed MLP's own hidden width as a rule."""
    d_out: int
    """Width of the output."""
    num_experts: int
    """Number of experts."""
    k: int = 32
    """Number of experts active for each token, at most."""
    activation: Activation = "gelu"
    """Activation of the dense encoder; the decomposed MLP's own as a rule."""
    encoder: Encoder = "mlp"
    """Dense encoder: `mlp` has one branch, `glu` two."""
    normalize_experts: bool = True
    """Whether each expert's vector is kept at unit length, which fixes the scale that it shares with `W_dec`."""
    shared_expert: bool = False
    """Whether one more expert is active on every token, with value 1; it is no latent."""
    selection: SelectionName = "topk"
    """How active latents are chosen: `topk`, `batch-topk` or `l1`."""

    @property
    def num_latents(self) -> int:
        """Size of the code: the number of experts."""
        return self.num_experts

    @property
    def num_parameters(self) -> int:
        """Gate and expert table; dense encoder and decoder; shared expert, if there is one; output bias."""
        dense = num_branches(self.encoder) * self.d_hidden * (self.d_in + 1) + self.d_hidden * self.d_out
        return self.num_experts * (self.d_in + 1 + self.d_out) + dense + self.d_out * (1 + self.shared_expert)

    @property
    def flops_per_token(self) -> int:
        """All gate scores, `k` rows of the expert table, dense encoder and decoder.

        For GPT-2 (21,490 experts, k 32) this is 42.5 million where the original MLP takes 9.4 (Oldfield et al., 2025).
        """
        dense = num_branches(self.encoder) * self.d_in * self.d_hidden + self.d_hidden * self.d_out
        return 2 * (self.num_experts * self.d_in + self.k * self.d_out + dense)

    @classmethod
    def from_request(cls, request: LayerRequest) -> "MixtureOfDecodersConfig":
        """Return the configuration that was asked for.

        Raises:
            ValueError: If a size does not fit, or no activation is given.
        """
        return cls(
            d_in=request.d_in,
            d_hidden=request.d_hidden,
            d_out=request.d_out,
            num_experts=request.num_latents,
            k=request.k,
            activation=request.require_activation(),
            encoder=request.encoder,
            normalize_experts=request.normalize,
            shared_expert=request.shared_expert,
            selection=request.selection,
        )

    def __post_init__(self) -> None:
        require_sizes(self, d_hidden=self.d_hidden)


class MixtureOfDecoders(SparseLayer):
    r"""A sparse mixture of `num_experts` linear decoders that share one dense encoder.

    $$y = \sum_n a_n W_n^\top z + b, \quad z = \phi(E^\top x + b_E), \quad
      a = \mathrm{topk}(\mathrm{relu}(G^\top x + b_G)), \quad W_n = D\,\mathrm{diag}(c_n)$$

    The factorisation of $W_n$ makes the sum a Hadamard product, $y = (C^\top a) \odot (D^\top z) + b$,
    so no expert is ever materialised. Every $W_n$ has the rank of $D$ whenever $c_n$ has no zero
    entry, which is what a low-rank expert gives up (Oldfield et al., 2025, Lemmas 1 and 2).

    With a shared expert $c_0$ the first factor is $C^\top a + c_0$. It begins as a plain decoder, with all entries
    $d_\mathrm{out}^{-1/2}$, and its length is free: on every token its value is 1.

    At initialisation $D = 0$, so the layer predicts its output bias and the first step moves only $D$ and that bias.
    """

    kind = "mxd"
    inits = ("paper", "model")
    config: MixtureOfDecodersConfig
    W_gate: Float[nn.Parameter, "d_in num_experts"]
    b_gate: Float[nn.Parameter, " num_experts"]
    W_expert: Float[nn.Parameter, "num_experts d_out"]
    W_dec: Float[nn.Parameter, "d_hidden d_out"]
    b_dec: Float[nn.Parameter, " d_out"]
    w_shared: Float[nn.Parameter, " d_out"] | None

    def __init__(self, config: MixtureOfDecodersConfig, generator: torch.Generator | None = None):
        super().__init__(selection=config.selection)
        self.config = config
        self.encoder = dense_encoder(config.encoder, config.d_in, config.d_hidden, config.activation, generator)
        self.W_gate = uniform_by_column(config.d_in, config.num_experts, config.d_in**-0.5, generator)
        self.b_gate = zeros(config.num_experts)
        expert_bound = 1.0 if config.normalize_experts else config.num_experts**-0.5
        self.W_expert = uniform(config.num_experts, config.d_out, bound=expert_bound, generator=generator)
        self.W_dec = zeros(config.d_hidden, config.d_out)
        self.b_dec = zeros(config.d_out)
        plain = torch.full((config.d_out,), config.d_out**-0.5)
        self.register_parameter("w_shared", nn.Parameter(plain) if config.shared_expert else None)
        for table in self.unit_length_tables():
            normalize_rows_(table)

    @property
    def scorer(self) -> LinearMap:
        """The gate."""
        return LinearMap(self.W_gate, self.b_gate)

    def decode(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        r"""Return $(C^T a + c_0) \odot (D^T z) + b$, without $c_0$ where there is no shared expert."""
        scale = mix(code.values, code.indices, self.W_expert)
        scale = scale if self.w_shared is None else scale + self.w_shared
        return scale * self.dense_branch(x) + self.b_dec

    def base(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the output bias, and what a shared expert adds: with no expert active, nothing else is left."""
        bias = self.b_dec.expand(*x.shape[:-1], -1)
        return bias if self.w_shared is None else self.w_shared * self.dense_branch(x) + bias

    def atoms(
        self, x: Float[Tensor, "*batch d_in"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k d_out"]:
        r"""Return $c_n \odot (D^T z)$ for each named expert: it depends on the input, unlike a transcoder's row."""
        return self.W_expert[indices] * self.dense_branch(x)[..., None, :]

    def dense_branch(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return $D^T z$, which all experts share and scale."""
        return linear(self.encoder(x), self.W_dec)

    def begin_from(self, mlp: MlpWeights) -> None:
        """Take the MLP's hidden units; the decoder still begins at zero.

        With the MLP's decoder too, experts that agree would be exact at once, and training would leave them so
        (Oldfield et al., 2025).

        Raises:
            ValueError: If the dense encoder has another shape.
        """
        self.encoder.begin_from(mlp)

    def expert_weight(self, n: int) -> Float[Tensor, "d_hidden d_out"]:
        r"""Return expert n's own decoder, $W_n = D\,\mathrm{diag}(c_n)$, used as `z @ W_n`.

        Raises:
            ValueError: If there is no expert n.
        """
        if not 0 <= n < self.config.num_experts:
            raise ValueError(f"expert must lie in [0, {self.config.num_experts - 1}]; got {n}.")
        return self.W_dec * self.W_expert[n]

    def unit_length_tables(self) -> tuple[nn.Parameter, ...]:
        """Return the expert table where it is kept normalised."""
        return (self.W_expert,) if self.config.normalize_experts else ()

    @property
    def latent_table(self) -> nn.Parameter:
        """$C$, the experts' vectors."""
        return self.W_expert

    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return the gate and the dense encoder's branches."""
        return self.scorer, *self.encoder.input_maps()
