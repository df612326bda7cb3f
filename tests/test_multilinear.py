"""The mathematics of multilinear mixtures, against naive restatements in float64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mxd.layers import MixtureOfDecoders, MixtureOfDecodersConfig
from mxd.multilinear import (
    CPExperts,
    CPExpertsConfig,
    CPMixture,
    CPMixtureConfig,
    ExpertGate,
    FactorisedExperts,
    Mixture,
    MultilinearMLP,
    MultilinearMLPConfig,
    Normalization,
    TRExperts,
    TRExpertsConfig,
    TRMixture,
    TRMixtureConfig,
    entmax15,
)
from mxd.multilinear.gate import require_one_of
from tests.tensors import assert_near

CP = CPMixtureConfig(d_in=4, d_out=6, num_experts=(5,), rank=3)
TR = TRMixtureConfig(d_in=4, d_out=6, num_experts=(5,), ranks=(2, 3, 4, 2))
CONFIGS = {
    "cp": CP,
    "cp two levels": replace(CP, num_experts=(5, 3)),
    "cp without bias": replace(CP, bias=False),
    "tr": TR,
    "tr two levels": replace(TR, num_experts=(5, 3), ranks=(2, 3, 2, 4, 2)),
    "tr three levels": replace(TR, num_experts=(2, 3, 2), ranks=(2, 3, 2, 3, 4, 2)),
    "tr without bias": replace(TR, bias=False),
}
BLOCK = MultilinearMLPConfig(kind="cp", d_in=4, d_hidden=7, d_out=6, num_experts=(5,), ranks=(3,))
BLOCKS = {
    "cp": BLOCK,
    "tr two levels": replace(BLOCK, kind="tr", num_experts=(5, 2), ranks=(2, 3, 2, 4, 2), normalize_input=True),
}


def randomised(module: nn.Module) -> nn.Module:
    """Return the module in float64 and evaluation mode, with weights that are nowhere zero: gates begin at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(std=0.7, generator=generator)
    return module.eval()


def mixture(config: CPMixtureConfig | TRMixtureConfig) -> Mixture:
    layer = CPMixture(config) if isinstance(config, CPMixtureConfig) else TRMixture(config)
    assert isinstance(randomised(layer), Mixture)
    return layer


