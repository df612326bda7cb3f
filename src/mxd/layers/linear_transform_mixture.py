"""The sparse mixture of independent low-rank linear transforms (MOLT)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mxd.kernels import dots, mix
from mxd.kernels.backends import backend
from mxd.layers.initialization import uniform_by_column, zeros
from mxd.layers.request import LayerRequest
from mxd.layers.selection import SelectionName, SparseCode
from mxd.layers.sparse_layer import AtomRows, LinearMap, SparseLayer, require_sizes

HALVINGS = 4
"""Each group of transforms has half the rank of the one before it and twice its number; this many follow the first."""
BLOCK_ELEMENTS = 2**23
"""Elements of the largest temporaries: a transform is applied to this many inputs and outputs at one time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearTransformMixtureConfig:
    """Shape and sparsity of a `LinearTransformMixture`."""

    d_in: int
    """Width of the input."""
    d_out: int
    """Width of the output."""
    num_latents: int
    """Number of transforms."""
    rank: int
    """Rank of the widest transforms; the others have a half, a quarter, an eighth and a sixteenth of it."""
    k: int = 32
    """Number of transforms active for each token, at most."""
    selection: SelectionName = "topk"
    """How active latents are chosen: `topk`, `batch-topk` or `l1`."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each transform, falling: `rank` and its halves in the ratio 1 : 2 : 4 : 8 : 16, each at least 1.

        Where the number of transforms is no multiple of 31, each group ends at the nearest whole number, so that one
        transform more never lowers another's rank.
        """
        return tuple(rank for rank, size in self.groups for _ in range(size))

    @property
    def total_rank(self) -> int:
        """Sum of the transforms' ranks."""
        return sum(rank * size for rank, size in self.groups)

    @property
    def num_parameters(self) -> int:
        """Gate; both tables; output bias."""
        return self.num_latents * (self.d_in + 1) + self.total_rank * (self.d_in + self.d_out) + self.d_out

    @property
    def flops_per_token(self) -> int:
        """All gate scores and `k` transforms of mean rank, rounded down; which ones a token takes is not known here."""
        # Checking the type of a configuration reads this before its sizes are known to be positive.
        transforms = self.k * self.total_rank * (self.d_in + self.d_out) // max(1, self.num_latents)
        return 2 * (self.num_latents * self.d_in + transforms)

    @classmethod
    def from_request(cls, request: LayerRequest) -> "LinearTransformMixtureConfig":
        """Return the configuration that was asked for.

        Raises:
            ValueError: If a size does not fit.
        """
        return cls(
            d_in=request.d_in,
            d_out=request.d_out,
            num_latents=request.num_latents,
            rank=request.chosen_rank,
            k=request.k,
            selection=request.selection,
        )

    def __post_init__(self) -> None:
        require_sizes(self, rank=self.rank)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """The rank of each group of transforms and how many it has, widest first; a group may have none."""
        everyone = 2 ** (HALVINGS + 1) - 1
        ends = [0, *((2 * self.num_latents * (2**n - 1) + everyone) // (2 * everyone) for n in range(1, HALVINGS + 2))]
        return [(max(1, self.rank >> n), end - start) for n, (start, end) in enumerate(pairwise(ends))]


class LinearTransformMixture(SparseLayer):
    r"""A sparse sum of linear maps of the input, each of a low rank of its own.

    $$y = \sum_t a_t\, U_t^\top V_t^\top x + b, \qquad a = \mathrm{topk}(\mathrm{relu}(G^\top x + b_G))$$

    The transforms share nothing. Their $V_t$ are blocks of columns of one table (`W_down`), their $U_t$ the blocks of
    rows of another (`W_dec`) at the same places. Only the transforms that a token names are computed: tokens are
    grouped by transform. Ranks and their ratio are those of Anthropic's MOLT (circuits updates, 2025), which is
    trained with a sparsity penalty instead of TopK.

    No source says how it starts. Here $V$ is uniform, bound 1/√d_in, and $U = 0$, as the decoder of a
    `MixtureOfDecoders`: the layer predicts its output bias.
    """

    kind = "molt"
    rank_by_budget = True
    config: LinearTransformMixtureConfig
    W_gate: Float[nn.Parameter, "d_in num_latents"]
    b_gate: Float[nn.Parameter, " num_latents"]
    W_down: Float[nn.Parameter, "d_in total_rank"]
    W_dec: Float[nn.Parameter, "total_rank d_out"]
    b_dec: Float[nn.Parameter, " d_out"]

    def __init__(self, config: LinearTransformMixtureConfig, generator: torch.Generator | None = None):
        super().__init__(selection=config.selection)
        self.config = config
        self.offsets = (0, *accumulate(config.ranks))
        """Where each transform's block begins in the tables, and where the last one ends."""
        self.W_gate = uniform_by_column(config.d_in, config.num_latents, config.d_in**-0.5, generator)
        self.b_gate = zeros(config.num_latents)
        self.W_down = uniform_by_column(config.d_in, config.total_rank, config.d_in**-0.5, generator)
        self.W_dec = zeros(config.total_rank, config.d_out)
        self.b_dec = zeros(config.d_out)

    @property
    def scorer(self) -> LinearMap:
        """The gate."""
        return LinearMap(self.W_gate, self.b_gate)

    def decode(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        """Return the sum of the active transforms of the input, plus the bias."""
        flat = SparseCode(*(part.reshape(-1, part.shape[-1]) for part in code))
        return self._transformed(x.reshape(-1, x.shape[-1]), flat).view(*x.shape[:-1], self.config.d_out) + self.b_dec

    def base(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the output bias."""
        return self.b_dec.expand(*x.shape[:-1], -1)

    def atoms(
        self, x: Float[Tensor, "*batch d_in"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k d_out"]:
        """Return what each named transform makes of the input."""
        inputs = x[..., None, :].expand(*indices.shape, -1).reshape(-1, x.shape[-1])
        code = SparseCode(inputs.new_ones(len(inputs), 1), indices.reshape(-1, 1))
        return self._transformed(inputs, code).view(*indices.shape, self.config.d_out)

    def expert_weight(self, n: int) -> Float[Tensor, "d_in d_out"]:
        """Return transform n's own matrix, used as `x @ W_n`.

        Raises:
            ValueError: If there is no transform n.
        """
        if not 0 <= n < self.config.num_latents:
            raise ValueError(f"expert must lie in [0, {self.config.num_latents - 1}]; got {n}.")
        block = slice(self.offsets[n], self.offsets[n + 1])
        return self.W_down[:, block] @ self.W_dec[block]

    def atom_rows(self, latent: int) -> AtomRows:
        """Return the transform's block of rows of `W_dec`."""
        return AtomRows(self.W_dec, self.offsets[latent], self.offsets[latent + 1])

    def latent_parameters(self) -> list[nn.Parameter]:
        """Return all but the output bias: the transforms share nothing."""
        return [self.W_gate, self.b_gate, self.W_down, self.W_dec]

    def latent_lengths(self) -> Float[Tensor, " num_latents"]:
        """Return the Frobenius norm of each transform, from Gram matrices of its rank: none is built."""
        squares: list[Tensor] = []
        for rank, size in self.config.groups:
            start = self.offsets[sum(map(len, squares))]
            block = slice(start, start + rank * size)
            down, up = self.W_down[:, block].unflatten(1, (size, rank)), self.W_dec[block].unflatten(0, (size, rank))
            grams = torch.einsum("inr,ins->nrs", down, down) * torch.einsum("nro,nso->nrs", up, up)
            squares.append(grams.sum((1, 2)))
        square = torch.cat(squares)
        # The root's slope at zero, where a fresh transform is, is infinite; and rounding may go below.
        return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)

    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return none: the transforms have no bias into which a change of the input's origin could be folded."""
        return ()

    def _transformed(self, x: Float[Tensor, "tokens d_in"], code: SparseCode) -> Float[Tensor, "tokens d_out"]:
        if backend(x.device) == "reference" or torch.compiler.is_compiling():
            return self._transformed_by_rows(x, code)
        kind, dtype = x.device.type, self.W_dec.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        sums = _Transforms.apply(
            x.to(dtype), code.values, code.indices, self.W_down.to(dtype), self.W_dec.to(dtype), self.offsets
        )
        assert isinstance(sums, Tensor)
        return sums.to(self.W_dec.dtype)

    def _transformed_by_rows(self, x: Float[Tensor, "tokens d_in"], code: SparseCode) -> Float[Tensor, "tokens d_out"]:
        """Return the same from single rows of the tables: slow, but plain, and of shapes that no code changes.

        Every active transform takes up as many rows as the widest one; those beyond its own rank have value 0.
        """
        starts, ends = torch.tensor([self.offsets[:-1], self.offsets[1:]], device=x.device)[:, code.indices]
        rows = (starts[..., None] + torch.arange(self.config.rank, device=x.device)).flatten(1)
        used = rows < ends.repeat_interleave(self.config.rank, dim=1)
        rows = torch.where(used, rows, 0)
        hidden = dots(x.to(self.W_down.dtype), rows, self.W_down.t()) * used
        return mix(hidden * code.values.repeat_interleave(self.config.rank, dim=1), rows, self.W_dec)


class _Uses(NamedTuple):
    """Some of the uses of one transform."""

    block: slice
    """Where the transform stands in the tables."""
    slots: Tensor
    """The slots of the flattened code that name it."""
    tokens: Tensor
    """The tokens that these slots belong to."""


def _uses(indices: Tensor, offsets: tuple[int, ...], at_once: int) -> Iterator[_Uses]:
    """Yield all uses of all transforms, transform by transform, at most this many at one time.

    How many there are of each is read back from the device: a molt's step waits for it, other kinds' do not.
    """
    named, slots = torch.sort(indices.flatten(), stable=True)
    transforms = torch.arange(len(offsets) - 1, device=named.device)
    ends: list[int] = torch.searchsorted(named, transforms, right=True).tolist()
    for transform, (start, end) in enumerate(pairwise([0, *ends])):
        for some in slots[start:end].split(at_once) if end > start else ():
            yield _Uses(slice(offsets[transform], offsets[transform + 1]), some, some // indices.shape[1])


class _Transforms(torch.autograd.Function):
    """Sums of transforms, one matrix product for each transform and the tokens that name it.

    Sums over tokens go through `index_add_`. A valid code names a transform at most once a token, but with value 0,
    which adds nothing: so within one call no two additions meet, and the result does not depend on their order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        W_down: Tensor,
        W_dec: Tensor,
        offsets: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, values, indices, W_down, W_dec)
        ctx.offsets = offsets
        coefficients = values.flatten().to(x.dtype)
        sums = x.new_zeros(len(x), W_dec.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        for block, slots, tokens in _uses(indices, offsets, _at_once(W_down, W_dec)):
            hidden = (x[tokens] @ W_down[:, block]) * coefficients[slots, None]
            sums.index_add_(0, tokens, (hidden @ W_dec[block]).to(sums.dtype))
        return sums

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor, None, Tensor, Tensor, None]:
        x, values, indices, W_down, W_dec = ctx.saved_tensors
        wants_x = ctx.needs_input_grad[0]
        gradient, coefficients = gradients[0].to(x.dtype), values.flatten().to(x.dtype)
        of_x = torch.zeros_like(x, dtype=gradients[0].dtype)
        of_values, of_down, of_dec = (torch.zeros_like(part) for part in (coefficients, W_down, W_dec))
        for block, slots, tokens in _uses(indices, ctx.offsets, _at_once(W_down, W_dec)):
            inputs, outputs, weights = x[tokens], gradient[tokens], coefficients[slots, None]
            hidden, back = inputs @ W_down[:, block], outputs @ W_dec[block].t()
            of_values[slots] = (hidden * back).sum(1)
            of_dec[block] += (weights * hidden).t() @ outputs
            of_down[:, block] += inputs.t() @ (weights * back)
            if wants_x:
                of_x.index_add_(0, tokens, ((weights * back) @ W_down[:, block].t()).to(of_x.dtype))
        return (
            of_x.to(x.dtype) if wants_x else None,
            of_values.view_as(values).to(values.dtype),
            None,
            of_down,
            of_dec,
            None,
        )


def _at_once(W_down: Tensor, W_dec: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // (W_down.shape[0] + W_dec.shape[1]))
