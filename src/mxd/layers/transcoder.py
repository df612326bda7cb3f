"""The transcoder: an MLP's map through few active neurons."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.kernels import mix
from mxd.layers.initialization import normalize_rows_, uniform, uniform_by_column, zeros
from mxd.layers.request import LayerRequest
from mxd.layers.selection import SelectionName, SparseCode
from mxd.layers.sparse_layer import LinearMap, SparseLayer, require_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class TranscoderConfig:
    """Shape and sparsity of a `Transcoder`."""

    d_in: int
    """Width of the input."""
    d_out: int
    """Width of the output."""
    num_latents: int
    """Number of latents: neurons of the wide hidden layer."""
    k: int = 32
    """Number of latents active for each token, at most."""
    normalize_decoder: bool = True
    """Whether each latent's decoder row is kept at unit length."""
    selection: SelectionName = "topk"
    """How active latents are chosen: `topk`, `batch-topk` or `l1`."""

    @property
    def num_parameters(self) -> int:
        """Encoder, decoder and output bias."""
        return self.num_latents * (self.d_in + 1 + self.d_out) + self.d_out

    @property
    def flops_per_token(self) -> int:
        """All scores and `k` decoder rows."""
        return 2 * (self.num_latents * self.d_in + self.k * self.d_out)

    @classmethod
    def from_request(cls, request: LayerRequest) -> "TranscoderConfig":
        """Return the configuration that was asked for.

        Raises:
            ValueError: If a size does not fit.
        """
        return cls(
            d_in=request.d_in,
            d_out=request.d_out,
            num_latents=request.num_latents,
            k=request.k,
            normalize_decoder=request.normalize,
            selection=request.selection,
        )

    def __post_init__(self) -> None:
        require_sizes(self)


class Transcoder(SparseLayer):
    r"""A wide MLP of which `k` neurons are active.

    $$y = \sum_n a_n d_n + b, \qquad a = \mathrm{topk}(\mathrm{relu}(W_\mathrm{enc}^\top x + b_\mathrm{enc}))$$

    Its output lies in the span of `k` decoder rows (plus the bias), whatever the MLP's rank: the sparsity of neurons
    that Oldfield et al. (2025) compare the Mixture of Decoders with (Dunefsky et al., 2024).
    """

    kind = "transcoder"
    fixed_atoms = True
    config: TranscoderConfig
    W_enc: Float[nn.Parameter, "d_in num_latents"]
    b_enc: Float[nn.Parameter, " num_latents"]
    W_dec: Float[nn.Parameter, "num_latents d_out"]
    b_dec: Float[nn.Parameter, " d_out"]

    def __init__(self, config: TranscoderConfig, generator: torch.Generator | None = None):
        super().__init__(selection=config.selection)
        self.config = config
        self.W_enc = uniform_by_column(config.d_in, config.num_latents, config.d_in**-0.5, generator)
        self.b_enc = zeros(config.num_latents)
        self.W_dec = uniform(config.num_latents, config.d_out, bound=config.num_latents**-0.5, generator=generator)
        self.b_dec = zeros(config.d_out)
        for table in self.unit_length_tables():
            normalize_rows_(table)

    @property
    def scorer(self) -> LinearMap:
        """The encoder."""
        return LinearMap(self.W_enc, self.b_enc)

    def decode(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        """Return the sum of the active latents' decoder rows, plus the bias; x plays no part in it."""
        return mix(code.values, code.indices, self.W_dec) + self.b_dec

    def base(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the output bias."""
        return self.b_dec.expand(*x.shape[:-1], -1)

    def atoms(
        self, x: Float[Tensor, "*batch d_in"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k d_out"]:
        """Return the named decoder rows, the same for every input."""
        return self.W_dec[indices]

    def unit_length_tables(self) -> tuple[nn.Parameter, ...]:
        """Return the decoder where it is kept normalised."""
        return (self.W_dec,) if self.config.normalize_decoder else ()

    @property
    def latent_table(self) -> nn.Parameter:
        """The decoder."""
        return self.W_dec

    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return the encoder."""
        return (self.scorer,)