def inputs(*batch: int, d: int = 4) -> Tensor:
    return torch.randn(*batch, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def materialised(experts: FactorisedExperts) -> Tensor:
    """Return the whole tensor (experts of each level …, d_in + bias, d_out) by one einsum over the factors."""
    if isinstance(experts, CPExperts):
        factors = [*experts.W_expert]
        W_in = experts.W_in if experts.b_in is None else torch.cat([experts.W_in, experts.b_in[None]])
        letters = "nml"[: len(factors)]
        terms = ",".join(f"{letter}r" for letter in letters)
        return torch.einsum(f"{terms},ir,ro->{letters}io", *factors, W_in, experts.W_out)
    assert isinstance(experts, TRExperts)
    cores = [*experts.W_expert]
    W_in = experts.W_in if experts.b_in is None else torch.cat([experts.W_in, experts.b_in[None]])
    letters, ring = "nml"[: len(cores)], "abcde"
    terms = ",".join(f"{letter}{ring[e]}{ring[e + 1]}" for e, letter in enumerate(letters))
    left, last = ring[len(cores)], "z"
    return torch.einsum(f"{terms},i{left}{last},a{last}o->{letters}io", *cores, W_in, experts.W_out)


def with_one(x: Tensor, config: CPExpertsConfig | TRExpertsConfig) -> Tensor:
    return torch.cat([x, torch.ones(*x.shape[:-1], 1, dtype=x.dtype)], -1) if config.bias else x


def naive(experts: FactorisedExperts, x: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
    """Return the sum over all experts of coefficient times what the expert makes of the input and a constant 1."""
    tensor, given = materialised(experts), with_one(x, experts.config)
    total = torch.zeros(*x.shape[:-1], experts.config.d_out, dtype=x.dtype)
    for place in torch.cartesian_prod(*(torch.arange(count) for count in experts.config.num_experts)).reshape(
        math.prod(experts.config.num_experts), -1
    ):
        indices = tuple(place.tolist())
        weight = torch.stack([a[..., n] for a, n in zip(coefficients, indices, strict=True)]).prod(0)
        total = total + weight[..., None] * (given @ tensor[indices])
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixture_is_the_sum_of_its_experts_values_and_gradients(name: str) -> None:
    layer, x = mixture(CONFIGS[name]), inputs(2, 3).requires_grad_()
    coefficients = layer.gate(x)
    prediction, expected = layer(x), naive(layer.experts, x, coefficients)
    assert_near(prediction, expected)
    leaves = (x, *layer.parameters())
    gradients = torch.autograd.grad(prediction.square().sum(), leaves, retain_graph=True)
    restated = torch.autograd.grad(expected.square().sum(), leaves)
    for gradient, wanted in zip(gradients, restated, strict=True):
        assert gradient.abs().sum() > 0
        assert_near(gradient, wanted, 1e-10)


def largest_rank(config: CPExpertsConfig | TRExpertsConfig) -> int:
    """Return the largest rank that an expert's matrix can have, as docs/multilinear.md gives it."""
    if isinstance(config, CPExpertsConfig):
        return min(config.d_in, config.d_out, config.rank)
    # The input core reaches the output through two links of the ring.
    return min(config.d_in, config.d_out, config.ranks[-2] * min(config.ranks[:-2]))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_experts_matrix_is_its_slice_and_its_rank_is_bounded(name: str) -> None:
    config = CONFIGS[name]
    experts = mixture(config).experts
    tensor = materialised(experts)
    for place in torch.cartesian_prod(*(torch.arange(count) for count in config.num_experts)).reshape(
        math.prod(config.num_experts), -1
    ):
        indices = tuple(place.tolist())
        weight, bias = experts.expert(*indices)
        assert_near(weight, tensor[indices][: config.d_in])
        assert_near(bias, tensor[indices][config.d_in] if config.bias else torch.zeros_like(bias))
        assert int(torch.linalg.matrix_rank(weight)) == largest_rank(config)


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (CPExpertsConfig(d_in=9, d_out=8, num_experts=(2,), rank=5), 5),
        (TRExpertsConfig(d_in=9, d_out=8, num_experts=(2,), ranks=(2, 3, 3, 2)), 6),
        (TRExpertsConfig(d_in=9, d_out=8, num_experts=(2, 2), ranks=(3, 1, 3, 4, 3)), 4),
    ],
)
def test_the_bound_of_the_rank_is_met(config: CPExpertsConfig | TRExpertsConfig, bound: int) -> None:
    experts = config.build()
    randomised(experts)
    weight = experts.expert(*(0 for _ in config.num_experts)).weight
    assert int(torch.linalg.matrix_rank(weight)) == largest_rank(config) == bound


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_operations_are_as_counted(name: str) -> None:
    config = CONFIGS[name]
    layer = mixture(config)
    assert sum(parameter.numel() for parameter in layer.parameters()) == config.num_parameters
    assert matrix_products(layer) == config.flops_per_token


@pytest.mark.parametrize("name", BLOCKS)
def test_a_blocks_parameters_and_operations_are_as_counted(name: str) -> None:
    config = BLOCKS[name]
    block = randomised(MultilinearMLP(config))
    assert sum(parameter.numel() for parameter in block.parameters()) == config.num_parameters
    assert matrix_products(block) == config.flops_per_token


