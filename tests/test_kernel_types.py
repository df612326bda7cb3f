"""The kernels in the types that training uses, on their way through packed products and grouped selection.

Scores are sums of small integers, so that they are exact in bfloat16 too and equal ones are ties.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.kernels import backends, dots, mix, products, reference, route, routing, selection, torch_tables
from tests.kernel_inputs import dense_gradients, seeds

FAST: list[backends.Backend] = ["torch", "onednn"] if backends.has_onednn() else ["torch"]
SUNK = -128
"""What a row is lowered by that is to have negative scores only: others lie within ±(2 · 2 · 23 + 3)."""

fast = st.sampled_from(FAST)
types = st.sampled_from([torch.float32, torch.bfloat16])


class Sizes(NamedTuple):
    """A code and what it is selected from."""

    tokens: int
    d_in: int
    n: int
    k: int
    at_once: int
    """Rows of a block of scores."""
    group: int
    """Entries of a group."""


@st.composite
def drawn_sizes(draw: st.DrawFn) -> Sizes:
    n = draw(st.integers(1, 70))
    k = draw(st.one_of(st.just(1), st.just(n), st.integers(1, n), st.integers(1, 1 + n // 8)))
    tokens, d_in = draw(st.integers(0, 12)), draw(st.integers(1, 24))
    return Sizes(tokens, d_in, n, k, draw(st.sampled_from([1, 3, 1000])), draw(st.integers(2, 4)))


def integers(*shape: int, most: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def in_float64(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(leaf.detach().double().requires_grad_() for leaf in leaves)


def assert_rounded_once(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    for one, other in zip(actual, exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=1e-5)


@contextmanager
def watched_backend(name: backends.Backend, sizes: Sizes, dtype: torch.dtype) -> Generator[None]:
    """Use a backend on small blocks and groups, and see that it took the way that it is to take."""
    grouped, product = Mock(wraps=selection.largest), Mock(wraps=products._times_transpose)
    packed = Mock(wraps=torch.ops.mkldnn._reorder_linear_weight) if "onednn" in FAST else Mock()
    with pytest.MonkeyPatch.context() as patch, backends.using_backend(name):
        patch.setitem(routing.BLOCK_BYTES, "cpu", sizes.at_once * sizes.n * dtype.itemsize)
        patch.setattr(selection, "GROUP", sizes.group)
        patch.setattr(selection, "NARROWEST", 2)
        # It calls itself with the groups' maxima; what routing calls is not replaced.
        patch.setattr(selection, "largest", grouped)
        patch.setattr(products, "_times_transpose", product)
        if "onednn" in FAST:
            patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", packed)
        yield
    by_onednn = name == "onednn" and (dtype == torch.float32 or backends.has_onednn_bfloat16())
    assert product.called == (by_onednn and sizes.tokens > 0)
    assert packed.called == (by_onednn and sizes.tokens > sizes.at_once)
    assert grouped.called == (sizes.tokens > 0 and sizes.n > 2 and sizes.n // sizes.group >= 2 * sizes.k)


@settings(deadline=None, max_examples=100)
@given(
    sizes=drawn_sizes(),
    by_column=st.booleans(),
    sunk=st.sampled_from([0.0, 0.3, 1.0]),
    name=fast,
    dtype=types,
    seed=seeds,
)
@example(Sizes(7, 5, 65, 1, 3, 4), True, 0.3, FAST[-1], torch.float32, 0)
@example(Sizes(7, 5, 65, 8, 3, 4), False, 0.3, FAST[-1], torch.bfloat16, 0)
@example(Sizes(7, 5, 65, 65, 1, 4), True, 1.0, FAST[-1], torch.bfloat16, 0)
@example(Sizes(0, 5, 65, 3, 3, 4), True, 0.0, FAST[-1], torch.float32, 0)
def test_route_equals_the_reference_in_the_types_of_training(
    sizes: Sizes, by_column: bool, sunk: float, name: backends.Backend, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, d_in, n, k = sizes[:4]
    x = integers(tokens, d_in, most=2, dtype=dtype, generator=generator)
    x[:, 0] = torch.where(torch.rand(tokens, generator=generator) < sunk, SUNK, 0)
    weight = integers(*((n, d_in) if by_column else (d_in, n)), most=2, dtype=dtype, generator=generator)
    weight = weight.t() if by_column else weight
    weight[0] = 1
    bias = integers(n, most=3, dtype=dtype, generator=generator)
    leaves = tuple(leaf.requires_grad_() for leaf in (x, weight, bias))
    cotangent = integers(tokens, k, most=2, dtype=dtype, generator=generator)
    with watched_backend(name, sizes, dtype):
        values, indices = route(x, weight, bias, k)
        gradients = dense_gradients((values * cotangent).sum(), leaves)

    exact = in_float64(leaves)
    assert values.dtype == dtype
    expected, _ = reference.route(exact[0], exact[1], exact[2], k)
    assert torch.equal(values.double().sort().values, expected.sort().values)
    assert all(len(row.unique()) == k for row in indices)
    # Of equals any may be taken: the rest is compared for those that were.
    selected = reference.linear(*exact).gather(1, indices).relu()
    assert torch.equal(values.double(), selected)
    assert_rounded_once(gradients, dense_gradients((selected * cotangent.double()).sum(), exact), dtype)


@settings(deadline=None, max_examples=60)
@given(sizes=drawn_sizes(), d=st.integers(1, 40), by_column=st.booleans(), name=fast, dtype=types, seed=seeds)
def test_mix_and_dots_equal_the_reference_in_the_types_of_training(
    sizes: Sizes, d: int, by_column: bool, name: backends.Backend, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, n, k = sizes.tokens, sizes.n, sizes.k

    def normal(*shape: int) -> Tensor:
        # Of one sign: sums that cancel would be compared with what is left of them.
        return torch.randn(*shape, generator=generator).abs().to(dtype)

    # Drawn with replacement: rows repeat within a token, and low ones are popular.
    indices = (n * torch.rand(tokens, k, generator=generator) ** 3).long()
    table = normal(d, n).t() if by_column else normal(n, d)
    for kernel, exact_kernel, given_shape, made_shape in (
        (mix, reference.mix, (tokens, k), (tokens, d)),
        (dots, reference.dots, (tokens, d), (tokens, k)),
    ):
        leaves = tuple(leaf.requires_grad_() for leaf in (normal(*given_shape), table.detach()))
        cotangent = normal(*made_shape)
        with pytest.MonkeyPatch.context() as patch, backends.using_backend(name):
            patch.setattr(torch_tables, "BLOCK_ELEMENTS", sizes.at_once * k * d)
            actual = kernel(leaves[0], indices, leaves[1])
            gradients = dense_gradients((actual * cotangent).sum(), leaves)
        exact = in_float64(leaves)
        expected = exact_kernel(exact[0], indices, exact[1])
        exact_gradients = dense_gradients((expected * cotangent.double()).sum(), exact)
        assert_rounded_once((actual, *gradients), (expected, *exact_gradients), dtype)
