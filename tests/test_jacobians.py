import pytest
import torch
from torch import Tensor, nn

from mxd.evaluation.jacobians import TokenMap, jacobian_cosines
from mxd.layers import (
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    SparseLayer,
    Transcoder,
    TranscoderConfig,
)

D_IN, D_OUT, TOKENS = 7, 5, 12


def randomised(layer: SparseLayer) -> SparseLayer:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.double()


def mxd() -> SparseLayer:
    config = MixtureOfDecodersConfig(d_in=D_IN, d_hidden=9, d_out=D_OUT, num_experts=16, k=3)
    return randomised(MixtureOfDecoders(config))


def transcoder() -> SparseLayer:
    return randomised(Transcoder(TranscoderConfig(d_in=D_IN, d_out=D_OUT, num_latents=16, k=3)))


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D_IN, 20), nn.GELU(), nn.Linear(20, D_OUT)).double()


def predicting(layer: SparseLayer) -> TokenMap:
    return lambda x: layer(x).prediction


@pytest.fixture
def x() -> Tensor:
    return torch.randn(TOKENS, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def exact_cosines(one: TokenMap, other: TokenMap, x: Tensor) -> Tensor:
    """Restate the cosine with whole Jacobians, of which each token has its own."""

    def jacobians(function: TokenMap) -> Tensor:
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            outputs = function(given)
            sums = outputs.sum(0)
        rows = [torch.autograd.grad(output, given, retain_graph=True)[0] for output in sums]
        return torch.stack(rows, 1).flatten(1)

    return torch.cosine_similarity(jacobians(one), jacobians(other), dim=1)


def test_a_selection_is_taken_as_fixed(x: Tensor) -> None:
    layer = transcoder()
    code = layer.encode(x)
    linear = torch.einsum("tk,ktd,kto->tod", (code.values > 0).double(), *_maps(layer, code.indices))

    def frozen(x: Tensor) -> Tensor:
        return (linear @ x[..., None])[..., 0]

    cosines = jacobian_cosines(predicting(layer), frozen, x)
    torch.testing.assert_close(cosines, torch.ones(TOKENS, dtype=torch.float64))


def _maps(layer: SparseLayer, indices: Tensor) -> tuple[Tensor, Tensor]:
    reads, writes = layer.get_parameter("W_enc").t()[indices], layer.get_parameter("W_dec")[indices]
    return reads.transpose(0, 1), writes.transpose(0, 1)


@pytest.mark.parametrize("layer", [mxd(), transcoder()], ids=["mxd", "transcoder"])
def test_the_estimate_converges_to_the_exact_value(layer: SparseLayer, x: Tensor) -> None:
    exact = exact_cosines(predicting(layer), mlp(), x)
    errors: list[float] = []
    for probes in (4, 64, 1024):
        generator = torch.Generator().manual_seed(3)
        estimate = jacobian_cosines(predicting(layer), mlp(), x, probes=probes, generator=generator)
        assert estimate.abs().max() <= 1
        errors.append(float((estimate - exact).square().mean().sqrt()))
    assert errors[2] < 0.03
    # The error falls by a factor of 4 each time, give or take.
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("scale", [1.0, 3.0, -1.0])
def test_a_layer_that_is_the_mlp_has_cosine_one_for_any_probe(x: Tensor, scale: float) -> None:
    original = mlp()
    cosines = jacobian_cosines(lambda x: scale * original(x) + 1, original, x, probes=1)
    torch.testing.assert_close(cosines, torch.full((TOKENS,), scale / abs(scale), dtype=torch.float64))


def test_a_layer_that_does_not_move_has_cosine_zero(x: Tensor) -> None:
    assert jacobian_cosines(lambda x: 0 * x[:, :D_OUT], mlp(), x).tolist() == [0.0] * TOKENS


def test_neither_weights_nor_the_random_state_change(x: Tensor) -> None:
    layer = mxd()
    before = torch.get_rng_state()
    seeded = [jacobian_cosines(predicting(layer), mlp_once, x, generator=torch.Generator()) for _ in range(2)]
    assert torch.equal(seeded[0], seeded[1])
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in layer.parameters())
    with torch.no_grad():
        assert torch.equal(seeded[0], jacobian_cosines(predicting(layer), mlp_once, x, generator=torch.Generator()))


def mlp_once(x: Tensor) -> Tensor:
    return torch.tanh(x[:, :D_OUT]) * x[:, 1 : D_OUT + 1]


def test_there_must_be_a_probe(x: Tensor) -> None:
    with pytest.raises(ValueError, match="probes must be at least 1; got 0"):
        jacobian_cosines(mlp(), mlp(), x, probes=0)
