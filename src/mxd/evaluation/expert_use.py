"""How a layer's load is spread over its latents, and what hangs on which of them fires."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mxd.evaluation.collect import LatentStatistics
from mxd.evaluation.rows import EvaluationRow
from mxd.layers import SparseCode, SparseLayer
from mxd.metrics import error_sums, widest_dtype

ALWAYS_ON_RATE = 0.5
"""A latent that fires on more than this share of the tokens is always on: it tells tokens apart no better than a
coin."""

COLLAPSED_SHARE = 0.5
"""A layer of whose energy one latent carries more than this is all but a single latent."""

ENERGY_ELEMENTS = 2**22
"""Elements of the atoms that are held at one time."""

BINS_PER_DECADE = 4
"""Bins of the histogram for each factor of ten in the firing rate."""


class ExpertUse(NamedTuple):
    """How evenly latents are used."""

    gini: float
    """Gini coefficient of the numbers of firings: 0 where all latents fire equally often, (n − 1) / n where one of n
    does all the work, NaN where none fires."""
    top_share: float
    """Share of the tokens on which the most used latent fires."""
    always_on: Int[Tensor, " found"]
    """The latents that fire on more than half of the tokens."""


class EnergyUse(NamedTuple):
    """How the energy of what latents add to the prediction is spread over them."""

    effective_latents: float
    """Effective number of latents: exp of the entropy of their shares (the perplexity, or Hill number of order 1). It
    is n where n latents share it equally, 1 where one has it all, and NaN where there is no energy."""
    top_share: float
    """Share of the latent that has most; NaN where there is no energy."""


class UseHistogram(NamedTuple):
    """How many latents fire how often."""

    edges: list[float]
    """Firing rates between the bins, ascending to 1, evenly spaced in their logarithm."""
    counts: list[int]
    """Latents in each bin, its upper edge included: one fewer than edges."""
    dead: int
    """Latents that never fired, which stand in no bin."""


def gini(counts: Int[Tensor, " n"]) -> float:
    r"""Return the Gini coefficient of counts, $\sum_{ij} |c_i - c_j| / (2 n \sum_i c_i)$, in [0, (n − 1) / n].

    Of the sorted counts it is $\sum_i (2 i - n - 1) c_{(i)} / (n \sum_i c_i)$ (Gini, 1912); NaN where all are 0.
    """
    ascending = counts.cpu().double().sort().values
    n, total = len(ascending), ascending.sum()
    if not total > 0:
        return math.nan
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return ((weights * ascending).sum() / (n * total)).item()


def expert_use(statistics: LatentStatistics) -> ExpertUse:
    """Return how evenly the latents were used on the tokens that were counted."""
    rates = statistics.firing_rates
    return ExpertUse(gini(statistics.firings), rates.max().item(), (rates > ALWAYS_ON_RATE).nonzero().squeeze(-1).cpu())


def use_histogram(statistics: LatentStatistics) -> UseHistogram:
    """Return the histogram of firing rates over a logarithmic axis, from one firing in all tokens to every token."""
    decades = max(1, math.ceil(math.log10(max(statistics.num_tokens, 10))))
    powers = torch.arange(-decades * BINS_PER_DECADE, 1, dtype=torch.float64) / BINS_PER_DECADE
    edges = 10.0**powers
    rates = statistics.firing_rates.cpu()
    used = rates[rates > 0]
    # A rate below the lowest edge is that edge, up to rounding.
    bins = (torch.bucketize(used, edges) - 1).clamp_min(0)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return UseHistogram(edges.tolist(), counts.tolist(), int((rates == 0).sum()))


@torch.no_grad()
def energy_use(layer: SparseLayer, x: Float[Tensor, "tokens d_in"]) -> EnergyUse:
    r"""Return how the energy of what latents add to the prediction is spread over them.

    $$E_n = \sum_t \| v_{tn} \, \mathrm{atom}(x_t, n) \|^2, \qquad p_n = E_n / \sum_m E_m$$

    It weighs a latent by how often it fires and by how much it then adds, so that a layer which has collapsed to one
    latent shows, whatever number of latents fires: users of MOLT report such a collapse to one transform.
    """
    code = layer.encode(x)
    energy = torch.zeros(layer.config.num_latents, dtype=torch.float64)
    at_once = max(1, ENERGY_ELEMENTS // (code.values.shape[1] * layer.config.d_out))
    for rows, values, indices in zip(*(part.split(at_once) for part in (x, *code)), strict=True):
        lengths = torch.linalg.vector_norm(layer.atoms(rows, indices).float(), dim=-1)
        energy.index_add_(0, indices.flatten().cpu(), (values * lengths).square().flatten().cpu().double())
    shares = energy / energy.sum()
    return EnergyUse(torch.special.entr(shares).sum().exp().item(), shares.max().item())


def collapse_warnings(rows: Sequence[EvaluationRow]) -> list[str]:
    """Return a sentence about each student of whose energy one latent carries more than half."""
    return [
        f"{row.layer}/{row.id} has nearly collapsed to one latent, which carries {100 * row.top_energy_share:.0f}% of "
        f"the energy of what its latents add to the prediction (effective number of latents: "
        f"{row.effective_latents:.1f})."
        for row in rows
        if row.top_energy_share is not None and row.top_energy_share > COLLAPSED_SHARE
    ]


@torch.no_grad()
def variance_share(layer: SparseLayer, x: Float[Tensor, "tokens d_in"], latents: Int[Tensor, " chosen"]) -> float:
    r"""Return the share of a prediction's variance that these latents carry.

    $$1 - \sum_t \|r_t - \bar r\|^2 \Big/ \sum_t \|s_t - \bar s\|^2, \qquad
      s_t = y_t - \mathrm{base}(x_t), \quad r_t = y_t - y^\mathrm{only}_t$$

    with y^only decoded from the code without all other latents. It is 0 for no latents and 1 for all; where latents
    cancel it may be negative. What a layer predicts without any latent (a skip connection) is no latent's work and
    counts for neither.

    Returns:
        The share; NaN where the latents' part of the prediction does not vary.
    """
    code = layer.encode(x)
    prediction = layer.decode(x, code)
    kept = torch.isin(code.indices, latents.to(code.indices.device))
    only = layer.decode(x, SparseCode(torch.where(kept, code.values, 0), code.indices))
    everything = _variation(prediction - layer.base(x))
    return 1 - _variation(prediction - only) / everything if everything else math.nan


@torch.no_grad()
def permuted_fvu(
    layer: SparseLayer, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"], seed: int = 0
) -> float:
    """Return the fraction of variance unexplained if each latent does another latent's work.

    A control: the code is decoded with its indices sent through a random permutation of all latents, the same for
    every token, and its values left as they are. Where this is no worse than the layer's own fvu, it does not matter
    which latent fires, and the code explains nothing.

    Args:
        layer: The sparse layer.
        x: Its input.
        target: What it should return.
        seed: Draws the permutation.
    """
    code = layer.encode(x)
    permutation = torch.randperm(layer.config.num_latents, generator=torch.Generator().manual_seed(seed))
    permuted = SparseCode(code.values, permutation.to(code.indices.device)[code.indices])
    return error_sums(layer.decode(x, permuted), target).fvu


def _variation(y: Tensor) -> float:
    """Return Σ‖y_t − ȳ‖², in float64 where the device has it."""
    y = y.to(widest_dtype(y.device))
    return (y - y.mean(0)).square().sum().item()
