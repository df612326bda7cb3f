import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import mxd
from mxd.layers import (
    LowRankMixture,
    LowRankMixtureConfig,
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    MlpEncoder,
)
from mxd.layers.sizing import transcoder_budget
from tests.tiny_model import D_MODEL
from tests.tiny_run import TinyRun, command, training

CONFIG = LowRankMixtureConfig(d_in=7, d_hidden=11, d_out=9, num_experts=20, rank=4, k=3)
KINDS = ("low-rank", "molt")


def random_layer(config: LowRankMixtureConfig = CONFIG) -> LowRankMixture:
    """Return a layer in float64 whose weights are nowhere zero."""
    generator = torch.Generator().manual_seed(0)
    layer = LowRankMixture(config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return layer


def inputs(tokens: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, CONFIG.d_in, dtype=torch.float64, generator=generator)


def test_it_begins_as_a_mixture_of_decoders_does() -> None:
    layer = LowRankMixture(replace(CONFIG, d_hidden=100, rank=50, num_experts=200))
    torch.testing.assert_close(layer.W_expert.norm(dim=1), torch.ones(200))
    assert 0.09 < layer.W_down.abs().max() <= 0.1
    assert abs(layer.W_down.mean()) < 0.003
    assert not any(tensor.any() for tensor in (layer.W_dec, layer.b_dec, layer.b_gate))
    (found,) = layer.unit_length_tables()
    assert found is layer.W_expert
    free = LowRankMixture(replace(CONFIG, normalize_experts=False))
    assert free.unit_length_tables() == ()
    assert free.W_expert.abs().max() <= CONFIG.num_experts**-0.5


def test_a_fresh_layer_predicts_its_bias_and_moves_only_what_leads_out_of_the_rank() -> None:
    layer = LowRankMixture(CONFIG)
    prediction = layer(inputs().float()).prediction
    assert not prediction.any()
    (prediction - 1).square().sum().backward()
    moved = {
        name for name, parameter in layer.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {"W_dec", "b_dec"}


@pytest.mark.parametrize("encoder", ["mlp", "glu"])
def test_it_is_the_sum_of_its_experts_values_and_gradients(encoder: str) -> None:
    layer, x = random_layer(replace(CONFIG, encoder=encoder)), inputs().requires_grad_()
    prediction, code = layer(x)
    a, z = code.dense(CONFIG.num_experts), layer.encoder(x)
    experts = torch.stack([layer.expert_weight(n) for n in range(CONFIG.num_experts)])
    expected = torch.einsum("tn,th,nho->to", a, z, experts) + layer.b_dec
    torch.testing.assert_close(prediction, expected, rtol=1e-12, atol=1e-12)
    leaves = (x, *layer.parameters())
    gradients = torch.autograd.grad(prediction.square().sum(), leaves, retain_graph=True)
    restated = torch.autograd.grad(expected.square().sum(), leaves)
    for gradient, wanted in zip(gradients, restated, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-11)


def test_the_experts_are_a_cp_decomposition() -> None:
    layer = random_layer()
    experts = torch.stack([layer.expert_weight(n) for n in range(CONFIG.num_experts)])
    cp = torch.einsum("nr,hr,ro->nho", layer.W_expert, layer.W_down, layer.W_dec)
    torch.testing.assert_close(experts, cp, rtol=1e-12, atol=1e-12)
    for n in (-1, CONFIG.num_experts):
        with pytest.raises(ValueError, match=rf"expert must lie in \[0, 19\]; got {n}\."):
            layer.expert_weight(n)


@pytest.mark.parametrize(("rank", "zeros"), [(1, 0), (4, 0), (4, 3), (9, 0), (30, 0)])
def test_no_expert_has_a_higher_rank_than_its_factors(rank: int, zeros: int) -> None:
    layer = random_layer(replace(CONFIG, rank=rank))
    with torch.no_grad():
        layer.W_expert[:, :zeros] = 0
    for n in range(CONFIG.num_experts):
        found = int(torch.linalg.matrix_rank(layer.expert_weight(n)))
        assert found == min(rank - zeros, CONFIG.d_hidden, CONFIG.d_out) <= rank


def test_with_full_rank_and_nothing_mixed_after_it_is_a_mixture_of_decoders() -> None:
    layer, x = random_layer(replace(CONFIG, rank=CONFIG.d_out)), inputs()
    mixture = MixtureOfDecoders(MixtureOfDecodersConfig(d_in=7, d_hidden=11, d_out=9, num_experts=20, k=3)).double()
    with torch.no_grad():
        layer.W_dec.copy_(torch.eye(CONFIG.d_out))
    weights = dict(layer.state_dict())
    weights["W_dec"] = weights.pop("W_down")
    mixture.load_state_dict(weights)
    torch.testing.assert_close(layer(x).prediction, mixture(x).prediction, rtol=1e-12, atol=1e-12)


def test_its_factors_have_the_parameters_of_cp_experts() -> None:
    dense = CONFIG.d_hidden * (CONFIG.d_in + 1)
    gate = CONFIG.num_experts * (CONFIG.d_in + 1)
    factors = CONFIG.rank * (CONFIG.num_experts + CONFIG.d_hidden + CONFIG.d_out)
    assert CONFIG.num_parameters == dense + gate + factors + CONFIG.d_out


def test_its_hidden_units_are_the_encoders() -> None:
    layer, x = random_layer(), inputs()
    assert isinstance(layer.encoder, MlpEncoder)
    expected = functional.gelu(x @ layer.encoder.W_enc + layer.encoder.b_enc)
    torch.testing.assert_close(layer.encoder(x), expected, rtol=1e-12, atol=1e-12)
    assert layer.dense_branch(x) is None


def test_mixtures_of_low_rank_are_trained_saved_and_evaluated(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tiny = command(capsys), TinyRun(llama, text, tmp_path / "run")
    words = training(
        tiny,
        tiny.run,
        kind=KINDS,
        k=3,
        rank=2,
        expansion=16,
        num_latents=None,
        tokens=8192,
        lr=0.01,
        eval_tokens=512,
        batch_tokens=64,
    )
    ended = run(*words)
    assert ended.status == 0, ended.err
    layers = {kind: mxd.load(tiny.run / "layers" / "0" / f"{kind}-k3") for kind in KINDS}
    ended = run("evaluate", tiny.run, "--json", "--student", *(f"{kind}-k3" for kind in KINDS))
    assert ended.status == 0, ended.err
    rows = json.loads(ended.out)
    assert [row["kind"] for row in rows] == list(KINDS)
    for row in rows:
        layer = layers[row["kind"]]
        assert layer.get_parameter("W_dec").abs().sum() > 0
        assert layer.config.num_parameters == row["parameters"]
        assert layer.config.flops_per_token == row["flops_per_token"]
        assert row["parameters"] == pytest.approx(transcoder_budget(D_MODEL, D_MODEL, 16), rel=0.01)
        assert row["num_latents"] == layer.config.num_latents
        assert 0 < row["fvu"] < 1
        assert 0 < row["l0"] <= 3
        assert row["specialisation"] is None
    assert [getattr(layer.config, "rank", None) for layer in layers.values()] == [2, 2]
