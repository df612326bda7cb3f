import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mxd.evaluation.collect import LatentStatistics
from mxd.evaluation.expert_use import expert_use, gini, permuted_fvu, use_histogram, variance_share
from mxd.layers import (
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseLayer,
    Transcoder,
    TranscoderConfig,
)

D_IN, D_OUT, LATENTS, TOKENS = 6, 5, 12, 200
counts_of_latents = st.lists(st.integers(0, 1000), min_size=1, max_size=12)


def randomised(layer: SparseLayer) -> SparseLayer:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.double().requires_grad_(False)


LAYERS = {
    "mxd": randomised(
        MixtureOfDecoders(MixtureOfDecodersConfig(d_in=D_IN, d_hidden=9, d_out=D_OUT, num_experts=LATENTS, k=3))
    ),
    "transcoder": randomised(Transcoder(TranscoderConfig(d_in=D_IN, d_out=D_OUT, num_latents=LATENTS, k=3))),
    "skip": randomised(SkipTranscoder(SkipTranscoderConfig(d_in=D_IN, d_out=D_OUT, num_latents=LATENTS, k=3))),
}
kinds = pytest.mark.parametrize("layer", list(LAYERS.values()), ids=list(LAYERS))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(TOKENS, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def decoded(layer: SparseLayer, x: Tensor, dense: Tensor) -> Tensor:
    """Restate decoding: the base, and of every latent its value times its atom."""
    everyone = torch.arange(LATENTS).expand(len(x), -1)
    return layer.base(x) + (dense[..., None] * layer.atoms(x, everyone)).sum(1)


def variation(y: Tensor) -> float:
    return float((y - y.mean(0)).square().sum())


@given(st.integers(1, 50), st.integers(1, 1000))
def test_equal_use_has_a_gini_of_zero_and_one_latent_the_most_there_can_be(n: int, firings: int) -> None:
    assert gini(torch.full((n,), firings)) == pytest.approx(0, abs=1e-12)
    alone = torch.zeros(n, dtype=torch.int64)
    alone[n // 2] = firings
    assert gini(alone) == pytest.approx((n - 1) / n)


@given(counts_of_latents, st.integers(2, 9))
def test_gini_is_half_the_mean_difference_over_the_mean(counts: list[int], scale: int) -> None:
    assume(any(counts))
    n = len(counts)
    difference = sum(abs(one - other) for one, other in itertools.product(counts, counts)) / n**2
    expected = difference / 2 / (sum(counts) / n)
    assert gini(torch.tensor(counts)) == pytest.approx(expected, abs=1e-12)
    assert gini(torch.tensor(counts) * scale) == pytest.approx(expected, abs=1e-12)


def test_gini_of_silence_is_not_a_number() -> None:
    assert math.isnan(gini(torch.zeros(5, dtype=torch.int64)))


def counted(layer: SparseLayer, x: Tensor) -> LatentStatistics:
    statistics = LatentStatistics(LATENTS)
    statistics.update(layer.encode(x), torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)))
    return statistics


@kinds
def test_use_is_that_of_the_dense_code(layer: SparseLayer, x: Tensor) -> None:
    rates = (layer.encode(x).dense(LATENTS) > 0).double().mean(0)
    use = expert_use(counted(layer, x))
    assert use.top_share == pytest.approx(float(rates.max()))
    assert use.always_on.tolist() == [n for n in range(LATENTS) if rates[n] > 0.5]
    assert use.gini == pytest.approx(gini((rates * len(x)).round().long()))


def test_no_latent_is_used_where_none_was_counted() -> None:
    use = expert_use(LatentStatistics(4))
    assert math.isnan(use.gini)
    assert use.top_share == len(use.always_on) == 0
    histogram = use_histogram(LatentStatistics(4))
    assert (sum(histogram.counts), histogram.dead) == (0, 4)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1000, 3000))
def test_a_histogram_holds_every_latent_once_in_its_bin(firings: list[int], tokens: int) -> None:
    statistics = LatentStatistics(len(firings))
    statistics.firings, statistics.num_tokens = torch.tensor(firings), tokens
    histogram = use_histogram(statistics)
    assert histogram.dead == firings.count(0)
    assert histogram.edges[-1] == 1
    assert len(histogram.edges) == len(histogram.counts) + 1
    rates = [count / tokens for count in firings if count]
    for (low, high), found in zip(itertools.pairwise(histogram.edges), histogram.counts, strict=True):
        assert found == sum(low < rate <= high or rate == low == histogram.edges[0] for rate in rates)
    assert sum(histogram.counts) == len(rates)
    ratios = [high / low for low, high in itertools.pairwise(histogram.edges)]
    assert ratios == pytest.approx([10**0.25] * len(ratios))


@kinds
def test_the_share_of_some_latents_is_what_their_absence_leaves(layer: SparseLayer, x: Tensor) -> None:
    chosen = torch.tensor([1, 4, 5, 10])
    dense = layer.encode(x).dense(LATENTS)
    only = torch.zeros_like(dense)
    only[:, chosen] = dense[:, chosen]
    rest = decoded(layer, x, dense) - decoded(layer, x, only)
    expected = 1 - variation(rest) / variation(decoded(layer, x, dense) - layer.base(x))
    assert variance_share(layer, x, chosen) == pytest.approx(expected)


@kinds
def test_no_latents_carry_nothing_and_all_latents_everything(layer: SparseLayer, x: Tensor) -> None:
    assert variance_share(layer, x, torch.zeros(0, dtype=torch.int64)) == pytest.approx(0, abs=1e-12)
    assert variance_share(layer, x, torch.arange(LATENTS)) == pytest.approx(1)


def test_what_does_not_vary_has_no_share(x: Tensor) -> None:
    untrained = SkipTranscoder(SkipTranscoderConfig(d_in=D_IN, d_out=D_OUT, num_latents=LATENTS, k=3)).double()
    assert math.isnan(variance_share(untrained, x, torch.arange(3)))


@kinds
def test_the_control_decodes_with_permuted_latents(layer: SparseLayer, x: Tensor) -> None:
    target = torch.randn(TOKENS, D_OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    permutation = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(5))
    moved = torch.zeros(TOKENS, LATENTS, dtype=torch.float64)
    moved[:, permutation] = layer.encode(x).dense(LATENTS)
    expected = float((decoded(layer, x, moved) - target).square().sum()) / variation(target)
    assert permuted_fvu(layer, x, target, seed=5) == pytest.approx(expected)
    assert permuted_fvu(layer, x, target, seed=5) != permuted_fvu(layer, x, target, seed=6)


@kinds
@pytest.mark.parametrize("seed", range(3))
def test_permuting_the_latents_of_a_faithful_layer_ruins_it(layer: SparseLayer, x: Tensor, seed: int) -> None:
    assert permuted_fvu(layer, x, layer(x).prediction, seed) > 0.2


def test_permuting_experts_that_are_all_the_same_changes_nothing(x: Tensor) -> None:
    config = MixtureOfDecodersConfig(d_in=D_IN, d_hidden=9, d_out=D_OUT, num_experts=LATENTS, k=3)
    layer = randomised(MixtureOfDecoders(config))
    layer.get_parameter("W_expert").fill_(1.0)
    assert permuted_fvu(layer, x, layer(x).prediction) == pytest.approx(0, abs=1e-12)
