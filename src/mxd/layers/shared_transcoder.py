"""The transcoder with a shared expert: few neurons carry the prediction, a dense expert on a budget completes it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.kernels import linear, mix
from mxd.layers.activations import Activation
from mxd.layers.dense_encoder import Encoder, dense_encoder, num_branches
from mxd.layers.initialization import uniform, uniform_by_column, zeros
from mxd.layers.mlp_weights import MlpWeights
from mxd.layers.request import LayerRequest
from mxd.layers.selection import SelectionName, SparseCode
from mxd.layers.sparse_layer import LinearMap, SparseLayer, require_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTranscoderConfig:
    """Shape and sparsity of a `SharedTranscoder`."""

    d_in: int
    """Width of the input."""
    d_hidden: int
    """Number of dense hidden units of the shared expert: those of the decomposed MLP and more as a rule."""
    d_out: int
    """Width of the output."""
    num_latents: int
    """Number of latents: neurons of the wide hidden layer."""
    k: int = 32
    """Number of latents active for each token, at most."""
    activation: Activation = "gelu"
    """Activation of the shared expert; the decomposed MLP's own as a rule."""
    encoder: Encoder = "mlp"
    """Dense encoder of the shared expert: `mlp` has one branch, `glu` two."""
    selection: SelectionName = "topk"
    """How active latents are chosen: `topk`, `batch-topk` or `l1`."""

    @property
    def num_parameters(self) -> int:
        """Encoder and decoder of the latents, the shared expert, and the output bias."""
        shared = num_branches(self.encoder) * self.d_hidden * (self.d_in + 1) + self.d_hidden * self.d_out
        return self.num_latents * (self.d_in + 1 + self.d_out) + shared + self.d_out

    @property
    def flops_per_token(self) -> int:
        """All scores, `k` decoder rows and the shared expert."""
        shared = num_branches(self.encoder) * self.d_in * self.d_hidden + self.d_hidden * self.d_out
        return 2 * (self.num_latents * self.d_in + self.k * self.d_out + shared)

    @classmethod
    def from_request(cls, request: LayerRequest) -> "SharedTranscoderConfig":
        """Return the configuration that was asked for.

        Raises:
            ValueError: If a size does not fit, or no activation is given.
        """
        return cls(
            d_in=request.d_in,
            d_hidden=request.d_hidden,
            d_out=request.d_out,
            num_latents=request.num_latents,
            k=request.k,
            activation=request.require_activation(),
            encoder=request.encoder,
            selection=request.selection,
        )

    def __post_init__(self) -> None:
        require_sizes(self, d_hidden=self.d_hidden)


class SharedTranscoder(SparseLayer):
    r"""A transcoder beside one dense expert that every token shares.

    $$y = \sum_n a_n d_n + S^\top z + b, \quad a = \mathrm{topk}(\mathrm{relu}(W_\mathrm{enc}^\top x + b_\mathrm{enc})),
      \quad z = \phi(E^\top x + b_E)$$

    Begun as the model's own MLP, the shared expert alone would be exact and the latents idle. Training charges for its
    variance (`shared_penalty`), so that the latents carry what few of them can, and the shared expert what they leave.
    docs/method.md derives it and draws what it trades.
    """

    kind = "shared-transcoder"
    fixed_atoms = True
    inits = ("model", "paper")
    shared_penalty = 0.12
    config: SharedTranscoderConfig
    W_enc: Float[nn.Parameter, "d_in num_latents"]
    b_enc: Float[nn.Parameter, " num_latents"]
    W_dec: Float[nn.Parameter, "num_latents d_out"]
    W_shared: Float[nn.Parameter, "d_hidden d_out"]
    b_dec: Float[nn.Parameter, " d_out"]

    def __init__(self, config: SharedTranscoderConfig, generator: torch.Generator | None = None):
        super().__init__(selection=config.selection)
        self.config = config
        self.W_enc = uniform_by_column(config.d_in, config.num_latents, config.d_in**-0.5, generator)
        self.b_enc = zeros(config.num_latents)
        self.W_dec = uniform(config.num_latents, config.d_out, bound=config.num_latents**-0.5, generator=generator)
        self.encoder = dense_encoder(config.encoder, config.d_in, config.d_hidden, config.activation, generator)
        self.W_shared = zeros(config.d_hidden, config.d_out)
        self.b_dec = zeros(config.d_out)

    @property
    def scorer(self) -> LinearMap:
        """The encoder of the latents."""
        return LinearMap(self.W_enc, self.b_enc)

    def decode(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        """Return the sum of the active latents' decoder rows, plus the shared expert and the bias."""
        return self.carried(x, code) + self.base(x)

    def carried(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        """Return the sum of the active latents' decoder rows; x plays no part in it."""
        return mix(code.values, code.indices, self.W_dec)

    def base(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return what the shared expert adds, plus the bias."""
        return linear(self.encoder(x), self.W_shared, self.b_dec)

    def atoms(
        self, x: Float[Tensor, "*batch d_in"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k d_out"]:
        """Return the named decoder rows, the same for every input."""
        return self.W_dec[indices]

    def dense_branch(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return ones: each atom is a multiple of the same vector, and the shared expert no part of any."""
        return x.new_ones(*x.shape[:-1], self.config.d_out)

    def begin_from(self, mlp: MlpWeights) -> None:
        """Take the MLP's weights for the shared expert, which then predicts exactly what the MLP does.

        Hidden units beyond the MLP's own keep the inputs they were drawn with, and begin without a say.

        Raises:
            ValueError: If the shared expert is of another kind, or narrower than the MLP.
        """
        self.encoder.begin_from(mlp)
        with torch.no_grad():
            self.W_shared.zero_()[: len(mlp.W_dec)].copy_(mlp.W_dec)
            self.b_dec.copy_(mlp.b_dec)

    @property
    def latent_table(self) -> nn.Parameter:
        """The decoder."""
        return self.W_dec

    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return the encoder of the latents and the shared expert's branches."""
        return self.scorer, *self.encoder.input_maps()
