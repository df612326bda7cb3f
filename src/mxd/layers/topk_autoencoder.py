"""The TopK autoencoder: a sparse stand-in for the MLP's output, not for the MLP."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.kernels import mix
from mxd.layers.initialization import normalize_rows_, uniform_by_column, zeros
from mxd.layers.request import LayerRequest
from mxd.layers.selection import SelectionName, SparseCode
from mxd.layers.sparse_layer import LinearMap, SparseLayer, require_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKAutoencoderConfig:
    """Shape and sparsity of a `TopKAutoencoder`."""

    d_in: int
    """Width of the input, which is the MLP's output, and of the reconstruction."""
    num_latents: int
    """Number of latents."""
    k: int = 32
    """Number of latents active for each token, at most."""
    normalize_decoder: bool = True
    """Whether each latent's decoder row is kept at unit length."""
    selection: SelectionName = "topk"
    """How active latents are chosen: `topk`, `batch-topk` or `l1`."""

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.d_in

    @property
    def num_parameters(self) -> int:
        """Encoder, decoder and output bias."""
        return self.num_latents * (self.d_in + 1 + self.d_out) + self.d_out

    @property
    def flops_per_token(self) -> int:
        """All scores and `k` decoder rows."""
        return 2 * (self.num_latents * self.d_in + self.k * self.d_out)

    @classmethod
    def from_request(cls, request: LayerRequest) -> "TopKAutoencoderConfig":
        """Return the configuration that was asked for; both of its widths are the MLP's output's.

        Raises:
            ValueError: If a size does not fit.
        """
        return cls(
            d_in=request.d_out,
            num_latents=request.num_latents,
            k=request.k,
            normalize_decoder=request.normalize,
            selection=request.selection,
        )

    def __post_init__(self) -> None:
        require_sizes(self)


class TopKAutoencoder(SparseLayer):
    r"""A sparse autoencoder of the MLP's output with `k` active latents (Gao et al., 2024).

    $$y = \sum_n a_n d_n + b, \qquad a = \mathrm{topk}(\mathrm{relu}(W_\mathrm{enc}^\top (x - b) + b_\mathrm{enc}))$$

    It reads the MLP's output, so the MLP stays: putting it into a model means `layer(mlp(x))`, and its parameters
    come on top of the MLP's. The encoder begins as the decoder's transpose.
    """

    kind = "topk-sae"
    fixed_atoms = True
    reads = "output"
    config: TopKAutoencoderConfig
    W_enc: Float[nn.Parameter, "d_in num_latents"]
    b_enc: Float[nn.Parameter, " num_latents"]
    W_dec: Float[nn.Parameter, "num_latents d_in"]
    b_dec: Float[nn.Parameter, " d_in"]

    def __init__(self, config: TopKAutoencoderConfig, generator: torch.Generator | None = None):
        super().__init__(selection=config.selection)
        self.config = config
        self.W_enc = uniform_by_column(config.d_in, config.num_latents, config.d_in**-0.5, generator)
        normalize_rows_(self.W_enc.t())
        self.b_enc = zeros(config.num_latents)
        self.W_dec = nn.Parameter(self.W_enc.detach().t().clone())
        self.b_dec = zeros(config.d_in)

    @property
    def scorer(self) -> LinearMap:
        """The encoder."""
        return LinearMap(self.W_enc, self.b_enc)

    def scorer_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the input with the output bias taken off."""
        return x - self.b_dec

    def decode(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_in"]:
        """Return the sum of the active latents' decoder rows, plus the bias; x plays no part in it."""
        return mix(code.values, code.indices, self.W_dec) + self.b_dec

    def base(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the output bias."""
        return self.b_dec.expand(*x.shape[:-1], -1)

    def atoms(
        self, x: Float[Tensor, "*batch d_in"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k d_in"]:
        """Return the named decoder rows, the same for every input."""
        return self.W_dec[indices]

    def add_to_output_(self, vector: Float[Tensor, " d_in"]) -> None:
        """Add to the output bias, and to the encoder's what keeps the scores: the input has the former taken off."""
        self.b_enc.add_(vector @ self.W_enc)
        self.b_dec.add_(vector)

    def unit_length_tables(self) -> tuple[nn.Parameter, ...]:
        """Return the decoder where it is kept normalised."""
        return (self.W_dec,) if self.config.normalize_decoder else ()

    @property
    def latent_table(self) -> nn.Parameter:
        """The decoder."""
        return self.W_dec

    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return none: input and reconstruction are one space here, so a change of the input alone cannot be folded."""
        return ()
