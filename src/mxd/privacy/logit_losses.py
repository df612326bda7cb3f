r"""The losses of a softmax as functions of its logits: slopes, curvatures, and constants proved for them.

With $p = \mathrm{softmax}(z)$ and $\tilde h = h - (p \cdot h)\,1$, each loss here has a second derivative of one form,

$$\nabla^2\ell[h, h] = \sum_c w_c \tilde h_c^2,$$

and is told from the others by its weights $w(p)$. The proofs of all constants are in `docs/privacy_certificate.md`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mxd.privacy.objective import Uniformity


class LogitConstants(NamedTuple):
    """What holds for a loss of the logits z at every z, in the Euclidean norm of z."""

    slope: float
    """Largest ‖∇ℓ‖."""
    smoothness: float
    """Largest |∇²ℓ[h, h]| over ‖h‖ = 1: the gradient's Lipschitz constant."""
    concavity: float
    """Largest −∇²ℓ[h, h] over ‖h‖ = 1; 0 for a convex loss."""
    third: float
    """Largest |∇³ℓ[h, h, h]| over ‖h‖ = 1: the Hessian's Lipschitz constant."""
    trace: float
    """Largest trace of ∇²ℓ."""


_CUMULANT = math.sqrt(6) / 9
"""Largest third central moment of a variable whose values, as a vector, have length 1: (√2)³ / (6√3)."""


def accuracy_constants(num_classes: int) -> LogitConstants:
    """Return the constants of the cross-entropy with any one label."""
    return LogitConstants(math.sqrt(2), 0.5, 0.0, _CUMULANT, 1 - 1 / num_classes)


def uniformity_constants(kind: Uniformity, num_classes: int) -> LogitConstants:
    """Return the constants of a distance to uniform over `num_classes` classes, of which there are at least two."""
    spread, log = 1 - 1 / num_classes, math.log(num_classes)
    if kind == "kl-u-p":
        return LogitConstants(math.sqrt(spread), 0.5, 0.0, _CUMULANT, spread)
    if kind == "square":
        third = math.sqrt(2) + 1.5 + _CUMULANT
        return LogitConstants(math.sqrt(spread) / 2, 0.5, 1 / 12, third, 0.25)
    third = 2 * _CUMULANT + math.sqrt(2) * (log + math.log(2)) + 1.5 * math.sqrt(2) * log
    concavity = (math.log(4 * num_classes) - 1) / 2
    return LogitConstants(math.sqrt(2) * log, (1 + log) / 2, concavity, third, spread)


def accuracy_slopes(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, "batch classes"]:
    """Return ∂ℓ/∂z of the cross-entropy: p less one at the label."""
    p = logits.softmax(-1)
    return p.scatter_add(-1, labels[:, None], -torch.ones_like(p[:, :1]))


def uniformity_slopes(logits: Float[Tensor, "batch classes"], kind: Uniformity) -> Float[Tensor, "batch classes"]:
    """Return ∂ℓ/∂z of a distance to uniform."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    if kind == "kl-u-p":
        return p - 1 / p.shape[-1]
    if kind == "square":
        return p * (p - p.square().sum(-1, keepdim=True))
    return p * (log_p - (p * log_p).sum(-1, keepdim=True))


def uniformity_weights(logits: Float[Tensor, "batch classes"], kind: Uniformity) -> Float[Tensor, "batch classes"]:
    """Return the weights w(p) of a distance's second derivative; those of KL(U‖p) are the cross-entropy's."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    if kind == "kl-u-p":
        return p
    if kind == "square":
        return p * (2 * p - p.square().sum(-1, keepdim=True))
    return p * (1 + log_p - (p * log_p).sum(-1, keepdim=True))


def curvature_product(
    p: Float[Tensor, "batch classes"], weights: Float[Tensor, "batch classes"], h: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch classes"]:
    """Return ∇²ℓ h for each row, from the probabilities and the weights of its loss."""
    scaled = weights * (h - (p * h).sum(-1, keepdim=True))
    return scaled - p * scaled.sum(-1, keepdim=True)


def curvature_entry(
    p: Float[Tensor, "batch classes"], weights: Float[Tensor, "batch classes"], row: int, column: int
) -> Float[Tensor, " batch"]:
    """Return one entry of ∇²ℓ for each row: w_a [a = b] − w_a p_b − p_a w_b + p_a p_b Σ_c w_c."""
    entry = p[:, row] * p[:, column] * weights.sum(-1) - weights[:, row] * p[:, column] - p[:, row] * weights[:, column]
    return entry + weights[:, row] if row == column else entry
