"""The privacy-utility bound: it holds on random problems, and where it should be small it is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.privacy.gaussian import add_noise
from mxd.privacy.logistic import LogisticObjective, logistic_constants
from mxd.privacy.measures import confidence_distances
from mxd.privacy.newton import minimise
from mxd.privacy.objective import Uniformity, accuracy_loss, uniformity_loss
from mxd.privacy.utility_bound import largest_confidence_distance, noise_cost, utility_bound
from tests.logistic_problems import KINDS, problem, random_problem


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.floats(0, 5))
def test_the_bounds_hold(seed: int, kind: Uniformity, spread: float) -> None:
    made = random_problem(seed, kind)
    generator = torch.Generator().manual_seed(seed + 2)
    reference = spread * torch.randn(made.num_parameters, dtype=torch.float64, generator=generator)
    bound = utility_bound(made, logistic_constants(made), reference)
    exact = minimise(made, reference)
    protected, retained = made.protected @ made.matrix(exact), made.retained @ made.matrix(exact)
    loss, before = float(accuracy_loss(retained, made.labels)), bound.reference
    assert float((exact - reference).norm()) <= bound.distance + 1e-9
    for upper in (bound.stability, bound.scaling):
        assert loss - before <= upper + 1e-9
    assert bound.lower - 1e-9 <= loss - before
    assert abs(loss - before) <= bound.change + 1e-9
    uniform = float(uniformity_loss(protected, kind))
    assert uniform <= bound.uniformity + 1e-9
    assert uniform <= (1 - made.config.theta) / made.config.theta * math.log(made.num_classes)
    assert float(confidence_distances(protected).mean()) <= bound.confidence_distance + 1e-9


def test_the_bounds_are_not_empty() -> None:
    small = problem(theta=1e-4, decay=0.5)
    plain = minimise(problem(theta=1e-9, decay=0.5), torch.zeros(small.num_parameters, dtype=torch.float64))
    bound = utility_bound(small, logistic_constants(small), plain)
    assert bound.upper < 1e-3
    large = problem(theta=0.99, decay=0.5)
    bound = utility_bound(large, logistic_constants(large), plain)
    assert bound.scaling <= math.log(3) - bound.reference + 1e-9
    assert bound.confidence_distance < 0.11


def test_a_weight_decay_that_is_too_small_is_named() -> None:
    made = problem(kind="kl-p-u", decay=0.01)
    with pytest.raises(ValueError, match="smallest that certifies"):
        utility_bound(made, logistic_constants(made), torch.zeros(made.num_parameters, dtype=torch.float64))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(KINDS), st.integers(2, 9), st.floats(0.1, 10), st.integers(0, 10**6))
def test_uniformity_bounds_confidence(kind: Uniformity, classes: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(6, classes, dtype=torch.float64, generator=generator)
    most = largest_confidence_distance(float(uniformity_loss(logits, kind)), kind, classes)
    assert float(confidence_distances(logits).mean()) <= most + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_the_confidence_bound_is_reached_by_one_class_above_equals(kind: Uniformity) -> None:
    logits = torch.tensor([[1.3, 0.0, 0.0, 0.0]], dtype=torch.float64)
    most = largest_confidence_distance(float(uniformity_loss(logits, kind)), kind, 4)
    assert most == pytest.approx(float(confidence_distances(logits)[0]), rel=1e-9)
    assert largest_confidence_distance(0.0, kind, 4) == pytest.approx(0.0, abs=1e-7)
    assert largest_confidence_distance(1e9, kind, 4) == pytest.approx(0.75)


@pytest.mark.parametrize("target", [0.01, 0.5])
def test_theta_for_a_target_uniformity_reaches_it(target: float) -> None:
    theta = math.log(3) / (math.log(3) + target)
    made = problem(theta=theta, decay=1e-3)
    exact = minimise(made, torch.zeros(made.num_parameters, dtype=torch.float64))
    assert float(uniformity_loss(made.protected @ made.matrix(exact), "kl-u-p")) <= target
    assert (1 - theta) / theta * math.log(3) == pytest.approx(target)


@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_noise_costs_no_more_than_is_said(sigma: float) -> None:
    made = problem(classes=4)
    constants = logistic_constants(made)
    w = torch.randn(made.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def losses(made: LogisticObjective, v: torch.Tensor) -> tuple[float, float]:
        W = made.matrix(v)
        return float(accuracy_loss(made.retained @ W, made.labels)), float(
            uniformity_loss(made.protected @ W, "kl-u-p")
        )

    noisy = torch.tensor([losses(made, add_noise(w, sigma, seed=seed)) for seed in range(400)])
    rise = noisy.mean(0) - torch.tensor(losses(made, w))
    error = noisy.std(0) / 20
    costs = [
        noise_cost(sigma, constants.accuracy.trace, constants.retained_square),
        noise_cost(sigma, constants.uniformity.trace, float(made.protected.square().sum(1).mean())),
    ]
    for measured, uncertain, most in zip(rise.tolist(), error.tolist(), costs, strict=True):
        assert -4 * uncertain <= measured <= most + 4 * uncertain
