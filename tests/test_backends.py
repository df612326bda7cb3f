import os
import subprocess
import sys
from collections.abc import Callable
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.kernels import backends, linear, products, reference, selection
from mxd.layers import LAYERS, SparseLayer, SparseLayerConfig
from mxd.losses import distillation_loss
from tests.kernel_inputs import LAYER_CONFIGS, dense_gradients, normal, seeds, sizes, with_latents


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(0, 5),
    n=st.integers(1, 200),
    group=st.integers(2, 9),
    narrowest=st.integers(1, 60),
    levels=st.sampled_from([2, 5, 10**6]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=seeds,
    d=st.data(),
)
def test_largest_selects_what_topk_selects(
    rows: int, n: int, group: int, narrowest: int, levels: int, dtype: torch.dtype, seed: int, d: st.DataObject
) -> None:
    k = d.draw(st.integers(1, n))
    # Few levels make many ties.
    scores = torch.randint(-levels, levels, (rows, n), generator=torch.Generator().manual_seed(seed)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "GROUP", group)
        patch.setattr(selection, "NARROWEST", narrowest)
        values, indices = selection.largest(scores, k)
    assert torch.equal(values, scores.gather(1, indices))
    assert all(len(row.unique()) == k for row in indices)
    assert torch.equal(values.sort(descending=True).values, torch.topk(scores, k).values)


def test_largest_shows_a_nan() -> None:
    scores = normal(4, 5000).detach()
    scores[2, 4321] = torch.nan
    values, indices = selection.largest(scores, 3)
    assert (indices[2] == 4321).sum() == values[2].isnan().sum() == 1
    assert not values[[0, 1, 3]].isnan().any()


needs_onednn = pytest.mark.skipif(not backends.has_onednn(), reason="this processor or PyTorch has no oneDNN")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setattr(backends, "_chosen", backends._chosen)
    return backends.set_backend


@needs_onednn
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 70),
    d_in=sizes,
    d_out=st.integers(1, 40),
    by_column=st.booleans(),
    biased=st.booleans(),
    seed=seeds,
)
def test_linear_equals_the_reference(
    rows: int, d_in: int, d_out: int, by_column: bool, biased: bool, seed: int
) -> None:
    x, weight = normal(rows, d_in, seed=seed), normal(d_in, d_out, seed=1, by_column=by_column)
    bias = normal(d_out, seed=2)
    given = (x, weight, bias) if biased else (x, weight)
    single = tuple(tensor.detach().to(torch.float32, copy=True).requires_grad_() for tensor in given)
    actual, expected = linear(*single), reference.linear(*given)
    assert_near((actual,), (expected,))
    cotangent = torch.randn(rows, d_out, dtype=torch.float64)
    assert_near(
        dense_gradients((actual * cotangent.float()).sum(), single),
        dense_gradients((expected * cotangent).sum(), given),
    )


def assert_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("at_once", [1, 64, 99, 1000])
def test_a_product_by_rows_is_the_product(dtype: torch.dtype, by_column: bool, at_once: int) -> None:
    exact = normal(100, 24), normal(24, 33, seed=1, by_column=by_column), normal(33)
    x, weight, bias = (tensor.detach().to(dtype) for tensor in exact)
    blocks = list(products.product_by_rows(x, weight, bias, at_once))
    assert [row for rows, _ in blocks for row in range(100)[rows]] == list(range(100))
    expected = reference.linear(x.double(), weight.double(), bias.double())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    actual = torch.cat([block for _, block in blocks])
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@needs_onednn
def test_gradients_and_weights_need_not_be_contiguous() -> None:
    x, wide = torch.randn(40, 8, requires_grad=True), torch.randn(20, 30)
    weight = wide[2:18:2, 1:25].requires_grad_()
    assert not products._is_for_onednn(x, weight)
    for of in (weight, weight.detach().clone().requires_grad_()):
        # The gradient of a sum has strides of zero.
        leaves = dense_gradients(linear(x, of).sum(), (x, of))
        expected = dense_gradients(reference.linear(x, of).sum(), (x, of))
        for one, other in zip(leaves, expected, strict=True):
            torch.testing.assert_close(one, other)


@needs_onednn
def test_bfloat16_goes_to_onednn_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 8).bfloat16(), torch.randn(8, 5).bfloat16()
    assert products._is_for_onednn(x, weight) == backends.has_onednn_bfloat16()
    monkeypatch.setattr(products, "has_onednn_bfloat16", lambda: False)
    assert not products._is_for_onednn(x, weight)
    ((_, product),) = products.product_by_rows(x, weight, torch.zeros(5).bfloat16(), 4)
    torch.testing.assert_close(product, x @ weight)


def layer_of(kind: str, config: SparseLayerConfig) -> SparseLayer:
    layer = cast(Callable[..., SparseLayer], LAYERS[kind].layer)(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.get_parameter("W_dec").normal_(generator=torch.Generator().manual_seed(1))
    return layer


def loss_and_gradients(layer: SparseLayer, tokens: int) -> tuple[Tensor, ...]:
    x, target = (normal(tokens, d, seed=seed).detach().float() for seed, d in enumerate((layer.d_in, layer.d_out)))
    loss = distillation_loss(layer(x).prediction, target)
    return (loss, *torch.autograd.grad(loss, tuple(layer.parameters())))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["torch", "onednn", "triton"])
def test_every_backend_takes_the_same_training_step(
    kind: str, name: str, backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "onednn" and not backends.has_onednn():
        pytest.skip("this processor or PyTorch has no oneDNN")
    tokens, latents = 40, 997
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        # Triton's interpreter takes its time for every row; with these, some have a chunk of pairs to themselves.
        tokens, latents = 8, 11
        monkeypatch.setattr("mxd.kernels.triton_tables.CHUNK", 4)
    layer = layer_of(kind, with_latents(LAYER_CONFIGS[kind], latents))
    results: list[tuple[Tensor, ...]] = []
    for chosen in ("reference", name):
        backend(chosen)
        found = backends.backend(torch.device("cpu"))
        assert found == (chosen if chosen != "triton" or backends._is_interpreting() else "onednn")
        results.append(loss_and_gradients(layer, tokens))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["transcoder", "molt"])
def test_the_reference_takes_the_same_step_twice_on_two_threads(kind: str, backend: Callable[[str], None]) -> None:
    """Of these kinds one goes through `mix` alone, the other through `dots` too."""
    backend("reference")
    # Each of few latents is named by a thousand tokens.
    layer = layer_of(kind, with_latents(LAYER_CONFIGS[kind], 12))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = loss_and_gradients(layer, 4000)
        for _ in range(6):
            assert all(torch.equal(*pair) for pair in zip(first, loss_and_gradients(layer, 4000), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("chosen", "expected"), [("reference", "reference"), ("torch", "torch"), ("auto", None), ("", None)]
)
def test_the_environment_chooses_a_backend(chosen: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a process where nobody has asked yet.
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.setenv(backends.VARIABLE, chosen)
    assert backends.backend(torch.device("cpu")) == (expected or backends.automatic_backend("cpu"))


def test_a_new_process_has_its_environments_backend_and_a_wrong_one_is_refused(backend: Callable[[str], None]) -> None:
    program = "from mxd.kernels import backends; import torch; print(backends.backend(torch.device('cpu')))"
    environment = os.environ | {backends.VARIABLE: "reference"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "reference"
    with pytest.raises(
        ValueError, match="MXD_KERNELS must be one of auto, reference, torch, onednn, triton; got 'fast'"
    ):
        backend("fast")
