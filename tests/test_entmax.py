"""Entmax: the gate of multilinear mixtures, beside the package of its authors."""

import pytest
import torch
from entmax import entmax15 as their_entmax15
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.multilinear import entmax15
from mxd.multilinear.entmax import find_threshold
from tests.tensors import assert_near


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.floats(0.01, 50.0), st.integers(0, 10_000))
def test_entmax_is_the_packages_and_its_equation_holds(width: int, scale: float, seed: int) -> None:
    scores = scale * torch.randn(7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = entmax15(scores)
    assert_near(found, their_entmax15(scores, dim=-1), 1e-9)
    assert_near(found.sum(-1), torch.ones(7, dtype=torch.float64), 1e-13)
    assert (found >= 0).all()
    # Every positive coefficient is (s/2 − τ)² for one τ, which no score of a zero passes.
    for row, given_scores in zip(found, scores, strict=True):
        thresholds = (given_scores / 2 - row.sqrt())[row > 0]
        assert_near(thresholds, thresholds[:1].expand_as(thresholds), 1e-9 * max(1.0, scale))
        assert (given_scores[row == 0] / 2 <= thresholds[0] + 1e-9 * max(1.0, scale)).all()


def hard_scores() -> dict[str, Tensor]:
    """Scores that take Newton's method many rounds."""
    generator = torch.Generator().manual_seed(0)
    scores = {"equal": torch.zeros(1, 65_536), "apart": 1e4 * torch.randn(40, 300, generator=generator)}
    scores["just above"] = torch.cat([torch.zeros(1, 1), torch.full((1, 4095), -2 + 1e-3)], -1)
    # Ever fewer scores, ever higher above where the rounds begin: each round is slowed down by the next of them.
    ladder = [torch.full((4**step,), -2 + 2 ** (2.0 - step)) for step in range(8, 1, -1)]
    scores["ladder"] = torch.cat([torch.zeros(1), *ladder])[None]
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", hard_scores())
def test_a_fixed_number_of_rounds_finds_the_same_threshold(name: str, dtype: torch.dtype) -> None:
    halves = hard_scores()[name].to(dtype) / 2
    halves = halves - halves.amax(-1, keepdim=True)
    asked, fixed = (find_threshold(halves, ask=ask) for ask in (True, False))
    torch.testing.assert_close(fixed, asked, rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert_near((halves - fixed).clamp_min(0).square().sum(-1).double(), torch.ones(len(halves)).double(), 1e-4)


def test_a_fixed_number_of_rounds_reads_nothing() -> None:
    # Nothing can be read of this device.
    halves = torch.zeros(2, 3, device="meta")
    assert find_threshold(halves, ask=False).shape == (2, 1)
    with pytest.raises(RuntimeError, match="meta"):
        find_threshold(halves, ask=True)


def test_entmax_has_the_packages_gradient_and_that_of_finite_differences() -> None:
    drawn = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores, weights = (2 * drawn).requires_grad_(), drawn.flip(0)
    (gradient,) = torch.autograd.grad((entmax15(scores) * weights).sum(), scores)
    (expected,) = torch.autograd.grad((their_entmax15(scores, dim=-1) * weights).sum(), scores)
    assert_near(gradient, expected, 1e-10)
    assert torch.autograd.gradcheck(entmax15, (scores,), eps=1e-7, atol=1e-6)
    single = entmax15(torch.tensor([[1e4, -1e4, 0.0]]))
    assert single.tolist() == [[1.0, 0.0, 0.0]]
