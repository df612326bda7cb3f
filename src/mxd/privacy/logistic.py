r"""L2-regularised multinomial logistic regression: the objective in closed form, and constants proved for it.

The logits of an example are $W^\top x$. The last entry of every $x$ is 1, so the last row of W is the bias, which is
regularised like the rest: without that the objective would not be strongly convex, because adding one number to all
biases changes no prediction. All computation is in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mxd.privacy.certificate import rounded_up
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
from mxd.privacy.objective import ObjectiveConfig, objective

_UNIT = 2.0**-53
_BLOCK_ROWS = 8192


def with_constant(features: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d_in"]:
    """Return the features in float64 on the CPU, with a last column of ones, which stands for the bias."""
    return functional.pad(features.detach().cpu().double(), (0, 1), value=1.0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LogisticObjective:
    """M_θ of a logistic regression, with its derivatives; a `SmoothObjective` of W laid out row by row.

    Raises:
        ValueError: If a set is empty, a number is not finite, widths differ, or a label is no class.
    """

    protected: Float[Tensor, "num_protected d_protected"]
    """Features of the protected examples, in float64, the last column of ones (`with_constant`)."""
    retained: Float[Tensor, "num_retained d_in"]
    """Those of the retained examples."""
    labels: Int[Tensor, " num_labels"]
    """Classes of the retained examples."""
    num_classes: int
    """Number of classes, at least 2."""
    config: ObjectiveConfig
    """θ, λ and the distance to uniform."""

    def __post_init__(self) -> None:
        for name, rows in (("protected", self.protected), ("retained", self.retained)):
            if not len(rows):
                raise ValueError(f"the {name} set must hold at least one example; it is empty.")
            if not bool(rows.isfinite().all()):
                raise ValueError(
                    f"{name} features must be finite; some are NaN or infinite; remove or mend those rows."
                )
            if rows.dtype != torch.float64:
                raise ValueError(f"{name} features must be float64; got {rows.dtype}; see with_constant.")
        if self.protected.shape[1] != self.retained.shape[1]:
            raise ValueError(
                "protected and retained features must be equally wide; "
                f"got {self.protected.shape[1]} and {self.retained.shape[1]}."
            )
        check_labels(self.labels, len(self.retained), self.num_classes)

    @property
    def num_parameters(self) -> int:
        """Length of the flat W."""
        return self.retained.shape[1] * self.num_classes

    def matrix(self, w: Float[Tensor, " p"]) -> Float[Tensor, "d_in classes"]:
        """Return the flat parameters as W."""
        return w.view(-1, self.num_classes)

    def value(self, w: Float[Tensor, " p"]) -> float:
        """Return M_θ."""
        return float(
            objective(
                self.config,
                protected_logits=self.protected @ self.matrix(w),
                retained_logits=self.retained @ self.matrix(w),
                retained_labels=self.labels,
                parameters=[w],
            )
        )

    def gradient(self, w: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return ∇M_θ, λw included."""
        theta, W = self.config.theta, self.matrix(w)
        slopes = uniformity_slopes(self.protected @ W, self.config.uniformity)
        total = theta / len(self.protected) * self.protected.T @ slopes
        total += (1 - theta) * self.accuracy_gradient(w).view_as(W)
        return total.flatten() + self.config.weight_decay * w

    def accuracy_gradient(self, w: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return ∇L_A, the mean cross-entropy of the retained examples' alone."""
        slopes = accuracy_slopes(self.retained @ self.matrix(w), self.labels)
        return (self.retained.T @ slopes / len(self.retained)).flatten()

    def hessian_at(self, w: Float[Tensor, " p"]) -> Callable[[Float[Tensor, " p"]], Float[Tensor, " p"]]:
        """Return v ↦ ∇²M_θ(w) v, λv included."""
        curvatures = self._curvatures(w)

        def product(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
            total = self.config.weight_decay * v
            for x, p, weights in curvatures:
                total = total + (x.T @ curvature_product(p, weights, x @ self.matrix(v))).flatten()
            return total

        return product

    def hessian(self, w: Float[Tensor, " p"]) -> Float[Tensor, "p p"]:
        """Return ∇²M_θ, λI included: a block for each pair of classes, over `_BLOCK_ROWS` examples at a time."""
        d, k = self.retained.shape[1], self.num_classes
        blocks = torch.zeros(d, k, d, k, dtype=w.dtype)
        for whole, all_p, all_weights in self._curvatures(w):
            for x, p, weights in zip(
                whole.split(_BLOCK_ROWS), all_p.split(_BLOCK_ROWS), all_weights.split(_BLOCK_ROWS), strict=True
            ):
                for row in range(k):
                    for column in range(row + 1):
                        block = x.T @ (x * curvature_entry(p, weights, row, column)[:, None])
                        blocks[:, row, :, column] += block
                        if row != column:
                            blocks[:, column, :, row] += block
        hessian = blocks.view(d * k, d * k)
        hessian.diagonal().add_(self.config.weight_decay)
        return hessian

    def _curvatures(self, w: Float[Tensor, " p"]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return features, probabilities and curvature weights of both sets, the latter with θ/n and (1−θ)/n."""
        theta, W = self.config.theta, self.matrix(w)
        protected, retained = self.protected @ W, self.retained @ W
        p = retained.softmax(-1)
        weights = uniformity_weights(protected, self.config.uniformity)
        return [
            (self.protected, protected.softmax(-1), theta / len(protected) * weights),
            (self.retained, p, (1 - theta) / len(retained) * p),
        ]


class LogisticConstants(NamedTuple):
    """Constants of M_θ over all W, derived from the data's norms and second moments (docs/privacy_certificate.md).

    In floating point too each is an upper bound, and `strong_convexity` a lower one: they are rounded outwards.
    """

    largest_norm: float
    """R, the largest ‖x‖ of both sets, the constant 1 included."""
    protected_moment: float
    """Largest eigenvalue of the mean of x xᵀ over the protected examples."""
    retained_moment: float
    """The same over the retained examples."""
    retained_square: float
    """Mean ‖x‖² over the retained examples."""
    uniformity: LogitConstants
    """Constants of the distance to uniform in the logits."""
    accuracy: LogitConstants
    """Constants of the cross-entropy in the logits."""
    accuracy_slope: float
    """Largest ‖∇L_A‖."""
    uniformity_slope: float
    """Largest ‖∇L_K‖."""
    accuracy_smoothness: float
    """Largest eigenvalue of ∇²L_A."""
    smoothness: float
    """Lipschitz constant of ∇M_θ, λ included."""
    hessian_lipschitz: float
    """Lipschitz constant of ∇²M_θ in the spectral norm: ρ."""
    smallest_weight_decay: float
    """λ above which M_θ is strongly convex everywhere: 0 for KL(U‖p)."""
    strong_convexity: float
    """m = λ − `smallest_weight_decay`: no eigenvalue of ∇²M_θ is below it; above 0 it certifies."""
    minimiser_radius: float
    """Every minimiser of M_θ over all W has at most this norm: √(2 (1−θ) ln Y / λ)."""


def logistic_constants(problem: LogisticObjective) -> LogisticConstants:
    """Return the constants of a logistic regression's objective, rounded outwards; λ must be above 0."""
    theta, decay, k = problem.config.theta, problem.config.weight_decay, problem.num_classes
    if not decay > 0:
        raise ValueError("weight_decay must be above 0 for a certificate: with 0 nothing is strongly convex; got 0.")
    uniform, accurate = uniformity_constants(problem.config.uniformity, k), accuracy_constants(k)
    moments = [_largest_moment(rows) for rows in (problem.protected, problem.retained)]
    norms = [torch.linalg.vector_norm(rows, dim=1) for rows in (problem.protected, problem.retained)]
    radius = [float(norm.max()) * _above(problem.retained.shape[1]) for norm in norms]
    means = [float(norm.mean()) * _above(norm.numel() + problem.retained.shape[1]) for norm in norms]
    few = _above(16)
    needed = theta * uniform.concavity * moments[0] * few
    return LogisticConstants(
        largest_norm=max(radius),
        protected_moment=moments[0],
        retained_moment=moments[1],
        retained_square=_mean_square(problem.retained),
        uniformity=uniform,
        accuracy=accurate,
        accuracy_slope=accurate.slope * means[1] * few,
        uniformity_slope=uniform.slope * means[0] * few,
        accuracy_smoothness=accurate.smoothness * moments[1] * few,
        smoothness=few
        * (theta * uniform.smoothness * moments[0] + (1 - theta) * accurate.smoothness * moments[1] + decay),
        hessian_lipschitz=few
        * (theta * uniform.third * radius[0] * moments[0] + (1 - theta) * accurate.third * radius[1] * moments[1]),
        smallest_weight_decay=needed,
        # Where the two are close nearly all digits cancel: `needed` is an upper bound before they are subtracted.
        strong_convexity=math.nextafter(decay - needed, -math.inf),
        minimiser_radius=math.sqrt(2 * (1 - theta) * math.log(k) / decay) * few,
    )


def require_strong_convexity(problem: LogisticObjective, constants: LogisticConstants) -> None:
    """Refuse an objective that is not strongly convex by the derived constants.

    Raises:
        ValueError: If λ is not above the smallest one that certifies, which the sentence names.
    """
    if not constants.strong_convexity > 0:
        smallest = rounded_up(constants.smallest_weight_decay)
        raise ValueError(
            f"weight_decay must be above {smallest}, the smallest that certifies uniformity "
            f"{problem.config.uniformity} on these features; got {problem.config.weight_decay:g}; "
            "raise it, scale the features down, or take kl-u-p, which certifies with any."
        )


def gradient_rounding(problem: LogisticObjective, constants: LogisticConstants, w: Float[Tensor, " p"]) -> float:
    """Bound what rounding in float64 can have changed ∇M_θ(w) by, in any order of summation: first order, doubled.

    It is taken for granted that the processor's exp and log are right to a few units in the last place. The derivation
    is in docs/privacy_certificate.md.
    """
    logits, rows = _logit_rounding(problem, constants, w)
    classes, radius = problem.num_classes, constants.largest_norm
    smoothness = max(constants.uniformity.smoothness, constants.accuracy.smoothness)
    slope = max(constants.uniformity.slope, constants.accuracy.slope)
    slopes = smoothness * logits + (classes + 30) * _UNIT * (1 + 4 * math.log(classes))
    return 2 * (radius * (slopes + rows * _UNIT * slope) + 4 * _UNIT * problem.config.weight_decay * float(w.norm()))


def product_rounding(
    problem: LogisticObjective, constants: LogisticConstants, w: Float[Tensor, " p"], v: Float[Tensor, " p"]
) -> float:
    """Bound what rounding can have changed ∇²M_θ(w) v by, as `gradient_rounding` does for the gradient."""
    logits, rows = _logit_rounding(problem, constants, w)
    classes, d = problem.num_classes, problem.retained.shape[1]
    third = max(constants.uniformity.third, constants.accuracy.third)
    relative = (rows + d + 8 * (classes + 30)) * _UNIT * 4 * (1 + math.log(classes))
    curvature = constants.largest_norm**2 * (third * logits + relative)
    return 2 * (curvature + 4 * _UNIT * problem.config.weight_decay) * float(v.norm())


def _logit_rounding(
    problem: LogisticObjective, constants: LogisticConstants, w: Float[Tensor, " p"]
) -> tuple[float, int]:
    """Return a bound on the error of one example's logits, and the number of roundings in a sum over examples."""
    logits = (problem.retained.shape[1] + 4) * _UNIT * constants.largest_norm * float(w.norm())
    return logits, max(len(problem.protected), len(problem.retained)) + 8


def check_labels(labels: Int[Tensor, " batch"], count: int, num_classes: int) -> None:
    """Refuse labels that are not one class for each example.

    Raises:
        ValueError: If there are too many or too few, one is no class, or there are fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"there must be at least 2 classes; got {num_classes}.")
    if len(labels) != count:
        raise ValueError(f"each of the {count} examples must have one label; got {len(labels)} labels.")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes - 1}]; found {int(labels.min())} to {int(labels.max())}; "
            "number the classes from 0."
        )


def _largest_moment(rows: Float[Tensor, "batch d_in"]) -> float:
    """Return an upper bound on the largest eigenvalue of the mean of x xᵀ, a little above it.

    Sums of n products are off by at most n·2⁻⁵³ times the sums of absolute values, whose matrix has a norm of at most
    its trace, the mean ‖x‖²; eigenvalues by some d·2⁻⁵³ times the norm.
    """
    found = float(torch.linalg.eigvalsh(rows.T @ rows / len(rows))[-1])
    return (found + (_above(len(rows) + rows.shape[1]) - 1) * _mean_square(rows)) * _above(1)


def _mean_square(rows: Float[Tensor, "batch d_in"]) -> float:
    """Return an upper bound on the mean ‖x‖², a little above it."""
    return float(rows.square().sum()) / len(rows) * _above(rows.numel())


def _above(roundings: int) -> float:
    """Return a factor that makes up for that many roundings, four times over."""
    return 1 + 4 * (roundings + 8) * _UNIT
