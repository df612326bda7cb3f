"""The Gaussian mechanism: the exact condition against its definition, and the noise that follows from it."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import kstest, norm

from mxd.privacy.gaussian import add_noise, indistinguishability, noise_scale


def excess_by_definition(epsilon: float, distance: float) -> float:
    """∫ max(0, p − e^ε q) for two unit Gaussians, in the direction in which they differ."""

    def excess(x: float) -> float:
        return max(0.0, float(norm.pdf(x - distance) - math.exp(epsilon) * norm.pdf(x)))

    kink = epsilon / distance + distance / 2
    return float(quad(excess, kink, kink + 40, limit=200)[0])


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("distance", [0.05, 0.4, 2.0])
def test_indistinguishability_is_the_largest_excess(epsilon: float, distance: float) -> None:
    expected = excess_by_definition(epsilon, distance)
    assert indistinguishability(epsilon, distance) == pytest.approx(expected, rel=1e-6, abs=1e-13)


def test_two_equal_distributions_are_the_same() -> None:
    assert indistinguishability(1.0, 0.0) == 0.0
    assert noise_scale(epsilon=1.0, delta=1e-5, sensitivity=0.0) == 0.0


@settings(deadline=None, max_examples=25)
@given(st.floats(0.01, 20), st.floats(1e-12, 0.5), st.floats(1e-9, 1e6))
def test_noise_is_enough_and_no_more(epsilon: float, delta: float, sensitivity: float) -> None:
    sigma = noise_scale(epsilon=epsilon, delta=delta, sensitivity=sensitivity)
    assert indistinguishability(epsilon, sensitivity / sigma) <= delta
    assert indistinguishability(epsilon, sensitivity / sigma * (1 + 1e-6)) > delta


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 0.99), st.floats(1e-12, 0.1))
def test_noise_is_less_than_the_classical_form_where_that_is_proved(epsilon: float, delta: float) -> None:
    classical = math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    assert noise_scale(epsilon=epsilon, delta=delta, sensitivity=1.0) <= classical


def test_the_classical_form_fails_for_large_epsilon() -> None:
    epsilon, delta = 20.0, 1e-3
    classical = math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    assert indistinguishability(epsilon, 1 / classical) > delta
    assert noise_scale(epsilon=epsilon, delta=delta, sensitivity=1.0) > classical


def test_noise_grows_with_the_distance_that_it_hides() -> None:
    one, two = (noise_scale(epsilon=1.0, delta=1e-5, sensitivity=s) for s in (1.0, 2.0))
    assert two == pytest.approx(2 * one)
    assert one == pytest.approx(3.7306, abs=1e-4)


@pytest.mark.parametrize(
    ("epsilon", "delta", "sensitivity", "named"),
    [
        (0.0, 0.1, 1.0, "epsilon"),
        (math.inf, 0.1, 1.0, "epsilon"),
        (1.0, 0.0, 1.0, "delta"),
        (1.0, 1.0, 1.0, "delta"),
        (1.0, 0.1, -1.0, "sensitivity"),
        (1.0, 0.1, math.nan, "sensitivity"),
    ],
)
def test_numbers_that_say_nothing_are_refused(epsilon: float, delta: float, sensitivity: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        noise_scale(epsilon=epsilon, delta=delta, sensitivity=sensitivity)


def test_noise_has_its_scale_and_is_repeatable_only_on_request() -> None:
    weights = torch.full((200, 100), 3.0, dtype=torch.float64)
    noisy = add_noise(weights, 0.5, seed=1)
    assert float((noisy - weights).std()) == pytest.approx(0.5, rel=0.02)
    assert float((noisy - weights).mean()) == pytest.approx(0.0, abs=0.02)
    assert bool((noisy == add_noise(weights, 0.5, seed=1)).all())
    assert not bool((add_noise(weights, 0.5, seed=None) == add_noise(weights, 0.5, seed=None)).any())
    assert bool((weights == 3.0).all())
    rounded = add_noise(weights.float(), 0.5, seed=1)
    assert rounded.dtype == torch.float32
    assert bool((rounded == noisy.float()).all())


def test_secret_noise_has_128_bits_of_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, asked = torch.zeros(3, 2, dtype=torch.float64), list[int]()

    def drawing(key: int) -> Callable[[int], int]:
        def draw(bits: int) -> int:
            asked.append(bits)
            return key

        return draw

    found: list[bytes] = []
    # Two keys whose low 32 bits, all that PyTorch's generator on the CPU keeps of its seed, are the same.
    for key in (5, 5 + 2**32, 5 + 2**64, 5 + 2**127, 5):
        monkeypatch.setattr("secrets.randbits", drawing(key))
        found.append(add_noise(weights, 1.0, seed=None).numpy().tobytes())
    assert len(set(found)) == 4
    assert found[0] == found[-1]
    assert asked == [128] * 5
    expected = np.random.Generator(np.random.Philox(key=5)).standard_normal((3, 2))
    assert found[0] == expected.tobytes()


def test_secret_noise_is_gaussian_and_of_the_weights_shape() -> None:
    weights = torch.full((100, 100), 3.0, requires_grad=True)
    noisy = add_noise(weights, 0.5, seed=None)
    assert noisy.shape == weights.shape
    assert noisy.dtype == torch.float32
    # Fails by chance once in a million runs.
    assert float(kstest((noisy.double().flatten() - 3) / 0.5, "norm").pvalue) > 1e-6
    assert add_noise(torch.tensor(1.0), 0.5, seed=None).shape == ()
