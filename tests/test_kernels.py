from collections.abc import Callable
from typing import cast
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.kernels import dots, mix, reference, route, routing, torch_tables
from mxd.kernels.turned import turned
from mxd.layers import (
    LAYERS,
    MixtureOfDecodersConfig,
    SparseCode,
    SparseLayer,
    topk_relu,
)
from mxd.losses import distillation_loss
from tests.kernel_inputs import LAYER_CONFIGS, dense_gradients, normal, seeds, sizes

block_sizes = st.sampled_from([1, 200, 2**24])


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 9), d_in=sizes, n=sizes, by_column=st.booleans(), block=block_sizes, seed=seeds, d=st.data()
)
def test_route_equals_the_reference(
    tokens: int, d_in: int, n: int, by_column: bool, block: int, seed: int, d: st.DataObject
) -> None:
    k = d.draw(st.integers(1, n))
    x, weight, bias = normal(tokens, d_in, seed=seed), normal(d_in, n, seed=1, by_column=by_column), normal(n, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(routing.BLOCK_BYTES, "cpu", block)
        actual = SparseCode(*route(x, weight, bias, k)).dense(n)
    expected = SparseCode(*reference.route(x, weight, bias, k)).dense(n)
    assert_same((actual,), (expected,))
    cotangent = torch.randn(tokens, n, dtype=torch.float64)
    leaves = (x, weight, bias)
    assert_same(
        dense_gradients((actual * cotangent).sum(), leaves), dense_gradients((expected * cotangent).sum(), leaves)
    )


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 9),
    k=sizes,
    n=sizes,
    width=sizes,
    by_column=st.booleans(),
    block=block_sizes,
    seed=seeds,
    gathering=st.booleans(),
)
def test_mix_equals_the_reference(
    tokens: int, k: int, n: int, width: int, by_column: bool, block: int, seed: int, gathering: bool
) -> None:
    values, table = normal(tokens, k, seed=seed), normal(n, width, seed=1, by_column=by_column)
    # Drawn with replacement: rows repeat within a token, and more often than not some row is named by no token.
    indices = torch.randint(n, (tokens, k), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_tables, "BLOCK_ELEMENTS", block)
        patch.setattr(torch_tables, "_has_gathering_dot", Mock(return_value=gathering))
        actual, expected = mix(values, indices, table), reference.mix(values, indices, table)
        assert_same((actual,), (expected,))
        cotangent = torch.randn(tokens, width, dtype=torch.float64)
        leaves = (values, table)
        assert_same(
            dense_gradients((actual * cotangent).sum(), leaves), dense_gradients((expected * cotangent).sum(), leaves)
        )


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(0, 9), k=sizes, n=sizes, width=sizes, block=block_sizes, seed=seeds, gathering=st.booleans())
def test_dots_equals_the_reference(
    tokens: int, k: int, n: int, width: int, block: int, seed: int, gathering: bool
) -> None:
    dense, table = normal(tokens, width, seed=seed), normal(n, width, seed=1)
    indices = torch.randint(n, (tokens, k), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_tables, "BLOCK_ELEMENTS", block)
        patch.setattr(torch_tables, "_has_gathering_dot", Mock(return_value=gathering))
        actual, expected = dots(dense, indices, table), reference.dots(dense, indices, table)
        assert_same((actual,), (expected,))
        cotangent = torch.randn(tokens, k, dtype=torch.float64)
        leaves = (dense, table)
        assert_same(
            dense_gradients((actual * cotangent).sum(), leaves), dense_gradients((expected * cotangent).sum(), leaves)
        )


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 40),
    k=sizes,
    n=sizes,
    d=sizes,
    run=st.sampled_from([1, 2, 5, 64]),
    popular=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=seeds,
)
def test_sums_of_runs_equal_the_reference(
    tokens: int, k: int, n: int, d: int, run: int, popular: float, dtype: torch.dtype, seed: int
) -> None:
    """What a CUDA device uses; rows that nobody names and one that all tokens name are among the examples."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n, (tokens, k), generator=generator)
    indices[torch.rand(tokens, k, generator=generator) < popular] = n // 2
    values, dense = (normal(tokens, size, seed=seed + size).detach().to(dtype) for size in (k, d))
    named = turned(indices, n)
    weights = values.flatten()[named.order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_tables, "RUN", run)
        actual = torch_tables.sums_by_runs(weights, named.tokens, named.bounds[:-1], dense)
    code = torch.zeros(tokens, n, dtype=torch.float64).scatter_add(1, indices, values.double())
    assert actual.dtype == dtype
    rtol, atol = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-8, 1e-5)}[dtype]
    torch.testing.assert_close(actual.double(), code.t() @ dense.double(), rtol=rtol, atol=atol)


def test_a_code_turned_around_is_sorted_by_row_and_then_by_place() -> None:
    rows, order, tokens, bounds = turned(torch.tensor([[3, 0], [0, 3], [3, 3]]), 5)
    assert rows.tolist() == [0, 0, 3, 3, 3, 3]
    assert order.tolist() == [1, 2, 0, 3, 4, 5]
    assert tokens.tolist() == [0, 1, 0, 1, 2, 2]
    assert bounds.tolist() == [0, 2, 2, 2, 6, 6]


def test_a_backward_pass_sorts_a_code_once() -> None:
    x, weight, bias = normal(4, 5), normal(5, 6), normal(6)
    values, _ = route(x, weight, bias, 2)
    counted = Mock(wraps=turned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "turned", counted)
        torch.autograd.grad(values.sum(), (x, weight, bias))
    assert counted.call_count == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gathering_product_of_a_gpu_takes_every_type(dtype: torch.dtype) -> None:
    dense, table = normal(7, 5).detach().to(dtype), normal(9, 5, seed=1).detach()
    indices = torch.randint(9, (7, 3), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_tables, "_has_gathering_dot", Mock(return_value=True))
        found = torch_tables.row_dots(dense, indices, table)
    assert found.dtype == dtype
    torch.testing.assert_close(found, reference.dots(dense.double(), indices, table).to(dtype))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradcheck(k: int) -> None:
    x, weight, bias, table = normal(4, 5, seed=1), normal(5, 6, seed=2, by_column=True), normal(6), normal(6, 3)

    def values(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return route(x, weight, bias, k)[0]

    assert torch.autograd.gradcheck(values, (x, weight, bias))
    indices = torch.tensor([[0, 0, 5], [1, 2, 2], [3, 3, 3], [5, 4, 0]])

    def mixed(values: Tensor, table: Tensor) -> Tensor:
        return mix(values, indices, table)

    assert torch.autograd.gradcheck(mixed, (normal(4, 3), table))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)])
def test_leading_dimensions(batch: tuple[int, ...]) -> None:
    x, weight, bias, table = normal(*batch, 5), normal(5, 6), normal(6), normal(6, 4)
    values, indices = route(x, weight, bias, 2)
    assert values.shape == indices.shape == (*batch, 2)
    expected, _ = reference.route(x.reshape(-1, 5), weight, bias, 2)
    assert_same((values.sort().values,), (expected.sort().values.view(*batch, 2),))
    assert mix(values, indices, table).shape == (*batch, 4)


def test_inputs_need_not_be_contiguous() -> None:
    x, values = normal(5, 8).t()[::2], normal(3, 4).t()
    weight, bias, table = normal(9, 7)[::2, 1:], normal(14)[::2], normal(8, 10)[1:, ::2]
    assert not any(tensor.is_contiguous() for tensor in (x, values, weight, bias, table))
    actual, expected = route(x, weight[:, :6], bias[:6], 2), reference.route(x, weight[:, :6], bias[:6], 2)
    assert_same((SparseCode(*actual).dense(6),), (SparseCode(*expected).dense(6),))
    indices = torch.randint(7, (3, 4)).t()
    leaves = (values, table)
    mixed, wanted = mix(values, indices, table), reference.mix(values, indices, table)
    # An expanded gradient, as that of a sum, has strides of zero.
    assert_same((mixed, *dense_gradients(mixed.sum(), leaves)), (wanted, *dense_gradients(wanted.sum(), leaves)))


def test_ties_keep_k_of_the_equals() -> None:
    weight = torch.eye(2, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.ones(5, dtype=torch.float64, requires_grad=True)
    values, indices = route(torch.zeros(3, 2, dtype=torch.float64), weight, bias, 2)
    assert torch.equal(values, torch.ones_like(values))
    assert all(len(row.unique()) == 2 for row in indices)
    (gradient,) = torch.autograd.grad(values.sum(), bias)
    assert torch.equal(gradient, torch.bincount(indices.flatten(), minlength=5).double())


def test_a_row_without_positive_scores_is_empty_and_gives_no_gradient() -> None:
    x, weight = normal(4, 3), normal(3, 6)
    bias = torch.full((6,), -100.0, dtype=torch.float64, requires_grad=True)
    values, _ = route(x, weight, bias, 3)
    assert not values.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(values.sum(), (x, weight, bias)))


def test_selecting_dense_scores_is_the_same() -> None:
    x, weight, bias = normal(5, 4), normal(4, 9, seed=1), normal(9, seed=2)
    code = topk_relu(x @ weight + bias, 3)
    assert_same((code.dense(9),), (SparseCode(*reference.route(x, weight, bias, 3)).dense(9),))


@pytest.mark.parametrize("k", [0, 7])
def test_k_must_fit(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 6\], the number of latents; got {k}\."):
        route(normal(2, 3), normal(3, 6), normal(6), k)
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 6\], the width of the scores; got {k}\."):
        topk_relu(normal(2, 6), k)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, bias, table = (tensor.detach() for tensor in (normal(4, 5), normal(5, 6), normal(6), normal(6, 3)))
    values, indices = route(x, weight, bias.requires_grad_(), 2)
    assert not indices.requires_grad
    mix(values, indices, table).sum().backward()
    assert bias.grad is not None
    assert x.grad is weight.grad is table.grad is None


def test_a_popular_latent_in_bfloat16_counts_every_token() -> None:
    tokens = 4096
    x = torch.ones(tokens, 2, dtype=torch.bfloat16)
    weight, bias, table = (
        torch.ones(*shape, dtype=torch.bfloat16).requires_grad_() for shape in ((2, 3), (3,), (3, 2))
    )
    values, indices = route(x, weight, bias, 3)
    mix(values, indices, table).sum().backward()
    expected = {"weight": (weight, 2.0 * tokens), "bias": (bias, 2.0 * tokens), "table": (table, 3.0 * tokens)}
    for name, (tensor, gradient) in expected.items():
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.full_like(tensor, gradient)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_under_autocast_values_have_the_weights_type(dtype: torch.dtype) -> None:
    exact = dtype == torch.float64
    x, weight, bias = normal(6, 5).detach().to(dtype), normal(5, 4).detach(), normal(4).detach()
    weight, bias = ((tensor if exact else tensor.float()).requires_grad_() for tensor in (weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, indices = route(x, weight, bias, 4)
    assert values.dtype == weight.dtype
    expected = reference.route(x.double(), weight.double(), bias.double(), 4)
    actual = SparseCode(values.double(), indices).dense(4)
    torch.testing.assert_close(actual, SparseCode(*expected).dense(4), rtol=0, atol=1e-12 if exact else 0.05)
    gradients = torch.autograd.grad(values.sum(), (weight, bias))
    assert all(gradient.dtype == weight.dtype for gradient in gradients)


def test_backward_is_deterministic_on_two_threads() -> None:
    threads = torch.get_num_threads()
    x, weight, bias, table = (
        tensor.detach().float() for tensor in (normal(3000, 16), normal(16, 50), normal(50), normal(50, 16))
    )
    leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, bias, table))

    def gradients() -> tuple[Tensor, ...]:
        values, indices = route(x, weight, bias, 8)
        return torch.autograd.grad(mix(values, indices, table).square().sum(), leaves)

    try:
        torch.set_num_threads(2)
        first = gradients()
        assert all(torch.equal(*pair) for _ in range(5) for pair in zip(first, gradients(), strict=True))
    finally:
        torch.set_num_threads(threads)


def saved_sizes(run: Callable[[], Tensor], known: tuple[Tensor, ...]) -> list[int]:
    """Return the sizes of the tensors that are kept for the backward pass, other than the known ones."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in storages:
            # A view keeps all of its storage alive.
            found.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: cast(Tensor, tensor)):
        run()
    return found


def test_the_backward_pass_keeps_no_more_than_the_code() -> None:
    x, weight, bias, table = normal(11, 5), normal(5, 97), normal(97), normal(97, 5)

    def run() -> Tensor:
        values, indices = route(x, weight, bias, 3)
        return mix(values, indices, table)

    assert max(saved_sizes(run, (x, weight, bias, table))) == 11 * 3


@pytest.mark.parametrize("kind", LAYERS)
def test_a_training_step_keeps_nothing_as_wide_as_the_latents(kind: str) -> None:
    config = LAYER_CONFIGS[kind]
    layer = cast(Callable[[object], SparseLayer], LAYERS[kind].layer)(config)
    x, target = torch.randn(11, config.d_in), torch.randn(11, config.d_out)

    def run() -> Tensor:
        return distillation_loss(layer(x).prediction, target)

    widest = max(config.d_in, config.d_out, config.d_hidden if isinstance(config, MixtureOfDecodersConfig) else 0)
    assert max(saved_sizes(run, (x, target, *layer.parameters()))) <= 11 * widest
