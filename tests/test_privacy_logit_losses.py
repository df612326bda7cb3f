"""The losses as functions of logits: derivatives against autograd, constants against what random search finds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.privacy.logit_losses import (
    LogitConstants,
    accuracy_constants,
    accuracy_slopes,
    curvature_entry,
    curvature_product,
    uniformity_constants,
    uniformity_slopes,
    uniformity_weights,
)
from mxd.privacy.objective import Uniformity, accuracy_losses, uniformity_losses

KINDS: tuple[Uniformity, ...] = ("kl-u-p", "kl-p-u", "square")


def losses(logits: Tensor, kind: Uniformity | None) -> Tensor:
    """The distance to uniform, or the cross-entropy with the first class."""
    if kind is None:
        return accuracy_losses(logits, torch.zeros(len(logits), dtype=torch.long))
    return uniformity_losses(logits, kind)


def constants(kind: Uniformity | None, classes: int) -> LogitConstants:
    return accuracy_constants(classes) if kind is None else uniformity_constants(kind, classes)


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("classes", [2, 5])
def test_derivatives_are_those_of_autograd(kind: Uniformity | None, classes: int) -> None:
    z = 2 * torch.randn(7, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(classes))
    point = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(losses(point, kind).sum(), point)
    labels = torch.zeros(7, dtype=torch.long)
    slopes = accuracy_slopes(z, labels) if kind is None else uniformity_slopes(z, kind)
    torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-12)
    p, weights = z.softmax(-1), uniformity_weights(z, kind or "kl-u-p")
    for row in range(7):

        def loss(x: Tensor) -> Tensor:
            return losses(x[None], kind).sum()

        hessian = torch.autograd.functional.hessian(loss, z[row])
        assert isinstance(hessian, Tensor)
        h = torch.randn(classes, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
        product = curvature_product(p[row][None], weights[row][None], h[None])[0]
        torch.testing.assert_close(product, hessian @ h, rtol=1e-8, atol=1e-12)
        for a in range(classes):
            for b in range(classes):
                entry = curvature_entry(p[row][None], weights[row][None], a, b)[0]
                assert float(entry) == pytest.approx(float(hessian[a, b]), rel=1e-8, abs=1e-12)


def hessians(logits: Tensor, kind: Uniformity | None) -> Tensor:
    p, weights = logits.softmax(-1), uniformity_weights(logits, kind or "kl-u-p")
    classes = range(logits.shape[-1])
    rows = [torch.stack([curvature_entry(p, weights, a, b) for b in classes], -1) for a in classes]
    return torch.stack(rows, -2)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([*KINDS, None]), st.integers(2, 12), st.floats(0.1, 8), st.integers(0, 10**6))
def test_constants_are_never_exceeded(kind: Uniformity | None, classes: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(200, classes, dtype=torch.float64, generator=generator)
    found, bound, slack = hessians(z, kind), constants(kind, classes), 1 + 1e-9
    labels = torch.zeros(len(z), dtype=torch.long)
    slopes = accuracy_slopes(z, labels) if kind is None else uniformity_slopes(z, kind)
    eigenvalues = torch.linalg.eigvalsh(found)
    assert float(slopes.norm(dim=-1).max()) <= bound.slope * slack
    assert float(eigenvalues.abs().max()) <= bound.smoothness * slack
    assert float(-eigenvalues.min()) <= bound.concavity * slack + 1e-12
    assert float(found.diagonal(dim1=-2, dim2=-1).sum(-1).max()) <= bound.trace * slack
    h = torch.randn(200, classes, dtype=torch.float64, generator=generator)
    h /= h.norm(dim=-1, keepdim=True)
    for length in (1e-4, 0.3):
        change = torch.linalg.eigvalsh(hessians(z + length * h, kind) - found).abs().amax(-1)
        assert float(change.max()) / length <= bound.third * slack + 1e-9


def test_the_tight_constants_are_reached() -> None:
    tail = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    z = torch.stack([tail, torch.zeros_like(tail)], -1)
    h = torch.tensor([1.0, -1.0], dtype=torch.float64) / math.sqrt(2)
    curvature = torch.einsum("a,nab,b->n", h, hessians(z, None), h)
    assert float(curvature.max()) == pytest.approx(accuracy_constants(2).smoothness, rel=1e-5)
    # A step of 1/√2 along h changes the difference of the two logits by 1.
    third = curvature.diff() / (tail.diff() / math.sqrt(2))
    assert float(third.abs().max()) == pytest.approx(accuracy_constants(2).third, rel=1e-3)
    squared = torch.einsum("a,nab,b->n", h, hessians(z, "square"), h)
    assert float(-squared.min()) == pytest.approx(uniformity_constants("square", 2).concavity, rel=1e-4)
