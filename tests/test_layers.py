import copy
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, fields, replace
from typing import cast, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mxd.layers import (
    LAYERS,
    Activation,
    GluEncoder,
    LinearTransformMixture,
    LinearTransformMixtureConfig,
    LowRankMixture,
    LowRankMixtureConfig,
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    MlpEncoder,
    SharedTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseLayer,
    TopKAutoencoder,
    TopKAutoencoderConfig,
    Transcoder,
    TranscoderConfig,
    require_kind,
)
from mxd.layers.activations import activation_function
from mxd.layers.dense_encoder import dense_encoder
from mxd.layers.initialization import normalize_rows_

MIXTURE = MixtureOfDecodersConfig(d_in=16, d_hidden=24, d_out=10, num_experts=200, k=4)
GLU = replace(MIXTURE, encoder="glu", activation="silu")
TRANSCODER = TranscoderConfig(d_in=16, d_out=10, num_latents=200, k=4)
SKIP = SkipTranscoderConfig(d_in=16, d_out=10, num_latents=200, k=4)
AUTOENCODER = TopKAutoencoderConfig(d_in=16, num_latents=200, k=4)
SHARED = SharedTranscoderConfig(d_in=16, d_hidden=24, d_out=10, num_latents=200, k=4)
LOW_RANK = LowRankMixtureConfig(d_in=16, d_hidden=24, d_out=10, num_experts=200, rank=6, k=4)
MOLT = LinearTransformMixtureConfig(d_in=16, d_out=10, num_latents=200, rank=6, k=4)
EXAMPLES = {
    "mxd": MIXTURE,
    "transcoder": TRANSCODER,
    "skip-transcoder": SKIP,
    "shared-transcoder": SHARED,
    "topk-sae": AUTOENCODER,
    "low-rank": LOW_RANK,
    "molt": MOLT,
}


def build(kind: str, seed: int = 0) -> SparseLayer:
    construct = cast(Callable[..., SparseLayer], require_kind(kind).layer)
    return construct(EXAMPLES[kind], generator=torch.Generator().manual_seed(seed))


def assert_uniform(weight: Tensor, bound: float) -> None:
    """Assert that many draws lie within the bound, come near it on both sides, and have a uniform's spread."""
    assert -bound <= weight.min() < -0.9 * bound
    assert 0.9 * bound < weight.max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def assert_unit_rows(table: Tensor) -> None:
    torch.testing.assert_close(table.norm(dim=1), torch.ones(len(table)))


def test_mixture_begins_as_the_paper_says() -> None:
    layer = MixtureOfDecoders(MIXTURE)
    assert isinstance(layer.encoder, MlpEncoder)
    assert_uniform(layer.encoder.W_enc, 16**-0.5)
    assert_uniform(layer.W_gate, 16**-0.5)
    assert_unit_rows(layer.W_expert)
    assert abs(layer.W_expert.mean()) < 0.02
    assert not any(tensor.any() for tensor in (layer.encoder.b_enc, layer.b_gate, layer.W_dec, layer.b_dec))


def test_mixture_without_normalisation_begins_as_a_linear_map_of_the_code() -> None:
    layer = MixtureOfDecoders(replace(MIXTURE, normalize_experts=False))
    assert_uniform(layer.W_expert, 200**-0.5)
    assert layer.unit_length_tables() == ()


def test_glu_encoder_begins_as_two_linear_maps_of_which_the_linear_one_has_a_drawn_bias() -> None:
    encoder = MixtureOfDecoders(replace(GLU, d_hidden=400)).encoder
    assert isinstance(encoder, GluEncoder)
    for weight in (encoder.W_enc, encoder.W_enc_gate, encoder.b_enc):
        assert_uniform(weight, 16**-0.5)
    assert not encoder.b_enc_gate.any()


