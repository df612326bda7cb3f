r"""How far one full Newton step can have ended from the exact minimiser, by constants derived for logistic regression.

With $m$ the strong convexity, $\rho$ the Lipschitz constant of the Hessian, $w$ before and $\tilde w$ after the step;
the proofs are in docs/privacy_certificate.md. Each bound holds in floating point too: it contains what rounding can
have done.
"""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from mxd.privacy.certificate import Bound, Constant
from mxd.privacy.logistic import LogisticConstants, LogisticObjective, gradient_rounding, product_rounding
from mxd.privacy.newton import Direction, newton_direction


class FullStep(NamedTuple):
    """A whole Newton step."""

    before: Float[Tensor, " p"]
    """w."""
    direction: Direction
    """The solution s of ∇²M_θ(w) s = ∇M_θ(w)."""
    after: Float[Tensor, " p"]
    """w̃ = w − s."""


def distance_bounds(problem: LogisticObjective, constants: LogisticConstants, step: FullStep) -> dict[str, Bound]:
    """Return every bound on ‖w̃ − w_θ‖, the paper's a-priori one first; each holds by itself, so the smallest does.

    Args:
        problem: The objective and its data.
        constants: Those of `logistic_constants(problem)`, with a strong convexity above 0.
        step: The step.
    """
    m, rho = constants.strong_convexity, constants.hessian_lipschitz
    radius = max(constants.minimiser_radius, float(step.before.norm()))
    slope_before = float(problem.gradient(step.before).norm()) + gradient_rounding(problem, constants, step.before)
    slope_after = float(problem.gradient(step.after).norm()) + gradient_rounding(problem, constants, step.after)
    length = float(step.direction.vector.norm())
    # For the roundings of a norm over all weights and of each formula.
    above = 1 + 4 * (problem.num_parameters + 64) * 2.0**-53
    inexact = _solve_error(problem, constants, step.before, step.direction) / m + 2.0**-52 * float(step.after.norm())
    bounds = {
        "a priori, ball": Bound(2 * radius**2 * rho / m + inexact, "2 C² ρ / m, w and the minimiser in a ball of C"),
        "a priori, gradient": Bound(rho * slope_before**2 / (2 * m**3) + inexact, "ρ ‖∇M(w)‖² / (2 m³)"),
        "step length": Bound(rho * length**2 / (2 * m) + inexact, "ρ ‖s‖² / (2 m)"),
        "a posteriori": Bound(slope_after / m, "‖∇M(w̃)‖ / m"),
        **_local_bounds(problem, constants, step.after),
    }
    return {
        name: bound if bound.value is None else bound._replace(value=bound.value * above)
        for name, bound in bounds.items()
    }


def named_constants(problem: LogisticObjective, constants: LogisticConstants, step: FullStep) -> dict[str, Constant]:
    """Return everything that the bounds rest on, with where it came from; what the steps gave is not public."""
    fixed = _constants_of_data(problem, constants)
    after, gradient = step.after, "∇M_θ with its λw"
    return {
        **{name: constant._replace(public=True) for name, constant in fixed.items()},
        "norm_before": Constant(float(step.before.norm()), "computed", "‖w‖ before the step"),
        "gradient_before": Constant(float(problem.gradient(step.before).norm()), "computed", f"norm of {gradient}"),
        "step_length": Constant(float(step.direction.vector.norm()), "computed", f"‖s‖, by {step.direction.method}"),
        "step_residual": Constant(step.direction.residual, "computed", "‖∇M_θ(w) − ∇²M_θ(w) s‖"),
        "gradient_after": Constant(float(problem.gradient(after).norm()), "computed", f"norm of {gradient}"),
        "rounding_after": Constant(
            gradient_rounding(problem, constants, after), "derived", "error of gradient_after, from float64"
        ),
    }


