r"""What uncertainty on the protected examples costs on the retained ones: bounds that are proved, both ways.

$\alpha(w) = L_A(w)$ is the mean cross-entropy on the retained examples, $w_*$ any reference model (the pretrained one),
$w_\theta$ the exact minimiser of $M_\theta$. The proofs are in docs/privacy_certificate.md; the form and constants of
the paper's own theorem could not be reconstructed (Ashiq et al., 2025), and none of them is used.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.privacy.logistic import LogisticConstants, LogisticObjective, require_strong_convexity
from mxd.privacy.objective import Uniformity, accuracy_loss, uniformity_loss

_SCALES = 41
_BISECTIONS = 100


class UtilityBound(NamedTuple):
    """Bounds on α(w_θ) − α(w_*), the rise of retained cross-entropy, in nats, and on the uncertainty gained."""

    reference: float
    """α(w_*), measured."""
    distance: float
    """‖∇M_θ(w_*)‖ / m, an upper bound on ‖w_θ − w_*‖."""
    stability: float
    """The rise is at most ‖∇α(w_*)‖ r + β r²/2, with r the distance: small where θ is small."""
    scaling: float
    """The rise is at most what shrinking w_* to the best multiple of it allows; at most ln Y − α(w_*)."""
    lower: float
    """The rise is at least this: by convexity no less than −‖∇α(w_*)‖ r, and α cannot fall below 0."""
    uniformity: float
    """L_K(w_θ) is at most this."""
    confidence_distance: float
    """The mean confidence distance of w_θ on the protected examples is at most this."""

    @property
    def upper(self) -> float:
        """The rise is at most this: the smaller of the two upper bounds."""
        return min(self.stability, self.scaling)

    @property
    def change(self) -> float:
        """|α(w_θ) − α(w_*)| is at most this."""
        return max(self.upper, -self.lower)


def utility_bound(
    problem: LogisticObjective, constants: LogisticConstants, reference: Float[Tensor, " p"]
) -> UtilityBound:
    """Bound what w_θ costs in accuracy and gains in uncertainty, from the reference model alone: w_θ is not computed.

    Args:
        problem: The objective and its data.
        constants: Those of `logistic_constants(problem)`.
        reference: w_*, whatever it was trained for.

    Raises:
        ValueError: If λ is not above the smallest one that certifies.
    """
    require_strong_convexity(problem, constants)
    theta, decay, k = problem.config.theta, problem.config.weight_decay, problem.num_classes
    retained, protected = problem.retained @ problem.matrix(reference), problem.protected @ problem.matrix(reference)
    before = float(accuracy_loss(retained, problem.labels))
    slope = float(problem.accuracy_gradient(reference).norm())
    distance = float(problem.gradient(reference).norm()) / constants.strong_convexity
    best_objective = math.inf
    for scale in torch.linspace(0, 1, _SCALES).tolist():
        loss = float(accuracy_loss(scale * retained, problem.labels))
        uniform = float(uniformity_loss(scale * protected, problem.config.uniformity))
        norm = decay / 2 * scale**2 * float(reference @ reference)
        best_objective = min(best_objective, theta * uniform + (1 - theta) * loss + norm)
    return UtilityBound(
        reference=before,
        distance=distance,
        stability=slope * distance + constants.accuracy_smoothness * distance**2 / 2,
        scaling=best_objective / (1 - theta) - before,
        lower=-min(slope * distance, before),
        uniformity=best_objective / theta,
        confidence_distance=largest_confidence_distance(best_objective / theta, problem.config.uniformity, k),
    )


def noise_cost(sigma: float, trace: float, mean_square: float) -> float:
    """Return what noise N(0, σ²I) on W adds at most to a mean loss, on average: σ²/2 · trace · mean ‖x‖².

    Args:
        sigma: σ.
        trace: Largest trace of the loss's second derivative in the logits (`LogitConstants.trace`).
        mean_square: Mean ‖x‖² over the examples, the constant 1 included.
    """
    return sigma**2 / 2 * trace * mean_square


def largest_confidence_distance(uniformity: float, kind: Uniformity, num_classes: int) -> float:
    """Return the largest mean confidence distance, mean of max_c p_c − 1/Y, that a mean L_K leaves possible.

    For the two divergences by data processing: merging all classes but the most probable one cannot raise a divergence,
    so L_K is at least that of two Bernoulli variables, which is convex in the distance (Jensen). For the square,
    max_c (p_c − 1/Y) ≤ √(1 − 1/Y) ‖p − U‖.

    Args:
        uniformity: The mean of L_K over the examples.
        kind: Which distance L_K is.
        num_classes: Y.
    """
    u, most = 1 / num_classes, 1 - 1 / num_classes
    if kind == "square":
        return min(math.sqrt(2 * max(uniformity, 0) * most), most)

    def divergence(distance: float) -> float:
        q = u + distance
        p, q = (u, q) if kind == "kl-u-p" else (q, u)
        return sum(a * math.log(a / b) if b > 0 else math.inf for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)

    low, high = 0.0, most
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) <= uniformity else (low, middle)
    return high
