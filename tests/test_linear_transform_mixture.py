from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mxd.kernels.backends import using_backend
from mxd.layers import LinearTransformMixture, LinearTransformMixtureConfig, SparseCode
from mxd.layers import linear_transform_mixture as module

CONFIG = LinearTransformMixtureConfig(d_in=7, d_out=9, num_latents=40, rank=6, k=3)


def random_layer(
    config: LinearTransformMixtureConfig = CONFIG, dtype: torch.dtype = torch.float64
) -> LinearTransformMixture:
    """Return a layer whose weights are nowhere zero."""
    generator = torch.Generator().manual_seed(0)
    layer = LinearTransformMixture(config).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return layer


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def codes() -> dict[str, SparseCode]:
    """Return codes of 13 tokens, regular and not."""
    values, indices = normal(13, 3), normal(13, 40, seed=2).topk(3).indices
    return {
        "distinct": SparseCode(values, indices),
        "one transform for all": SparseCode(values[:, :1], torch.full((13, 1), 17)),
        "unused slots that all name one transform": SparseCode(
            values * torch.tensor([1.0, 0, 0]), (indices[:, :1] * 0).expand(-1, 3)
        ),
        "one transform named twice": SparseCode(values, indices[:, [0, 1, 0]]),
    }


def naive(layer: LinearTransformMixture, x: Tensor, code: SparseCode) -> Tensor:
    """Return the prediction from full matrices, one for each transform."""
    matrices = torch.stack([layer.expert_weight(n) for n in range(layer.config.num_latents)])
    return torch.einsum("tn,ti,nio->to", code.dense(len(matrices)), x, matrices) + layer.b_dec


def assert_same(layer: LinearTransformMixture, x: Tensor, code: SparseCode) -> None:
    """Assert that value and gradients are those of the naive formula."""
    leaves = (x.requires_grad_(), code.values.requires_grad_(), layer.W_down, layer.W_dec, layer.b_dec)
    results: list[tuple[Tensor, ...]] = []
    for prediction in (layer.decode(x, code), naive(layer, x, code)):
        weights = normal(*prediction.shape, seed=3)
        gradients = torch.autograd.grad((prediction * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        results.append((prediction, *gradients))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", codes())
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_it_is_the_sum_of_its_transforms_values_and_gradients(name: str, backend: Any) -> None:
    with using_backend(backend):
        assert_same(random_layer(), normal(13, 7), codes()[name])


@pytest.mark.parametrize("block", [1, 16, 33, 1000])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    for code in (codes()["distinct"], codes()["one transform for all"]):
        assert_same(random_layer(), normal(13, 7), code)


def test_an_atom_is_what_its_transform_makes_of_the_input() -> None:
    layer, x, indices = random_layer(), normal(2, 5, 7), torch.arange(30).view(2, 5, 3)
    matrices = torch.stack([layer.expert_weight(n) for n in range(30)]).view(2, 5, 3, 7, 9)
    expected = torch.einsum("bti,btkio->btko", x, matrices)
    torch.testing.assert_close(layer.atoms(x, indices), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_latents", [31, 62, 310])
def test_ranks_halve_and_their_numbers_double(num_latents: int) -> None:
    ranks = replace(CONFIG, num_latents=num_latents, rank=64).ranks
    assert Counter(ranks) == {64 >> n: (num_latents // 31) << n for n in range(5)}
    assert list(ranks) == sorted(ranks, reverse=True)


@settings(deadline=None)
@given(num_latents=st.integers(3, 400), rank=st.integers(1, 70))
def test_any_number_of_transforms_has_ranks_in_that_ratio(num_latents: int, rank: int) -> None:
    config = replace(CONFIG, num_latents=num_latents, rank=rank)
    assert len(config.ranks) == num_latents
    assert sum(config.ranks) == config.total_rank
    assert set(config.ranks) <= {max(1, rank >> n) for n in range(5)}
    for n in range(5):
        wide = sum(place >= max(1, rank >> n) for place in config.ranks)
        if rank >> n > max(1, rank >> (n + 1)):
            assert abs(wide - num_latents * (2 ** (n + 1) - 1) / 31) <= 0.5
    # What pays for one transform more pays for it: none of the others loses rank.
    larger = replace(config, num_latents=num_latents + 1)
    assert all(new >= old for new, old in zip(larger.ranks, config.ranks, strict=False))


def test_no_transform_has_a_higher_rank_than_its_own() -> None:
    layer = random_layer()
    found = [int(torch.linalg.matrix_rank(layer.expert_weight(n))) for n in range(CONFIG.num_latents)]
    assert found == [min(rank, CONFIG.d_in, CONFIG.d_out) for rank in CONFIG.ranks]
    assert layer.W_down.shape == (CONFIG.d_in, CONFIG.total_rank)
    for n in (-1, CONFIG.num_latents):
        with pytest.raises(ValueError, match=rf"expert must lie in \[0, 39\]; got {n}\."):
            layer.expert_weight(n)


def test_a_fresh_layer_predicts_its_bias_and_moves_only_its_outputs() -> None:
    layer = LinearTransformMixture(CONFIG)
    assert layer.W_down.abs().max() <= CONFIG.d_in**-0.5
    assert layer.W_down.t().is_contiguous()
    prediction = layer(normal(13, 7).float()).prediction
    assert not prediction.any()
    (prediction - 1).square().sum().backward()
    moved = {
        name for name, parameter in layer.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {"W_dec", "b_dec"}


def test_two_threads_give_the_same_bits_every_time() -> None:
    config = replace(CONFIG, d_in=32, d_out=24, num_latents=62, rank=16, k=8)
    layer, x = random_layer(config, torch.float32), normal(500, 32).float().requires_grad_()
    results: list[tuple[Tensor, ...]] = []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in range(3):
            prediction = layer(x).prediction
            results.append((prediction, *torch.autograd.grad(prediction.square().sum(), (x, *layer.parameters()))))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], again, strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_only_the_chosen_transforms_are_computed() -> None:
    config = replace(CONFIG, num_latents=310, rank=16, k=2)
    layer, tokens = random_layer(config), 600
    x = normal(tokens, config.d_in).requires_grad_()
    code = SparseCode(normal(tokens, 2), normal(tokens, 310, seed=2).topk(2).indices)
    largest = LargestTensor()
    with largest:
        layer.decode(x, code).square().sum().backward()
    tables = (config.d_in + config.d_out) * config.total_rank
    assert largest.elements <= max(tables, tokens * (config.d_in + config.d_out)) < tokens * config.total_rank / 8