def _constants_of_data(problem: LogisticObjective, constants: LogisticConstants) -> dict[str, Constant]:
    """Return the constants that no weights enter."""
    config = problem.config
    return {
        "theta": Constant(config.theta, "given", "θ, the weight of uniformity"),
        "weight_decay": Constant(config.weight_decay, "given", "λ, counted once: inside M_θ"),
        "num_classes": Constant(problem.num_classes, "given", "Y"),
        "num_protected": Constant(len(problem.protected), "given", "protected examples"),
        "num_retained": Constant(len(problem.retained), "given", "retained examples"),
        "num_parameters": Constant(problem.num_parameters, "given", "weights, the bias included; all are regularised"),
        "largest_norm": Constant(constants.largest_norm, "computed", "R, largest ‖x‖, the constant 1 included"),
        "protected_moment": Constant(constants.protected_moment, "computed", "λ_max of the mean x xᵀ, protected"),
        "retained_moment": Constant(constants.retained_moment, "computed", "λ_max of the mean x xᵀ, retained"),
        "accuracy_slope": Constant(constants.accuracy_slope, "derived", "‖∇L_A‖ ≤ √2 · mean ‖x‖"),
        "uniformity_slope": Constant(
            constants.uniformity_slope, "derived", f"‖∇L_K‖ ≤ {constants.uniformity.slope:.6g} · mean ‖x‖"
        ),
        "smoothness": Constant(constants.smoothness, "derived", "no eigenvalue of ∇²M_θ is above it, anywhere"),
        "hessian_lipschitz": Constant(constants.hessian_lipschitz, "derived", "ρ, Lipschitz constant of ∇²M_θ"),
        "smallest_weight_decay": Constant(
            constants.smallest_weight_decay,
            "derived",
            f"θ · {constants.uniformity.concavity:.6g} · protected_moment; λ must be above it",
        ),
        "strong_convexity": Constant(
            constants.strong_convexity,
            "derived",
            "m = λ − smallest_weight_decay: no eigenvalue of ∇²M_θ is below it, anywhere",
        ),
        "minimiser_radius": Constant(constants.minimiser_radius, "derived", "‖w_θ‖ ≤ √(2 (1−θ) ln Y / λ)"),
    }


def _local_bounds(
    problem: LogisticObjective, constants: LogisticConstants, after: Float[Tensor, " p"]
) -> dict[str, Bound]:
    """Return the bounds from the next Newton step, not taken: along v the Hessian changes by at most e^(c‖v‖)."""
    names = {
        "self-concordant": "−ln(1 − c ν/√m) / c, with c = √2 R and ν the Newton decrement at w̃",
        "next step": "‖s'‖ + χ(t)/φ(t) · ν/√m, with s' the next step and t = c times the bound above",
    }
    if problem.config.uniformity != "kl-u-p":
        return {name: Bound(None, f"{formula}: proved for kl-u-p only") for name, formula in names.items()}
    m, c = constants.strong_convexity, math.sqrt(2) * constants.largest_norm
    following = newton_direction(problem, after)
    error = _solve_error(problem, constants, after, following)
    image = problem.hessian_at(after)(following.vector)
    square = float(following.vector @ image) * (1 + 1e-9)
    image_error = product_rounding(problem, constants, after, following.vector)
    decrement = math.sqrt(max(square, 0) + image_error * float(following.vector.norm())) + error / math.sqrt(m)
    reach = c * decrement / math.sqrt(m)
    if not reach < 1:
        return {name: Bound(None, f"{formula}: needs c ν/√m < 1, got {reach:.4g}") for name, formula in names.items()}
    distance = -math.log1p(-reach) / c
    t = c * distance
    # (e^t − 1)/t − 1 and (1 − e^−t)/t, whose quotients lose all digits where t is small.
    widening = t / 2 * math.exp(t)
    shrinking = -math.expm1(-t) / t if t > 0 else 1.0
    following_bound = (
        float(following.vector.norm()) * (1 + 1e-9) + error / m + widening / shrinking * decrement / math.sqrt(m)
    )
    return {
        "self-concordant": Bound(distance, names["self-concordant"]),
        "next step": Bound(following_bound, names["next step"]),
    }


def _solve_error(
    problem: LogisticObjective, constants: LogisticConstants, w: Float[Tensor, " p"], direction: Direction
) -> float:
    """Bound ‖∇M_θ(w) − ∇²M_θ(w) s‖ for the exact gradient and Hessian at w: the residual and what rounding hides."""
    rounding = gradient_rounding(problem, constants, w) + product_rounding(problem, constants, w, direction.vector)
    return direction.residual + rounding
