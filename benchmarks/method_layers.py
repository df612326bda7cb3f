"""What `method_candidates.py` tries beside the library's own kinds: shared transcoders and mixtures with a change."""

from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from mxd.kernels import linear, mix, score_blocks
from mxd.layers import (
    LinearMap,
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    SharedTranscoder,
    SharedTranscoderConfig,
    SparseCode,
)
from mxd.layers.dense_encoder import dense_encoder
from mxd.layers.initialization import normalize_rows_, uniform, zeros
from mxd.layers.selection import Selection, scores_at

USAGE_RATE = 0.05  # Weight of one batch in the running mean of what experts are used for: a memory of 20 batches.
BALANCE_RATE = 0.01  # How far a latent's bias moves in a step, over the spread of the first batch's scores.


@runtime_checkable
class Adapting(Protocol):
    """A layer that keeps what no gradient teaches."""

    def adapt(self, x: Tensor, code: SparseCode) -> None:
        """Learn from the inputs of a step, after it, and from the code that they had in it."""
        ...


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


class SkipMixture(MixtureOfDecoders):
    """A mixture of decoders beside a linear map of the input, which begins at zero: y = mixture + x W_skip + b."""

    def __init__(self, config: MixtureOfDecodersConfig, generator: Generator | None = None):
        super().__init__(config, generator)
        self.W_skip = zeros(config.d_in, config.d_out)

    def base(self, x: Tensor) -> Tensor:
        return super().base(x) + linear(x, self.W_skip)

    def carried(self, x: Tensor, code: SparseCode) -> Tensor:
        return mix(code.values, code.indices, self.W_expert) * self.dense_branch(x)

    def decode(self, x: Tensor, code: SparseCode) -> Tensor:
        return self.carried(x, code) + self.base(x)

    def input_maps(self) -> tuple[LinearMap, ...]:
        return *super().input_maps(), LinearMap(self.W_skip, self.b_dec)


class MeanFreeMixture(MixtureOfDecoders):
    """A mixture whose experts cannot agree on average: their usage-weighted mean is projected out of the table.

    With usage u_n = E[a_n] / Σ_j E[a_j], the share of all gate values that is expert n's, the table in use is
    c'_n = c_n − m with m = Σ_n u_n c_n, so that Σ_n u_n c'_n = 0: averaged over tokens, what experts add up to by which
    to scale the dense branch is zero. u is a running mean over batches, uniform at first. It is a buffer: fixed within
    a step, moved only after it (`adapt`), and in evaluation as it was left. m is not kept but taken from u and the
    table as it stands, in training and evaluation by the same line, and with its gradient: nothing is to be gained by
    moving all experts alike, which would draw rows of unit length to each other without end.

    A shared expert, where the configuration asks for one, may learn the mean; it belongs to `base`, so that training
    can charge for it. With `size` the mean keeps its direction and is held at that share of the spread
    (Σ_n u_n |c'_n|²)^½ of the experts about it: k values that agree add up to k times it, k that do not to √k times the
    spread, so at 1/√k the two are as loud.
    """

    def __init__(self, config: MixtureOfDecodersConfig, generator: Generator | None = None, *, size: float = 0.0):
        super().__init__(config, generator)
        self.size = size
        self.usage = nn.Buffer(torch.full((config.num_experts,), 1 / config.num_experts))

    def table(self) -> Tensor:
        """Return c', the table in use."""
        mean = self.usage @ self.W_expert
        free = self.W_expert - mean
        if self.size:
            spread = (self.usage @ free.square().sum(1)).sqrt()
            free = free + self.size * spread * nn.functional.normalize(mean, dim=0)
        return free

    def carried(self, x: Tensor, code: SparseCode) -> Tensor:
        return mix(code.values, code.indices, self.table()) * self.dense_branch(x)

    def decode(self, x: Tensor, code: SparseCode) -> Tensor:
        return self.carried(x, code) + self.base(x)

    def atoms(self, x: Tensor, indices: Tensor) -> Tensor:
        return self.table()[indices] * self.dense_branch(x)[..., None, :]

    def expert_weight(self, n: int) -> Tensor:
        return self.W_dec * self.table()[n]

    @torch.no_grad()
    def adapt(self, x: Tensor, code: SparseCode) -> None:
        values = torch.zeros_like(self.usage).index_add_(0, code.indices.flatten(), code.values.flatten())
        self.usage.lerp_(values / values.sum().clamp_min(torch.finfo(values.dtype).tiny), USAGE_RATE)


class BalancedTopK(Selection):
    """The k positive scores of each input that are largest with a bias of the latent's own added to them.

    The bias decides which latents fire and has no part in their values; a score that is not positive is chosen only
    where positive ones run out, and is worth 0. After each step it moves up by a fixed amount for latents that fired on
    fewer tokens than the average latent, and down for those that fired on more (Wang et al., 2024, load balancing
    without an auxiliary loss). As there, it stays what it is when training ends. It is one number a latent, which the
    parameters that are matched do not count.
    """

    name = "topk"

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.favour = nn.Buffer(torch.zeros(num_latents))
        self.amount = nn.Buffer(torch.zeros(()))

    def _chosen(self, scores: Tensor, k: int) -> Tensor:
        return torch.where(scores > 0, scores + self.favour, -torch.inf).topk(k, dim=-1, sorted=False).indices

    def kept(self, scores: Tensor, k: int) -> Tensor:
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, self._chosen(scores, k), True)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseCode:
        rows = x.reshape(-1, x.shape[-1])
        chosen = torch.cat([self._chosen(scores, k) for _, scores in score_blocks(rows, weight, bias)])
        values = scores_at(rows, weight, bias, chosen).relu()
        return SparseCode(*(part.view(*x.shape[:-1], k) for part in (values, chosen)))

    def rebalance(self, fired: Tensor) -> None:
        """Move the biases after a step in which latents fired on these many tokens."""
        self.favour += self.amount * (fired.mean() - fired).sign()


class BalancedTranscoder(SharedTranscoder):
    """A shared transcoder whose latents are selected with regard to how much they are used."""

    def __init__(self, config: SharedTranscoderConfig, generator: Generator | None = None):
        super().__init__(config, generator)
        self.selection: BalancedTopK = BalancedTopK(config.num_latents)

    @torch.no_grad()
    def adapt(self, x: Tensor, code: SparseCode) -> None:
        if self.selection.amount == 0:
            self.selection.amount.copy_(BALANCE_RATE * self.pre_activations(x).std())
        fired = torch.bincount(code.indices[code.values > 0], minlength=self.config.num_latents).float()
        self.selection.rebalance(fired)


def likeness(code: SparseCode, table: Tensor) -> Tensor:
    """Return the mean squared cosine between rows of a table that are active together, over all pairs on all tokens."""
    fires = code.values > 0
    rows = nn.functional.normalize(nn.functional.embedding(code.indices, table), dim=-1) * fires[..., None]
    squares = (rows @ rows.mT).square()
    pairs = fires.sum(-1) * (fires.sum(-1) - 1)
    return (squares.sum() - squares.diagonal(dim1=-2, dim2=-1).sum()) / pairs.sum().clamp_min(1)
