import pytest
import torch
from torch import Tensor

from mxd.evaluation.collect import LatentStatistics
from mxd.evaluation.ranks import Ranks, expert_ranks, ranks, sample_latents
from mxd.layers import (
    LinearTransformMixture,
    LinearTransformMixtureConfig,
    LowRankMixture,
    LowRankMixtureConfig,
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseCode,
    TopKAutoencoder,
    TopKAutoencoderConfig,
    Transcoder,
    TranscoderConfig,
)
from tests.tensors import normal


@pytest.mark.parametrize("shape", [(9, 9), (12, 5), (5, 12), (1, 6)])
def test_ranks_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    values = torch.linalg.svdvals(matrix)
    found = ranks(matrix)
    assert found.stable == pytest.approx(float((values / values[0]).square().sum()))
    assert found.numerical == min(shape)
    assert ranks(matrix.float()).stable == pytest.approx(found.stable, rel=1e-5)
    # Neither depends on the scale.
    assert ranks(1e-6 * matrix) == pytest.approx(found)


def test_ranks_of_known_matrices() -> None:
    assert ranks(torch.zeros(4, 3)) == (0, 0)
    assert ranks(torch.eye(6)) == pytest.approx((6, 6))
    assert ranks(torch.diag(torch.tensor([3.0, 2.0, 1.0]))) == pytest.approx((14 / 9, 3))
    assert ranks(torch.outer(normal(8), normal(5))) == pytest.approx((1, 1))
    assert ranks(normal(20, 3) @ normal(3, 15)).numerical == 3


def test_what_float32_cannot_tell_from_zero_is_no_rank() -> None:
    for small, expected in ((1e-4, 3), (1e-8, 2)):
        rotation = torch.linalg.qr(normal(40, 3)).Q
        matrix = rotation * torch.tensor([1.0, 0.5, small], dtype=torch.float64)
        assert ranks(matrix).numerical == expected


def mixture(rank: int) -> MixtureOfDecoders:
    config = MixtureOfDecodersConfig(d_in=6, d_hidden=14, d_out=8, num_experts=10, k=2)
    layer = MixtureOfDecoders(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.W_dec.copy_(normal(14, rank) @ normal(rank, 8, seed=1))
    return layer


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_experts_of_a_mixture_inherit_the_rank_of_its_decoder(rank: int) -> None:
    layer = mixture(rank)
    found = expert_ranks(layer, [0, 4, 9])
    assert found is not None
    for n, each in zip([0, 4, 9], found, strict=True):
        values = torch.linalg.svdvals(layer.expert_weight(n).detach().double())
        assert each.stable == pytest.approx(float((values / values[0]).square().sum()))
        assert each.numerical == rank


def test_experts_of_low_rank_have_theirs() -> None:
    low = LowRankMixture(LowRankMixtureConfig(d_in=9, d_hidden=14, d_out=12, num_experts=10, rank=4, k=2))
    molt = LinearTransformMixture(LinearTransformMixtureConfig(d_in=9, d_out=12, num_latents=31, rank=8, k=2))
    with torch.no_grad():
        for layer in (low, molt):
            layer.W_dec.copy_(normal(*layer.W_dec.shape))
    assert [each.numerical for each in expert_ranks(low, [0, 9]) or []] == [4, 4]
    assert [each.numerical for each in expert_ranks(molt, [0, 1, 30]) or []] == [8, 4, 1]


def test_a_mixture_that_has_not_learnt_has_no_rank() -> None:
    layer = MixtureOfDecoders(mixture(1).config)
    assert expert_ranks(layer, [0]) == [Ranks(0, 0)]


def test_latents_that_add_one_vector_are_of_rank_one() -> None:
    transcoder = Transcoder(TranscoderConfig(d_in=6, d_out=5, num_latents=8, k=2))
    autoencoder = TopKAutoencoder(TopKAutoencoderConfig(d_in=5, num_latents=8, k=2))
    with torch.no_grad():
        transcoder.W_dec[3] = 0
    assert expert_ranks(transcoder, [0, 3]) == [Ranks(1, 1), Ranks(0, 0)]
    assert expert_ranks(autoencoder, [7]) == [Ranks(1, 1)]
    # A skip transcoder's decoder begins at zero.
    skip = SkipTranscoder(SkipTranscoderConfig(d_in=6, d_out=5, num_latents=8, k=2))
    assert expert_ranks(skip, [1]) == [Ranks(0, 0)]
    reads, writes = transcoder.W_enc[:, 0], transcoder.W_dec[0]
    assert expert_ranks(transcoder, [0]) == [pytest.approx(ranks(torch.outer(reads, writes)))]


def test_a_kind_whose_latents_depend_on_the_input_otherwise_has_none() -> None:
    class Bilinear(Transcoder):
        fixed_atoms = False

        def atoms(self, x: Tensor, indices: Tensor) -> Tensor:
            return super().atoms(x, indices) * x.sum(-1)[..., None, None]

    assert expert_ranks(Bilinear(TranscoderConfig(d_in=6, d_out=5, num_latents=8, k=2)), [0]) is None


def test_the_sample_is_of_latents_that_fire() -> None:
    statistics = LatentStatistics(20)
    assert sample_latents(statistics, 5) == []
    fired = torch.tensor([[1, 3], [3, 5], [7, 11], [13, 0]])
    values = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    statistics.update(SparseCode(values, fired), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert sample_latents(statistics, 99) == [1, 3, 5, 7, 11, 13]
    samples = [sample_latents(statistics, 3, seed) for seed in range(20)]
    assert all(len(set(sample)) == 3 and set(sample) <= {1, 3, 5, 7, 11, 13} for sample in samples)
    assert len({tuple(sample) for sample in samples}) > 5
    assert samples == [sample_latents(statistics, 3, seed) for seed in range(20)]
