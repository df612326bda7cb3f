"""Newton steps on a smooth objective: full, damped or not, with the Hessian itself or only products with it.

A step solves H s = −g for the Hessian H and gradient g of the *whole* objective, which holds λ/2·‖w‖² already: λI is
in H and λw in g, and neither is added again. The step is taken whole. The released code of the paper takes half of it,
and shifts eigenvalues until H is positive definite (Ashiq et al., 2025); here such an H is refused.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

EXACT_PARAMETERS = 4096
"""Number of parameters up to which the Hessian is built and factorised: 128 MiB in float64."""
CG_TOLERANCE = 1e-8
"""Relative residual at which conjugate gradients stop; what is left is part of every bound."""
DAMPED_CG_TOLERANCE = 1e-3
"""The same on the way to a minimum, where a step need not be exact."""
INVISIBLE = 1e-10
"""Fall of the objective, relative to 1 plus its value, below which a comparison of values says nothing."""
MINIMISE_STEPS = 200
"""Damped Newton steps after which `minimise` gives up."""


@runtime_checkable
class SmoothObjective(Protocol):
    """A twice differentiable function of one vector of parameters."""

    def value(self, w: Float[Tensor, " p"]) -> float:
        """Return the function's value."""
        ...

    def gradient(self, w: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return the gradient."""
        ...

    def hessian_at(self, w: Float[Tensor, " p"]) -> Callable[[Float[Tensor, " p"]], Float[Tensor, " p"]]:
        """Return the function that multiplies a vector by the Hessian at `w`."""
        ...

    def hessian(self, w: Float[Tensor, " p"]) -> Float[Tensor, "p p"]:
        """Return the whole Hessian."""
        ...


class AutogradObjective:
    """A sum of differentiable functions, one differentiated at a time, so that only one graph is in memory.

    Args:
        parts: Functions of the flat parameters whose sum is the objective, for instance one a batch.
    """

    def __init__(self, parts: Sequence[Callable[[Float[Tensor, " p"]], Float[Tensor, ""]]]) -> None:
        if not parts:
            raise ValueError("an objective needs at least one part; got none.")
        self._parts = parts

    def value(self, w: Float[Tensor, " p"]) -> float:
        """Return the sum of the parts."""
        with torch.no_grad():
            return math.fsum(float(part(w)) for part in self._parts)

    def gradient(self, w: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return the sum of the parts' gradients."""
        total = torch.zeros_like(w)
        for part in self._parts:
            point = w.detach().clone().requires_grad_()
            total += torch.autograd.grad(part(point), point)[0]
        return total

    def hessian_at(self, w: Float[Tensor, " p"]) -> Callable[[Float[Tensor, " p"]], Float[Tensor, " p"]]:
        """Return the sum of the parts' Hessians as a function, which differentiates gradients along its vector."""

        def product(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
            total = torch.zeros_like(w)
            for part in self._parts:
                total += _part_product(part, w, v)
            return total

        return product

    def hessian(self, w: Float[Tensor, " p"]) -> Float[Tensor, "p p"]:
        """Return the Hessian row by row, made symmetric."""
        rows = torch.zeros(len(w), len(w), dtype=w.dtype, device=w.device)
        for part in self._parts:
            point = w.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(part(point), point, create_graph=True)
            if slope.requires_grad:
                for index in range(len(w)):
                    rows[index] += torch.autograd.grad(slope[index], point, retain_graph=True)[0]
        return (rows + rows.T) / 2


class Direction(NamedTuple):
    """A solution of H s = b."""

    vector: Float[Tensor, " p"]
    """s."""
    residual: float
    """‖b − H s‖, computed afresh with a product by H."""
    method: str
    """How it was found, in words."""


def newton_direction(
    objective: SmoothObjective,
    w: Float[Tensor, " p"],
    slope: Float[Tensor, " p"] | None = None,
    *,
    tolerance: float = CG_TOLERANCE,
) -> Direction:
    """Solve H s = g at `w`: with Cholesky's factors up to `EXACT_PARAMETERS` parameters, else by conjugate gradients.

    The full Newton step is w − s.

    Args:
        objective: What is to be made small.
        w: Where.
        slope: g, where it is known already.
        tolerance: Largest relative residual of conjugate gradients.

    Raises:
        ValueError: If the gradient is not finite, the Hessian not positive definite, or conjugate gradients do not
            converge.
    """
    slope = objective.gradient(w) if slope is None else slope
    if not bool(slope.isfinite().all()):
        raise ValueError("the gradient must be finite for a Newton step; it is NaN or infinite; begin elsewhere.")
    product = objective.hessian_at(w)
    if len(w) <= EXACT_PARAMETERS:
        solution, method = solve_exactly(objective.hessian(w), slope), "exact Hessian, Cholesky"
    else:
        solution, method = conjugate_gradients(product, slope, tolerance=tolerance), "conjugate gradients"
    return Direction(solution, float((slope - product(solution)).norm()), method)


def solve_exactly(hessian: Float[Tensor, "p p"], right: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """Solve H s = b by Cholesky's factors.

    Raises:
        ValueError: If H is not positive definite; the sentence names its smallest eigenvalue.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        smallest = float(torch.linalg.eigvalsh(hessian)[0])
        raise ValueError(
            f"the Hessian must be positive definite for a Newton step; its smallest eigenvalue is {smallest:.4g}; "
            f"raise weight_decay by more than {abs(smallest):.4g}, or begin nearer to a minimum."
        )
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


def conjugate_gradients(
    product: Callable[[Float[Tensor, " p"]], Float[Tensor, " p"]],
    right: Float[Tensor, " p"],
    *,
    tolerance: float = CG_TOLERANCE,
    max_iterations: int | None = None,
) -> Float[Tensor, " p"]:
    """Solve H s = b for a positive definite H of which only products are to be had (Hestenes and Stiefel, 1952).

    Args:
        product: v ↦ H v.
        right: b.
        tolerance: Largest ‖b − H s‖ / ‖b‖.
        max_iterations: After which it gives up; ten times the number of parameters by default.

    Raises:
        ValueError: If a direction v with vᵀHv ≤ 0 turns up, or the tolerance is not reached.
    """
    solution, residual = torch.zeros_like(right), right.clone()
    direction, square = right.clone(), float(right @ right)
    goal = tolerance**2 * square
    for _ in range(max_iterations or 10 * len(right)):
        if square <= goal:
            return solution
        image = product(direction)
        curvature = float(direction @ image)
        if not curvature > 0:
            raise ValueError(
                "the Hessian must be positive definite for a Newton step; it curves by "
                f"{curvature / float(direction @ direction):.4g} along one direction; "
                "raise weight_decay, or begin nearer to a minimum."
            )
        length = square / curvature
        solution = solution + length * direction
        residual = residual - length * image
        before, square = square, float(residual @ residual)
        direction = residual + square / before * direction
    if square <= goal:
        return solution
    raise ValueError(
        f"conjugate gradients must reach a relative residual of {tolerance:g}; they stopped at "
        f"{math.sqrt(square / (goal / tolerance**2)):.3g}; raise weight_decay, which makes the problem easier."
    )


def stochastic_direction(
    sample_product: Callable[[Float[Tensor, " p"], torch.Generator], Float[Tensor, " p"]],
    right: Float[Tensor, " p"],
    *,
    scale: float,
    depth: int,
    repeats: int,
    seed: int,
) -> Float[Tensor, " p"]:
    r"""Estimate H⁻¹b from products with the Hessians of random samples, never of the whole set.

    $$s_0 = b/B, \qquad s_t = b/B + s_{t-1} - H_t s_{t-1} / B, \qquad H^{-1}b \approx \overline{s_n},$$

    the truncated Neumann series with each H replaced by an independent sample's (Agarwal et al., 2017), the
    recursion of the paper's third algorithm (Ashiq et al., 2025). Its mean is exactly the truncated series, off by at
    most (1 − m/B)^(n+1) ‖b‖/m, where m is H's smallest eigenvalue. A released step need not rest on that: the bound
    from the gradient at the new point holds however the step was found.

    Args:
        sample_product: (v, generator) ↦ H_t v for a fresh random sample whose Hessian is right on average.
        right: b.
        scale: B, at least the largest eigenvalue of every sample's Hessian, so that the recursion cannot diverge.
        depth: n, the number of samples in one chain; `chain_depth` gives one that suffices.
        repeats: Number of independent chains that are averaged.
        seed: Draws the samples.

    Raises:
        ValueError: If a number is not above 0, or the recursion diverges.
    """
    if not (scale > 0 and depth > 0 and repeats > 0):
        raise ValueError(f"scale, depth and repeats must be above 0; got {scale}, {depth} and {repeats}.")
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(right)
    for _ in range(repeats):
        solution = right / scale
        for _ in range(depth):
            solution = solution + (right - sample_product(solution, generator)) / scale
        total += solution
    if not bool(total.isfinite().all()):
        raise ValueError(f"scale must be at least every sample's largest eigenvalue; at {scale:g} the sum diverged.")
    return total / repeats


def chain_depth(scale: float, smallest: float, repeats: int) -> int:
    """Return the paper's number of samples, n ≥ 2 (B/m) ln((B/m) b), for eigenvalues in [m, B] and b chains.

    Raises:
        ValueError: If not 0 < m ≤ B, or b is below 1.
    """
    if not (0 < smallest <= scale and repeats >= 1):
        raise ValueError(f"0 < smallest ≤ scale and repeats ≥ 1 must hold; got {smallest}, {scale} and {repeats}.")
    ratio = scale / smallest
    return max(1, math.ceil(2 * ratio * math.log(ratio * repeats)))


def damped_step(objective: SmoothObjective, w: Float[Tensor, " p"]) -> Float[Tensor, " p"] | None:
    """Take one Newton step, halved until the objective falls by a tenth of what its slope promises.

    Where the fall is too small to be seen in the objective's value, a whole step is taken if it shrinks the gradient.

    Returns:
        Where it leads, or None if nothing is left to gain in this precision.

    Raises:
        ValueError: If the Hessian is not positive definite.
    """
    slope, value = objective.gradient(w), objective.value(w)
    if float(slope.norm()) == 0:
        return None
    direction = newton_direction(objective, w, slope, tolerance=DAMPED_CG_TOLERANCE).vector
    promise, length = float(slope @ direction), 1.0
    if promise <= INVISIBLE * (1 + abs(value)):
        moved = w - direction
        return moved if float(objective.gradient(moved).norm()) < float(slope.norm()) else None
    while objective.value(w - length * direction) > value - 0.1 * length * promise:
        length /= 2
    return w - length * direction


def minimise(objective: SmoothObjective, start: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """Return a minimiser of a strictly convex objective, to the precision of its numbers, by damped Newton steps.

    Raises:
        ValueError: If the Hessian is not positive definite, or `MINIMISE_STEPS` steps do not suffice.
    """
    w = start
    for _ in range(MINIMISE_STEPS):
        moved = damped_step(objective, w)
        if moved is None:
            return w
        w = moved
    raise ValueError(
        f"{MINIMISE_STEPS} Newton steps must reach a minimum; the gradient is still "
        f"{float(objective.gradient(w).norm()):.3g}; raise weight_decay, or scale the features."
    )


def _part_product(
    part: Callable[[Float[Tensor, " p"]], Float[Tensor, ""]], w: Float[Tensor, " p"], v: Float[Tensor, " p"]
) -> Float[Tensor, " p"]:
    point = w.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(part(point), point, create_graph=True)
    if not slope.requires_grad:
        return torch.zeros_like(w)
    return torch.autograd.grad(slope @ v, point)[0]
