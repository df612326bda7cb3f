import itertools

import pytest
import torch
from torch import Tensor

from mxd.evaluation.specialisation import specialisation


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mixture(tokens: int, d_out: int, *, disagreement: float = 1.0) -> tuple[Tensor, Tensor]:
    """A prediction and dense branch whose experts share one direction up to `disagreement`."""
    q = normal(tokens, d_out) + 0.3 * normal(d_out)
    experts = normal(d_out) + disagreement * normal(12, d_out)
    code = torch.rand(tokens, 12, dtype=torch.float64) * (torch.rand(tokens, 12) < 0.3)
    return (code @ experts) * q + normal(d_out), q


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("loudness", ["positive", "signed", "heavy-tailed"])
def test_is_zero_when_all_experts_agree(loudness: str) -> None:
    s = {"positive": torch.rand(300).double() + 0.5, "signed": normal(300), "heavy-tailed": normal(300).exp()}[loudness]
    q = normal(300, 16) + 0.3
    result = specialisation(s[:, None] * (normal(16) * q) + 5 * normal(16), q)
    assert result.scalar_gain < 1e-8
    assert result.constant_gain > 0.01


def test_a_constant_gain_of_one_direction_is_no_specialisation_either() -> None:
    q = normal(300, 16)
    result = specialisation(normal(16) * q + normal(16), q)
    assert result.scalar_gain <= result.constant_gain < 1e-12


@pytest.mark.parametrize("disagreement", [0.01, 0.3, 1.0, 10.0])
def test_taking_more_away_never_loses_less(disagreement: float) -> None:
    result = specialisation(*mixture(400, 12, disagreement=disagreement))
    assert 0 < result.scalar_gain <= result.constant_gain <= 1


def test_grows_with_disagreement() -> None:
    losses = [specialisation(*mixture(400, 12, disagreement=d)).scalar_gain for d in (0.01, 0.1, 1.0)]
    assert losses == sorted(losses)
    assert losses[0] < 1e-3


def test_does_not_depend_on_units() -> None:
    y, q = mixture(300, 10)
    expected = specialisation(y, q)
    # The same layer, written with another scale of each output's dense branch and another output bias.
    rescaled = specialisation(1e3 * y + normal(10), q * normal(10).exp())
    assert rescaled.scalar_gain == pytest.approx(expected.scalar_gain, rel=1e-5)
    assert rescaled.constant_gain == pytest.approx(expected.constant_gain, rel=1e-9)


def test_the_error_never_rises() -> None:
    y, q = mixture(200, 6, disagreement=3.0)
    losses = [specialisation(y, q, max_iterations=n).scalar_gain for n in range(30)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[0] == specialisation(y, q).constant_gain


def error_by_gradient_descent(y: Tensor, q: Tensor) -> float:
    g, s, b = (normal(n).requires_grad_() for n in (y.shape[1], y.shape[0], y.shape[1]))
    optimiser = torch.optim.LBFGS([g, s, b], max_iter=1000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    variance = (y - y.mean(0)).square().sum()

    def error() -> Tensor:
        return (y - s[:, None] * g * q - b).square().sum() / variance

    def closure() -> float:
        optimiser.zero_grad()
        loss = error()
        torch.autograd.backward(loss)
        return loss.item()

    optimiser.step(closure)
    return error().item()


@pytest.mark.parametrize("trial", range(4))
def test_reaches_what_gradient_descent_reaches(trial: int) -> None:
    torch.manual_seed(trial)
    y, q = mixture(30, 4, disagreement=0.5)
    best = min(error_by_gradient_descent(y, q) for _ in range(4))
    result = specialisation(y, q, max_iterations=5000, tolerance=1e-10)
    assert result.scalar_gain == pytest.approx(best, rel=1e-4)


def test_a_prediction_that_does_not_vary_has_nothing_to_lose() -> None:
    constant = torch.randn(8).expand(50, 8).contiguous()
    for y, q in ((constant, torch.randn(50, 8)), (torch.zeros(50, 8), torch.zeros(50, 8))):
        assert specialisation(y, q) == (0.0, 0.0)
    assert specialisation(torch.zeros(0, 8), torch.zeros(0, 8)).scalar_gain == 0.0


def test_a_silent_dense_branch_loses_everything() -> None:
    assert specialisation(normal(50, 8), torch.zeros(50, 8).double()) == (1.0, 1.0)


def test_looks_at_a_bounded_number_of_tokens() -> None:
    y, q = mixture(1000, 5)
    chosen = torch.linspace(0, 999, 100, dtype=torch.float64).round().long()
    assert specialisation(y, q, max_tokens=100) == specialisation(y[chosen], q[chosen])
