"""How much Gaussian noise makes two outputs that lie a known distance apart hard to tell apart."""

import math
import secrets

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import log_ndtr
from torch import Tensor

_UNIT = 2.0**-53
_BISECTIONS = 200
_SAFETY = 1 + 1e-12
"""Makes up for the rounding of Δ/σ, which δ multiplies by some tens."""


def indistinguishability(epsilon: float, distance: float) -> float:
    r"""Return the smallest δ for which N(a, I) and N(b, I) with ‖a − b‖ = `distance` are (ε, δ)-indistinguishable.

    $$\delta(\varepsilon) = \Phi(r/2 - \varepsilon/r) - e^{\varepsilon}\,\Phi(-r/2 - \varepsilon/r)$$

    with $r$ the distance in units of the noise (Balle and Wang, 2018, theorem 8). It is the largest excess
    $P(S) - e^\varepsilon Q(S)$ over all sets S, and grows with $r$. What rounding may have taken off is added.

    Args:
        epsilon: ε, at least 0.
        distance: r, at least 0.
    """
    if distance <= 0:
        return 0.0
    above = math.exp(float(log_ndtr(distance / 2 - epsilon / distance)))
    below = math.exp(epsilon + float(log_ndtr(-distance / 2 - epsilon / distance)))
    return max(above - below, 0.0) + 16 * _UNIT * (above + below)


def noise_scale(*, epsilon: float, delta: float, sensitivity: float) -> float:
    """Return the smallest σ whose noise N(0, σ²I) hides a shift of up to `sensitivity`.

    The analytic Gaussian mechanism: bisection on the exact condition of Balle and Wang (2018), for every ε > 0; the
    better known σ = Δ √(2 ln(1.25/δ)) / ε is proved for ε < 1 only, and larger. The end of the last interval at which
    the condition holds is returned, so rounding errs towards more noise.

    Args:
        epsilon: ε, above 0.
        delta: δ, strictly between 0 and 1.
        sensitivity: Δ, the largest distance between the two outputs; 0 needs no noise.

    Raises:
        ValueError: If a number lies outside its range or is not finite.
    """
    check_budget(epsilon, delta)
    if not (math.isfinite(sensitivity) and sensitivity >= 0):
        raise ValueError(f"sensitivity must be a finite number of at least 0; got {sensitivity}.")
    if sensitivity == 0:
        return 0.0
    low, high = 1.0, 1.0
    while indistinguishability(epsilon, low) > delta:
        low /= 2
    while indistinguishability(epsilon, high) <= delta:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        low, high = (middle, high) if indistinguishability(epsilon, middle) <= delta else (low, middle)
    return sensitivity / low * _SAFETY


def check_budget(epsilon: float, delta: float) -> None:
    """Refuse an ε or δ that says nothing.

    Raises:
        ValueError: If ε is not a finite number above 0, or δ does not lie strictly between 0 and 1.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be a finite number above 0; got {epsilon}.")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie strictly between 0 and 1; got {delta}.")


def add_noise(weights: Float[Tensor, "*shape"], sigma: float, *, seed: int | None) -> Float[Tensor, "*shape"]:
    """Return the weights plus N(0, σ²I), drawn and added in float64 on the CPU, then rounded to the weights' dtype.

    Args:
        weights: What is to be released; left as it is.
        sigma: σ, at least 0.
        seed: With None the noise is secret: NumPy's Philox generator, its whole key of 128 bits drawn from the
            operating system. (PyTorch's generator on the CPU keeps 32 bits of its seed, so that all its noises could be
            tried.) A number makes the noise repeatable, for experiments only: who knows or guesses it subtracts the
            noise, and nothing is hidden.
    """
    if seed is None:
        secret = np.random.Generator(np.random.Philox(key=secrets.randbits(128)))
        noise = torch.from_numpy(secret.standard_normal(tuple(weights.shape)))
    else:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(weights.shape, dtype=torch.float64, generator=generator)
    return (weights.detach().cpu().double() + sigma * noise).to(weights)