def matrix_products(module: nn.Module) -> int:
    """Return the operations that PyTorch counts in the matrix products of one input's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(inputs(1))
    return counter.get_total_flops()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("config", [CP, TR], ids=["cp", "tr"])
def test_nothing_as_large_as_the_experts_matrices_is_built(config: CPMixtureConfig | TRMixtureConfig) -> None:
    num_experts, d_in, d_out, rows = 200, 30, 40, 8
    layer = mixture(replace(config, num_experts=(num_experts,), d_in=d_in, d_out=d_out))
    with LargestTensor() as largest:
        layer(inputs(rows, d=d_in)).square().sum().backward()
    # The gate's weight and its gradient are the largest.
    assert largest.entries == d_in * num_experts < num_experts * d_in * d_out


@pytest.mark.parametrize("name", BLOCKS)
def test_both_layers_of_a_block_share_the_gates_coefficients(name: str) -> None:
    block, x = MultilinearMLP(BLOCKS[name]), inputs(2, 3)
    randomised(block)
    coefficients = block.gate(x)
    read = x
    if BLOCKS[name].normalize_input:
        weight, bias = block.input_norm.get_parameter("weight"), block.input_norm.get_parameter("bias")
        centred = x - x.mean(-1, keepdim=True)
        read = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    hidden = naive(block.first, read, coefficients)
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    assert_near(block(x), naive(block.second, hidden, coefficients), 1e-11)


def test_a_cp_mixture_of_full_rank_with_given_coefficients_is_a_mixture_of_decoders() -> None:
    d_in, d_hidden, d_out, num_experts = 4, 7, 6, 5
    dense = MixtureOfDecoders(
        MixtureOfDecodersConfig(d_in=d_in, d_hidden=d_hidden, d_out=d_out, num_experts=num_experts, k=num_experts)
    )
    randomised(dense)
    layer = CPMixture(
        CPMixtureConfig(d_in=d_hidden, d_out=d_out, num_experts=(num_experts,), rank=d_out, bias=False)
    ).double()
    with torch.no_grad():
        dense.b_dec.zero_()
        layer.experts.get_parameter("W_expert.0").copy_(dense.W_expert)
        layer.experts.get_parameter("W_in").copy_(dense.W_dec)
        layer.experts.get_parameter("W_out").copy_(torch.eye(d_out))
    x = inputs(11)
    prediction, code = dense(x)
    a = (x @ dense.W_gate + dense.b_gate).relu()
    assert_near(code.dense(num_experts), a)
    assert (a > 0).sum(1).unique().numel() > 2
    assert_near(layer(dense.encoder(x), [a]), prediction)
    for n in range(num_experts):
        assert_near(layer.experts.expert(n).weight, dense.expert_weight(n))


def test_a_fresh_layer_gives_all_experts_equal_coefficients_and_begins_as_the_released_code_does() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = CPMixture(replace(CP, d_in=100, rank=400, num_experts=(50, 3)), generator)
    for coefficients, count in zip(layer.gate(torch.randn(3, 100)), (50, 3), strict=True):
        torch.testing.assert_close(coefficients, torch.full((3, count), 1 / count))
    first, second = layer.experts.get_parameter("W_expert.0"), layer.experts.get_parameter("W_expert.1")
    assert first.mean().item() == pytest.approx(1, abs=0.02)
    assert first.std().item() == pytest.approx(1, abs=0.02)
    assert (second == 1).all()
    for name, bound in {"W_in": 0.1, "b_in": 0.1, "W_out": 0.05}.items():
        assert 0.9 * bound < layer.experts.get_parameter(name).abs().max() <= bound
    ring = TRMixture(replace(TR, d_in=100, num_experts=(5000, 3), ranks=(4, 4, 4, 25, 4)), generator).experts
    first, second = ring.get_parameter("W_expert.0"), ring.get_parameter("W_expert.1")
    assert torch.equal(second, torch.eye(4).expand(3, 4, 4))
    assert not (first * (1 - torch.eye(4))).any()
    diagonals = first.diagonal(dim1=1, dim2=2)
    assert diagonals.mean().item() == pytest.approx(1, abs=0.03)
    assert diagonals.std().item() == pytest.approx(1, abs=0.03)
    for name, bound in {"W_in": 0.1, "b_in": 0.1, "W_out": 0.1}.items():
        assert 0.9 * bound < ring.get_parameter(name).abs().max() <= bound


def test_a_softmax_gate_has_no_zeros_and_a_batch_gate_knows_its_statistics() -> None:
    x = inputs(64)
    softmax = mixture(replace(CP, gate="softmax"))
    (coefficients,) = softmax.gate(x)
    assert (coefficients > 0).all()
    scores = x @ softmax.gate.W_gate[0]
    centred = scores - scores.mean(-1, keepdim=True)
    expected = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).softmax(-1)
    assert_near(coefficients, expected)
    batch = ExpertGate(4, (5,), normalization="batch")
    randomised(batch)
    scores = x @ batch.W_gate[0]
    expected = (scores - scores.mean(0)) / (scores.var(0, unbiased=False) + 1e-5).sqrt()
    assert_near(batch.train().scores(x.view(4, 16, 4))[0].flatten(0, 1), expected)
    assert_near(batch.norms[0].get_buffer("running_mean"), 0.1 * scores.mean(0))
    assert_near(batch.norms[0].get_buffer("running_var"), 0.9 + 0.1 * scores.var(0))
    (gradient,) = torch.autograd.grad(batch.scores(x)[0].square().mul(torch.arange(5)).sum(), batch.W_gate[0])
    (wanted,) = torch.autograd.grad(
        ((scores - scores.mean(0)) / (scores.var(0, unbiased=False) + 1e-5).sqrt()).square().mul(torch.arange(5)).sum(),
        batch.W_gate[0],
    )
    assert_near(gradient, wanted, 1e-9)


@pytest.mark.parametrize("normalization", ["layer", "batch"])
def test_products_in_bfloat16_leave_the_gate_in_float32(normalization: Normalization) -> None:
    layer = CPMixture(replace(CP, normalization=normalization)).to(torch.bfloat16)
    with torch.no_grad():
        layer.gate.W_gate[0].normal_()
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    for mode in (True, False):
        assert layer.train(mode)(x).dtype == torch.bfloat16
        (coefficients,) = layer.gate(x)
        assert coefficients.dtype == torch.float32
        torch.testing.assert_close(coefficients.sum(-1), torch.ones(3))


def test_autocast_does_not_round_the_coefficients() -> None:
    scores = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = entmax15(scores)
    (gradient,) = torch.autograd.grad(plain.square().sum(), scores)
    with torch.autocast("cpu", torch.bfloat16):
        cast = entmax15(scores)
        (cast_gradient,) = torch.autograd.grad(cast.square().sum(), scores)
    assert torch.equal(cast, plain)
    assert torch.equal(cast_gradient, gradient)


def test_inputs_may_have_any_number_of_leading_axes_and_none() -> None:
    layer = mixture(CP)
    x = inputs(6)
    assert_near(layer(x[0]), layer(x)[0])
    assert_near(layer(x.view(3, 1, 2, 4)).reshape(6, 6), layer(x))
    assert layer(x[:0]).shape == (0, 6)


@pytest.mark.parametrize(
    ("config", "change", "sentence"),
    [
        (CP, {"rank": 0}, r"rank must be at least 1; got 0\."),
        (CP, {"num_experts": ()}, "num_experts must name at least one expert"),
        (CP, {"num_experts": (5, 0)}, "num_experts must name at least one expert"),
        (TR, {"ranks": (2, 3, 4, 3)}, r"so that the ring closes; got \(2, 3, 4, 3\)\. Make the last 2\."),
        (TR, {"ranks": (2, 3, 4)}, "ranks must be 4 numbers for 1 levels"),
        (TR, {"num_experts": (5, 3)}, "ranks must be 5 numbers for 2 levels"),
        (TR, {"ranks": (2, 0, 4, 2)}, r"ranks\[1\] must be at least 1; got 0\."),
        (BLOCK, {"ranks": (3, 4)}, "ranks must be a single number for kind cp"),
        (BLOCK, {"ranks": (0,)}, "rank must be at least 1"),
        (BLOCK, {"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    config: CPMixtureConfig | TRMixtureConfig | MultilinearMLPConfig, change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(config, **change)  # pyright: ignore[reportArgumentType]


def test_coefficients_that_do_not_fit_and_experts_that_are_not_there_are_refused() -> None:
    layer, x = mixture(CONFIGS["cp two levels"]), inputs(2)
    with pytest.raises(ValueError, match="one tensor for each of the 2 levels of experts; got 1"):
        layer(x, [torch.rand(2, 5)])
    with pytest.raises(ValueError, match=r"level 1 must have shape \(2, 3\).*got \(2, 4\)"):
        layer(x, [torch.rand(2, 5), torch.rand(2, 4)])
    with pytest.raises(ValueError, match=r"level 0 must have shape \(2, 5\)"):
        layer(x, [torch.rand(1, 5), torch.rand(2, 3)])
    for indices in ((5, 0), (0,), (0, -1)):
        with pytest.raises(ValueError, match="one number for each level"):
            layer.experts.expert(*indices)
    with pytest.raises(ValueError, match="gate must be one of entmax, softmax; got 'topk'"):
        require_one_of("gate", "topk", ("entmax", "softmax"))