def test_a_fresh_mixture_predicts_its_output_bias_and_moves_only_the_decoder() -> None:
    layer = MixtureOfDecoders(GLU)
    prediction = layer(torch.randn(7, 16)).prediction
    assert not prediction.any()
    (prediction - 1).square().sum().backward()
    moved = {
        name for name, parameter in layer.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {"W_dec", "b_dec"}


def test_a_shared_expert_is_one_more_decoder_that_every_token_gets_and_no_latent() -> None:
    torch.manual_seed(0)
    config = replace(MIXTURE, shared_expert=True)
    layer = MixtureOfDecoders(config).double()
    assert sum(parameter.numel() for parameter in layer.parameters()) == config.num_parameters
    assert config.num_parameters == MIXTURE.num_parameters + MIXTURE.d_out
    assert layer.w_shared is not None
    torch.testing.assert_close(layer.w_shared.norm(), torch.tensor(1.0).double())
    with torch.no_grad():
        for parameter in (layer.W_dec, layer.b_dec, layer.w_shared):
            parameter.normal_()
    x = torch.randn(7, 16, dtype=torch.float64)
    prediction, code = layer(x)
    z = layer.encoder(x)
    naive = layer.b_dec + z @ (layer.W_dec * layer.w_shared)
    for slot in range(config.k):
        experts = [layer.expert_weight(int(n)) for n in code.indices[:, slot]]
        naive = naive + torch.stack([v * (row @ W) for v, row, W in zip(code.values[:, slot], z, experts, strict=True)])
    torch.testing.assert_close(prediction, naive, rtol=1e-12, atol=1e-12)
    assert "w_shared" not in MixtureOfDecoders(MIXTURE).state_dict()


def test_transcoder_begins_with_unit_rows_or_a_linear_map() -> None:
    layer = Transcoder(TRANSCODER)
    assert_uniform(layer.W_enc, 16**-0.5)
    assert_unit_rows(layer.W_dec)
    assert not layer.b_enc.any()
    assert not layer.b_dec.any()
    assert_uniform(Transcoder(replace(TRANSCODER, normalize_decoder=False)).W_dec, 200**-0.5)


def test_skip_transcoder_begins_at_zero_and_is_never_normalised() -> None:
    layer = SkipTranscoder(SKIP)
    assert layer.unit_length_tables() == ()
    assert not any(tensor.any() for tensor in (layer.W_dec, layer.W_skip, layer.b_dec, layer.b_enc))
    prediction = layer(torch.randn(7, 16)).prediction
    assert torch.equal(prediction, torch.zeros(7, 10))
    (prediction - 1).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_autoencoder_begins_as_its_decoders_transpose() -> None:
    layer = TopKAutoencoder(AUTOENCODER)
    assert torch.equal(layer.W_enc, layer.W_dec.t())
    assert layer.W_enc.data_ptr() != layer.W_dec.data_ptr()
    assert_unit_rows(layer.W_dec)
    assert layer.reads == "output"
    assert layer.config.d_out == 16


def test_normalising_a_row_of_zeros_leaves_it() -> None:
    table = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    normalize_rows_(table)
    assert torch.equal(table, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


def test_unit_length_tables_follow_the_configuration() -> None:
    mixture, transcoder, autoencoder = MixtureOfDecoders(MIXTURE), Transcoder(TRANSCODER), TopKAutoencoder(AUTOENCODER)
    for layer, table in ((mixture, mixture.W_expert), (transcoder, transcoder.W_dec), (autoencoder, autoencoder.W_dec)):
        (found,) = layer.unit_length_tables()
        assert found is table
    assert TopKAutoencoder(replace(AUTOENCODER, normalize_decoder=False)).unit_length_tables() == ()


def topk(scores: Tensor) -> Tensor:
    return torch.where(scores >= scores.topk(4).values[:, -1:], scores.relu(), 0)


def equation(kind: str, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """Return the prediction as the layer's docstring defines it, dense and from its parameters alone."""
    match kind:
        case "mxd":
            z = functional.gelu(x @ p["encoder.W_enc"] + p["encoder.b_enc"])
            return (topk(x @ p["W_gate"] + p["b_gate"]) @ p["W_expert"]) * (z @ p["W_dec"]) + p["b_dec"]
        case "transcoder":
            return topk(x @ p["W_enc"] + p["b_enc"]) @ p["W_dec"] + p["b_dec"]
        case "skip-transcoder":
            return topk(x @ p["W_enc"] + p["b_enc"]) @ p["W_dec"] + x @ p["W_skip"] + p["b_dec"]
        case "shared-transcoder":
            z = functional.gelu(x @ p["encoder.W_enc"] + p["encoder.b_enc"])
            return topk(x @ p["W_enc"] + p["b_enc"]) @ p["W_dec"] + z @ p["W_shared"] + p["b_dec"]
        case "low-rank":
            z = functional.gelu(x @ p["encoder.W_enc"] + p["encoder.b_enc"])
            mixed = (topk(x @ p["W_gate"] + p["b_gate"]) @ p["W_expert"]) * (z @ p["W_down"])
            return mixed @ p["W_dec"] + p["b_dec"]
        case "molt":
            wide = topk(x @ p["W_gate"] + p["b_gate"]).repeat_interleave(torch.tensor(MOLT.ranks), dim=1)
            return (wide * (x @ p["W_down"])) @ p["W_dec"] + p["b_dec"]
        case _:
            return topk((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) @ p["W_dec"] + p["b_dec"]


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_layer_is_its_equation_values_and_gradients(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer, x = build(kind).double(), torch.randn(9, 16, dtype=torch.float64, generator=generator).requires_grad_()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3, generator=generator)
    parameters = dict(layer.named_parameters())
    prediction, expected = layer(x).prediction, equation(kind, x, parameters)
    torch.testing.assert_close(prediction, expected, rtol=1e-12, atol=1e-12)
    leaves = (x, *parameters.values())
    gradients = torch.autograd.grad(prediction.square().sum(), leaves)
    restated = torch.autograd.grad(expected.square().sum(), leaves)
    for name, gradient, wanted in zip(("x", *parameters), gradients, restated, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-11, atol=1e-11), name


def test_the_gate_is_relu_then_topk_without_renormalisation() -> None:
    layer, x = MixtureOfDecoders(MIXTURE), torch.randn(50, 16)
    scores = (x @ layer.W_gate + layer.b_gate).relu()
    threshold = scores.topk(4).values[:, -1:]
    torch.testing.assert_close(layer.encode(x).dense(200), torch.where(scores >= threshold, scores, 0))


def test_fewer_positive_scores_than_k_leave_slots_unused() -> None:
    layer = MixtureOfDecoders(MIXTURE)
    with torch.no_grad():
        layer.b_gate.fill_(-1e3)
        layer.b_gate[17] = 1e3
    code = layer.encode(torch.randn(5, 16))
    assert torch.equal((code.values > 0).sum(-1), torch.ones(5, dtype=torch.long))
    assert torch.equal(code.indices[code.values > 0], torch.full((5,), 17))


def test_a_gated_linear_unit_is_a_mixture_of_rank_one_experts() -> None:
    encoder, x = MixtureOfDecoders(replace(GLU, d_hidden=5)).double().encoder, torch.randn(7, 16).double()
    assert isinstance(encoder, GluEncoder)
    a = functional.silu(x @ encoder.W_enc_gate + encoder.b_enc_gate)
    experts = [encoder.W_enc @ torch.diag(torch.eye(5).double()[h]) for h in range(5)]
    offsets = [encoder.b_enc * torch.eye(5).double()[h] for h in range(5)]
    mixed = sum(a[:, h, None] * (x @ experts[h] + offsets[h]) for h in range(5))
    torch.testing.assert_close(encoder(x), mixed, rtol=1e-12, atol=1e-12)
    assert all(torch.linalg.matrix_rank(expert) == 1 for expert in experts)


FORMULAS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations(activation: Activation) -> None:
    layer, x = MixtureOfDecoders(replace(MIXTURE, activation=activation)).double(), torch.randn(9, 16).double()
    assert isinstance(layer.encoder, MlpEncoder)
    expected = FORMULAS[activation](x @ layer.encoder.W_enc)
    torch.testing.assert_close(layer.encoder(x), expected, rtol=1e-12, atol=1e-12)
    gated = MixtureOfDecoders(replace(GLU, activation=activation)).double().encoder
    assert isinstance(gated, GluEncoder)
    expected = FORMULAS[activation](x @ gated.W_enc_gate) * (x @ gated.W_enc + gated.b_enc)
    torch.testing.assert_close(gated(x), expected, rtol=1e-12, atol=1e-12)


def test_expert_weight_is_the_decoder_with_scaled_columns() -> None:
    layer = MixtureOfDecoders(MIXTURE)
    with torch.no_grad():
        layer.W_dec.normal_()
    torch.testing.assert_close(layer.expert_weight(7), layer.W_dec @ torch.diag(layer.W_expert[7]))
    for n in (-1, 200):
        with pytest.raises(ValueError, match=rf"expert must lie in \[0, 199\]; got {n}\."):
            layer.expert_weight(n)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_widths_need_not_be_equal(kind: str) -> None:
    layer, x = build(kind), torch.randn(3, 16)
    code = layer.encode(x)
    d_out = 16 if kind == "topk-sae" else 10
    assert layer.config.d_out == d_out
    assert layer(x).prediction.shape == layer.base(x).shape == (3, d_out)
    assert layer.atoms(x, code.indices).shape == (3, 4, d_out)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_knows_its_kind(kind: str) -> None:
    layer = build(kind)
    assert layer.kind == kind
    assert isinstance(layer.config, LAYERS[kind].config)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=f"kind must be one of {', '.join(LAYERS)}; got 'moe'"):
        require_kind("moe")


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        (kind, width.name)
        for kind, config in EXAMPLES.items()
        for width in fields(config)
        if width.name.startswith(("d_", "num_", "rank"))
    ],
)
@pytest.mark.parametrize("size", [0, -3])
def test_widths_must_be_positive(kind: str, width: str, size: int) -> None:
    name = "num_latents" if width == "num_experts" else width
    with pytest.raises(ValueError, match=rf"{name} must be at least 1; got {size}\."):
        replace(EXAMPLES[kind], **{width: size})


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("k", [0, 201])
def test_k_must_fit(kind: str, k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 200\], the number of latents; got {k}\."):
        replace(EXAMPLES[kind], k=k)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, gelu_tanh, silu, sigmoid; got 'tanh'"):
        activation_function("tanh")
    with pytest.raises(ValueError, match="encoder must be one of mlp, glu; got 'cnn'"):
        dense_encoder("cnn", 16, 24, "gelu", None)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_configurations_do_not_change(kind: str) -> None:
    config = EXAMPLES[kind]
    for field in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, 3)
    before = copy.deepcopy(config)
    layer = build(kind)
    layer(torch.randn(3, 16))
    assert layer.config is config
    assert config == before


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_generator_decides_every_weight(kind: str) -> None:
    state = torch.get_rng_state()
    first, same, other = build(kind, 1), build(kind, 1), build(kind, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.scorer.weight, other.scorer.weight)
    torch.manual_seed(1)
    construct = cast(Callable[[object], SparseLayer], LAYERS[kind].layer)
    from_global_state = construct(EXAMPLES[kind])
    assert torch.equal(from_global_state.scorer.weight, first.scorer.weight)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_scorers_columns_stay_contiguous(kind: str) -> None:
    layer = build(kind)
    restored = build(kind, seed=5)
    restored.load_state_dict({name: tensor.contiguous() for name, tensor in layer.state_dict().items()})
    for variant in (layer, copy.deepcopy(layer), copy.deepcopy(layer).to(torch.float64), restored):
        weight = variant.scorer.weight
        assert weight.t().is_contiguous()
        assert torch.equal(weight.float(), layer.scorer.weight)
    assert copy.deepcopy(layer).bfloat16().scorer.weight.t().is_contiguous()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_scorers_gradient_and_step_keep_the_layout(kind: str) -> None:
    layer = build(kind)
    layer(torch.randn(5, 16)).prediction.square().sum().backward()
    gradient = layer.scorer.weight.grad
    assert gradient is not None
    assert gradient.t().is_contiguous()
    torch.optim.AdamW(layer.parameters()).step()
    assert layer.scorer.weight.t().is_contiguous()


def parameter_names(layer: SparseLayer, tensors: list[Tensor]) -> list[str]:
    names = {parameter: name for name, parameter in layer.named_parameters()}
    return [names[cast(nn.Parameter, tensor)] for tensor in tensors]


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (MixtureOfDecoders(MIXTURE), ["W_gate", "encoder.W_enc"]),
        (MixtureOfDecoders(GLU), ["W_gate", "encoder.W_enc_gate", "encoder.W_enc"]),
        (Transcoder(TRANSCODER), ["W_enc"]),
        (SkipTranscoder(SKIP), ["W_enc", "W_skip"]),
        (TopKAutoencoder(AUTOENCODER), []),
        (LowRankMixture(LOW_RANK), ["W_gate", "encoder.W_enc"]),
        (LinearTransformMixture(MOLT), []),
    ],
)
def test_input_maps(layer: SparseLayer, names: list[str]) -> None:
    assert parameter_names(layer, [weight for weight, _ in layer.input_maps()]) == names
