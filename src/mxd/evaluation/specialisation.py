"""How much of a mixture's prediction needs its experts to differ."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.evaluation.sampling import evenly_spaced
from mxd.metrics import in_float64


class Specialisation(NamedTuple):
    """The share of a prediction's variance that is lost when the experts' direction is taken away."""

    scalar_gain: float
    """Lost against one expert of the best direction whose loudness is free on each token."""
    constant_gain: float
    """Lost against one expert of the best direction, always equally loud; never below `scalar_gain`."""


class _Fit(NamedTuple):
    direction: Float[Tensor, " d_out"]
    bias: Float[Tensor, " d_out"]
    error: float


class _Problem:
    """Least squares of y_t on s_t (g ∘ q_t) + b, in matrix-vector products only."""

    def __init__(self, y: Float[Tensor, "tokens d_out"], q: Float[Tensor, "tokens d_out"]) -> None:
        self.y, self.q, self.yq, self.qq = y, q, y * q, q * q

    def fit_direction(self, gains: Float[Tensor, " tokens"]) -> _Fit:
        """Return the best g and b for these gains: a simple regression of each output on s_t q_t."""
        tokens = len(gains)
        mean = gains @ self.q / tokens
        y_mean = self.y.mean(0)
        covariance = gains @ self.yq / tokens - mean * y_mean
        variance = gains.square() @ self.qq / tokens - mean.square()
        # An output whose regressor is constant to rounding is fitted by its bias alone.
        constant = variance <= torch.finfo(variance.dtype).eps * tokens * mean.square()
        direction = torch.where(constant, 0, covariance / torch.where(constant, 1, variance))
        bias = y_mean - direction * mean
        return _Fit(direction, bias, self.error(gains, direction, bias))

    def fit_gains(self, fit: _Fit) -> Float[Tensor, " tokens"]:
        """Return the best s for this g and b; 0 where the expert is silent."""
        overlap = self.yq @ fit.direction - self.q @ (fit.direction * fit.bias)
        energy = self.qq @ fit.direction.square()
        return torch.where(energy > 0, overlap / torch.where(energy > 0, energy, 1), 0)

    def error(
        self, gains: Float[Tensor, " tokens"], direction: Float[Tensor, " d_out"], bias: Float[Tensor, " d_out"]
    ) -> float:
        """Return Σ‖y_t − (s_t (g ∘ q_t) + b)‖²."""
        residual = torch.addcmul(self.y - bias, self.q * direction, gains[:, None], value=-1)
        return residual.square().sum().item()


def specialisation(
    prediction: Float[Tensor, "tokens d_out"],
    dense: Float[Tensor, "tokens d_out"],
    base: Float[Tensor, "tokens d_out"] | None = None,
    *,
    max_tokens: int = 8192,
    max_iterations: int = 300,
    tolerance: float = 1e-7,
) -> Specialisation:
    r"""Return how far the experts of a layer with predictions y_t = w_t ∘ q_t + b disagree.

    $$\min_{g, s, b} \sum_t \|y_t - (s_t (g \circ q_t) + b)\|^2 \Big/ \sum_t \|y_t - \bar y\|^2$$

    It is 0 when one expert, at most louder here than there, would have predicted the same, as it does for a
    layer that only copies the MLP; a faithful layer with a value near 0 explains nothing. The constant gain
    is the exact optimum with s = 1. From there g with b, and s, are refitted in turn, each exactly, in
    float64: the error never rises, and ends in a stationary point that need not be the global optimum, so
    `scalar_gain` is an upper bound. Each token has a gain of its own: take many tokens, and widths well above 1.

    Args:
        prediction: y, the layer's predictions.
        dense: q, the dense branch that the experts modulate: z(x) D for a mixture of decoders.
        base: What the prediction holds beside them, such as a shared expert's part; it keeps its place, so a layer that
            leaves most of the variance to it has little to lose, and one whose two parts cancel may lose more than 1.
        max_tokens: Of more tokens than this, this many are used, evenly spaced from first to last.
        max_iterations: Rounds at most.
        tolerance: Stop when a round lowers the error by less than this share.

    Returns:
        Both gains. A prediction that does not vary (to float32's rounding) has nothing to lose: 0.
    """
    if len(prediction) > max_tokens:
        chosen = evenly_spaced(len(prediction), max_tokens)
        prediction, dense = prediction[chosen.to(prediction.device)], dense[chosen.to(dense.device)]
        base = None if base is None else base[chosen.to(base.device)]
    y, q = in_float64(prediction.detach()), in_float64(dense.detach())
    if len(y) == 0:
        return Specialisation(0.0, 0.0)
    energy = y.square().sum().item()
    variance = (y - y.mean(0)).square().sum().item()
    y = y if base is None else y - in_float64(base.detach())
    # Centring changes b only, and keeps the differences of sums exact.
    y = y - y.mean(0)
    if variance <= torch.finfo(torch.float64).eps * energy:
        return Specialisation(0.0, 0.0)
    scale = q.square().mean().sqrt()
    problem = _Problem(y, q / torch.where(scale > 0, scale, 1))

    best = problem.fit_direction(torch.ones_like(y[:, 0]))
    constant_gain = best.error / variance
    iterations = 0
    settled = False
    while not settled and iterations < max_iterations:
        iterations += 1
        fit = problem.fit_direction(problem.fit_gains(best))
        settled = best.error - fit.error <= tolerance * best.error
        # At the optimum rounding may raise the error by a last bit.
        best = fit if fit.error < best.error else best
    return Specialisation(best.error / variance, constant_gain)
