"""The skip transcoder: a transcoder beside a linear map."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.kernels import linear, mix
from mxd.layers.initialization import uniform_by_column, zeros
from mxd.layers.request import LayerRequest
from mxd.layers.selection import SelectionName, SparseCode
from mxd.layers.sparse_layer import LinearMap, SparseLayer, require_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipTranscoderConfig:
    """Shape and sparsity of a `SkipTranscoder`."""

    d_in: int
    """Width of the input."""
    d_out: int
    """Width of the output."""
    num_latents: int
    """Number of latents: neurons of the wide hidden layer."""
    k: int = 32
    """Number of latents active for each token, at most."""
    selection: SelectionName = "topk"
    """How active latents are chosen: `topk`, `batch-topk` or `l1`."""

    @property
    def num_parameters(self) -> int:
        """Encoder, decoder, skip map and output bias."""
        return self.num_latents * (self.d_in + 1 + self.d_out) + self.d_in * self.d_out + self.d_out

    @property
    def flops_per_token(self) -> int:
        """All scores, `k` decoder rows and the skip map."""
        return 2 * (self.num_latents * self.d_in + self.k * self.d_out + self.d_in * self.d_out)

    @classmethod
    def from_request(cls, request: LayerRequest) -> "SkipTranscoderConfig":
        """Return the configuration that was asked for.

        Raises:
            ValueError: If a size does not fit.
        """
        return cls(
            d_in=request.d_in,
            d_out=request.d_out,
            num_latents=request.num_latents,
            k=request.k,
            selection=request.selection,
        )

    def __post_init__(self) -> None:
        require_sizes(self)


class SkipTranscoder(SparseLayer):
    r"""A transcoder whose sparse neurons explain what a linear map of the input leaves over.

    $$y = \sum_n a_n d_n + W_\mathrm{skip}^\top x + b, \qquad
      a = \mathrm{topk}(\mathrm{relu}(W_\mathrm{enc}^\top x + b_\mathrm{enc}))$$

    Decoder and skip map begin at zero (Paulo et al., 2025), so the decoder's rows are not kept at unit length: a row
    of zeros has no direction to keep.
    """

    kind = "skip-transcoder"
    fixed_atoms = True
    config: SkipTranscoderConfig
    W_enc: Float[nn.Parameter, "d_in num_latents"]
    b_enc: Float[nn.Parameter, " num_latents"]
    W_dec: Float[nn.Parameter, "num_latents d_out"]
    b_dec: Float[nn.Parameter, " d_out"]
    W_skip: Float[nn.Parameter, "d_in d_out"]

    def __init__(self, config: SkipTranscoderConfig, generator: torch.Generator | None = None):
        super().__init__(selection=config.selection)
        self.config = config
        self.W_enc = uniform_by_column(config.d_in, config.num_latents, config.d_in**-0.5, generator)
        self.b_enc = zeros(config.num_latents)
        self.W_dec = zeros(config.num_latents, config.d_out)
        self.b_dec = zeros(config.d_out)
        self.W_skip = zeros(config.d_in, config.d_out)

    @property
    def scorer(self) -> LinearMap:
        """The encoder."""
        return LinearMap(self.W_enc, self.b_enc)

    def decode(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        """Return the sum of the active latents' decoder rows, plus the linear map and the bias."""
        return mix(code.values, code.indices, self.W_dec) + self.base(x)

    def base(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the linear map of the input, plus the bias."""
        return linear(x, self.W_skip, self.b_dec)

    def atoms(
        self, x: Float[Tensor, "*batch d_in"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k d_out"]:
        """Return the named decoder rows, the same for every input."""
        return self.W_dec[indices]

    @property
    def latent_table(self) -> nn.Parameter:
        """The decoder."""
        return self.W_dec

    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return the encoder and the skip map, whose bias is the output's."""
        return self.scorer, LinearMap(self.W_skip, self.b_dec)
