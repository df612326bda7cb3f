"""What `method_candidates.py` tries beside the library's own kinds: shared transcoders with a change."""

import torch
from torch import Generator, Tensor, nn

from mxd.kernels import linear, mix
from mxd.layers import SharedTranscoder, SharedTranscoderConfig, SparseCode
from mxd.layers.dense_encoder import dense_encoder
from mxd.layers.initialization import normalize_rows_, uniform, zeros


class SharedMixture(SharedTranscoder):
    """Experts that scale the shared expert's own hidden units, read by another decoder, beside the shared expert."""

    def __init__(self, config: SharedTranscoderConfig, generator: Generator | None = None):
        super().__init__(config, generator)
        self.W_dec = uniform(config.num_latents, config.d_out, bound=1.0, generator=generator)
        normalize_rows_(self.W_dec)
        self.W_dense = zeros(config.d_hidden, config.d_out)

    def dense_branch(self, x: Tensor) -> Tensor:
        return linear(self.encoder(x), self.W_dense)

    def carried(self, x: Tensor, code: SparseCode) -> Tensor:
        return super().carried(x, code) * self.dense_branch(x)

    def unit_length_tables(self) -> tuple[nn.Parameter, ...]:
        return (self.W_dec,)


class ConstantMixture(SharedMixture):
    """The same with a constant unit in the dense branch, which alone makes a transcoder of it."""

    def __init__(self, config: SharedTranscoderConfig, generator: Generator | None = None):
        super().__init__(config, generator)
        self.b_dense = nn.Parameter(torch.ones(config.d_out))

    def dense_branch(self, x: Tensor) -> Tensor:
        return linear(self.encoder(x), self.W_dense, self.b_dense)


class NarrowMixture(SharedMixture):
    """The same with few hidden units of its own, which begin as the paper's."""

    def __init__(self, config: SharedTranscoderConfig, generator: Generator | None = None, *, units: int):
        super().__init__(config, generator)
        self.W_dense = zeros(units, config.d_out)
        self.own = dense_encoder(config.encoder, config.d_in, units, config.activation, generator)

    def dense_branch(self, x: Tensor) -> Tensor:
        return linear(self.own(x), self.W_dense)


class BentTranscoder(SharedTranscoder):
    """Rows that few hidden units of their own bend: a mixture of decoders that begins as a transcoder."""

    def __init__(self, config: SharedTranscoderConfig, generator: Generator | None = None, *, units: int):
        super().__init__(config, generator)
        self.W_dense = zeros(units, config.d_out)
        self.own = dense_encoder(config.encoder, config.d_in, units, config.activation, generator)

    def dense_branch(self, x: Tensor) -> Tensor:
        return 1 + linear(self.own(x), self.W_dense)

    def carried(self, x: Tensor, code: SparseCode) -> Tensor:
        return super().carried(x, code) * self.dense_branch(x)


class ContinuousTranscoder(SharedTranscoder):
    """Latents begin to fire at zero: the largest score that is left out is taken from those that are kept."""

    def encode_at(self, x: Tensor, k: int) -> SparseCode:
        code = super().encode_at(x, k + 1)
        values, order = code.values.sort(dim=-1, descending=True)
        return SparseCode(values[..., :k] - values[..., k:], code.indices.gather(-1, order[..., :k]))


class ConfinedTranscoder(SharedTranscoder):
    """Latents write within some orthonormal directions, and the shared expert in all others."""

    def __init__(self, config: SharedTranscoderConfig, generator: Generator | None = None, *, directions: Tensor):
        super().__init__(config, generator)
        self.directions = nn.Buffer(directions)
        self.W_dec = nn.Parameter(self.W_dec.detach()[:, : directions.shape[1]].clone())

    def carried(self, x: Tensor, code: SparseCode) -> Tensor:
        return mix(code.values, code.indices, self.W_dec) @ self.directions.T

    def base(self, x: Tensor) -> Tensor:
        shared = linear(self.encoder(x), self.W_shared)
        return shared - (shared @ self.directions) @ self.directions.T + self.b_dec
