"""What a reviewer asks of a sparse layer beyond its faithfulness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mxd.data.tokens import content_positions
from mxd.evaluation.collect import LatentStatistics
from mxd.evaluation.expert_use import EnergyUse, ExpertUse, energy_use, expert_use, permuted_fvu, variance_share
from mxd.evaluation.faithfulness import Candidate, EvaluationText
from mxd.evaluation.jacobians import TokenMap, jacobian_cosines
from mxd.evaluation.ranks import Ranks, expert_ranks, sample_latents
from mxd.evaluation.sampling import evenly_spaced
from mxd.layers import SparseLayer
from mxd.layers.sparse_layer import SparseLayerOutput
from mxd.models import MlpSite, device_of, find_mlp, mlp_pairs

SAMPLE_TOKENS = 4096
"""Tokens on which layers are decoded anew, a thirty-second of what is evaluated by default. Both shares of variance are
sums over all of them, and the error that permuting makes is far larger than what a sample adds to it."""

JACOBIAN_TOKENS = 512
"""Tokens at which Jacobians are compared: cosines lie in [-1, 1], so their mean has a standard error of 0.04 at the
very most, and of 0.01 where they spread by 0.2."""

JACOBIAN_PROBES = 16
"""Random vectors for each of these tokens. The error of one cosine falls as 1/√probes and averages out over tokens; a
backward pass each makes this the greater part of the cost."""

EXPERTS_RANKED = 16
"""Experts whose ranks are computed, at the cost of an eigendecomposition each. They share a decoder: few tell."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scrutiny:
    """What was found out about one candidate."""

    jacobian_cosine: float
    """Mean cosine similarity of its Jacobian and the MLP's."""
    ranks: Ranks | None
    """Mean ranks of some experts that fire; None for kinds whose latents are no linear maps, or where none fires."""
    use: ExpertUse
    """How evenly its latents are used."""
    energy: EnergyUse
    """How the energy of what its latents add to the prediction is spread over them."""
    always_on_share: float
    """Share of the prediction's variance that the latents carry that fire on more than half of the tokens."""
    permuted_fvu: float
    """Fraction of variance unexplained with permuted latents."""


class LayerSample(NamedTuple):
    """What one MLP was given and returned at content positions of some held-out contexts."""

    x: Float[Tensor, "tokens d_in"]
    """Its inputs, in float32."""
    target: Float[Tensor, "tokens d_out"]
    """Its outputs, in float32."""
    dtype: torch.dtype
    """The type in which the model gave it its inputs."""


@torch.no_grad()
def sample_layer(model: nn.Module, layer: int, text: EvaluationText, num_tokens: int) -> LayerSample:
    """Return what the MLP of one block reads and writes in about this many tokens of the text.

    The contexts are evenly spaced, each is whole, and the model runs on them once, as far as this block.
    """
    chosen = evenly_spaced(len(text.contexts), max(1, num_tokens // text.contexts.shape[1]))
    contexts = text.contexts[chosen].to(device_of(model))
    pair = mlp_pairs(model, contexts, [layer], module_path=text.module_path)[layer]
    content = content_positions(contexts, text.special_ids)
    return LayerSample(pair.x[content].float(), pair.target[content].float(), pair.x.dtype)


def scrutinise(
    model: nn.Module,
    candidates: Sequence[Candidate],
    statistics: Mapping[str, LatentStatistics],
    text: EvaluationText,
) -> dict[str, Scrutiny]:
    """Return what a reviewer asks about each candidate, by its name.

    Memory is bounded by the sample of one layer; the model runs once on it for each layer.

    Args:
        model: The language model.
        candidates: The sparse layers.
        statistics: What their latents fired on in the text, by name.
        text: Where samples are drawn from.
    """
    found: dict[str, Scrutiny] = {}
    for layer in sorted({candidate.layer for candidate in candidates}):
        site = find_mlp(model, layer, text.module_path)
        sample = sample_layer(model, layer, text, SAMPLE_TOKENS)
        for candidate in candidates:
            if candidate.layer == layer:
                found[candidate.name] = _scrutinise(candidate.network, statistics[candidate.name], site, sample)
    return found


def _scrutinise(network: SparseLayer, statistics: LatentStatistics, site: MlpSite, sample: LayerSample) -> Scrutiny:
    x = network.given(sample.x, sample.target)
    use = expert_use(statistics)
    ranks = expert_ranks(network, sample_latents(statistics, EXPERTS_RANKED))
    return Scrutiny(
        jacobian_cosine=_jacobian_cosine(network, site, sample),
        ranks=Ranks(*(fmean(column) for column in zip(*ranks, strict=True))) if ranks else None,
        use=use,
        energy=energy_use(network, x),
        always_on_share=variance_share(network, x, use.always_on),
        permuted_fvu=permuted_fvu(network, x, sample.target),
    )


def _jacobian_cosine(network: SparseLayer, site: MlpSite, sample: LayerSample) -> float:
    x = sample.x[evenly_spaced(len(sample.x), JACOBIAN_TOKENS).to(sample.x.device)]

    def mlp(x: Tensor) -> Tensor:
        # Some MLPs take (batch, seq, d_in) only.
        return site(x.to(sample.dtype)[None])[0].float()

    layer = _without_gradients_of_weights(network)
    replaced: TokenMap = (lambda x: layer(mlp(x))) if network.reads == "output" else layer
    generator = torch.Generator().manual_seed(0)
    return jacobian_cosines(replaced, mlp, x, probes=JACOBIAN_PROBES, generator=generator).mean().item()


def _without_gradients_of_weights(network: SparseLayer) -> TokenMap:
    weights = {name: weight.detach() for name, weight in network.named_parameters()}

    def predict(x: Tensor) -> Tensor:
        output = functional_call(network, weights, (x,))
        assert isinstance(output, SparseLayerOutput)
        return output.prediction

    return predict
