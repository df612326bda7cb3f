"""A certified Newton step on a logistic regression: the paper's second algorithm, with every constant derived."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mxd.privacy.certificate import Certificate
from mxd.privacy.distance_bounds import FullStep, distance_bounds, named_constants
from mxd.privacy.gaussian import add_noise, check_budget
from mxd.privacy.logistic import (
    LogisticConstants,
    LogisticObjective,
    logistic_constants,
    require_strong_convexity,
    with_constant,
)
from mxd.privacy.newton import damped_step, minimise, newton_direction
from mxd.privacy.objective import ObjectiveConfig, Uniformity
from mxd.privacy.utility_bound import UtilityBound, noise_cost, utility_bound


@dataclass(frozen=True, kw_only=True, slots=True)
class CertifyConfig:
    """What is minimised, and what is promised about the result."""

    theta: float = 0.75
    """θ, the weight of uniformity on protected examples, strictly between 0 and 1; accuracy on the others has 1−θ."""
    weight_decay: float = 1e-2
    """λ, which multiplies half the squared norm of all weights, the bias too; above 0, and counted once."""
    uniformity: Uniformity = "kl-u-p"
    """Distance of a prediction p from the uniform U: kl-u-p certifies with any λ, the others with a large one."""
    epsilon: float = 1.0
    """ε: no event is more than e^ε times as probable, give or take δ, as with the exact minimiser; above 0."""
    delta: float = 1e-5
    """δ, strictly between 0 and 1."""
    warm_up: int = 20
    """Damped Newton steps before the full one, at most; 0 is the paper's single step, which often overshoots."""
    radius: float | None = None
    """C, if the objective is to be minimised over ‖w‖ ≤ C only; it certifies if the minimiser is inside."""
    noise_seed: int | None = None
    """Seeds the noise, for experiments only: nothing is certified or released then. By default nobody knows it."""

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta)
        if not self.objective.weight_decay > 0:
            raise ValueError(
                "weight_decay must be above 0 for a certificate: with 0 nothing is strongly convex; got 0; "
                "any positive one certifies with uniformity kl-u-p."
            )
        if self.warm_up < 0:
            raise ValueError(f"warm_up must be at least 0; got {self.warm_up}.")
        if self.radius is not None and not (math.isfinite(self.radius) and self.radius > 0):
            raise ValueError(f"radius must be a finite number above 0; got {self.radius}.")

    @property
    def objective(self) -> ObjectiveConfig:
        """The objective alone."""
        return ObjectiveConfig(theta=self.theta, weight_decay=self.weight_decay, uniformity=self.uniformity)


class CertifiedStep(NamedTuple):
    """A logistic regression before, after the steps, and as it may be released. Logits are `with_constant(x) @ W`."""

    pretrained: Float[Tensor, "d_in classes"]
    """W before; the last row is the bias."""
    stepped: Float[Tensor, "d_in classes"]
    """W after the Newton steps, without noise: not to be released."""
    released: Float[Tensor, "d_in classes"] | None
    """W with the certificate's noise, which is secret; None where there is no certificate."""
    experimental: Float[Tensor, "d_in classes"] | None
    """W with noise of the same size from `noise_seed`, to be repeated but not released; None without a seed."""
    certificate: Certificate
    """What is promised about `released`, or why nothing is."""
    utility: UtilityBound
    """What the exact minimiser can cost and gain at most, known before any step."""
    constants: LogisticConstants
    """The derived constants, as numbers."""
    noise_accuracy_cost: float | None
    """What the noise adds at most to the retained cross-entropy, on average; None where no bound is proved."""


def certify_logistic(
    protected: Float[Tensor, "num_protected d_protected"],
    retained: Float[Tensor, "num_retained d"],
    retained_labels: Int[Tensor, " num_labels"],
    config: CertifyConfig,
    *,
    num_classes: int,
    pretrained: Float[Tensor, "rows columns"] | None = None,
) -> CertifiedStep:
    """Make a logistic regression uncertain on the protected examples, and certify how near it is to the exact optimum.

    From the pretrained weights at most `config.warm_up` damped Newton steps on M_θ, then one full step, then noise of
    the size that ε, δ and the smallest proved bound ask for, in float64 on the CPU. The certificate lists each constant
    and bound, vacuous or not: `statement()` in words, `to_json()` for the owner, `public_json()` for everybody.

    Args:
        protected: Features of the protected examples, without a constant column; any float dtype, scaled as you like.
        retained: Features of the retained examples.
        retained_labels: Their classes.
        config: The objective, ε, δ and the steps.
        num_classes: Y.
        pretrained: W with the bias as its last row; without it, one is trained on the retained examples with λ
            (`pretrain_logistic` trains one on whatever it is given).

    Raises:
        ValueError: If a set is empty or not finite, shapes or labels do not fit, retained examples are protected too
            (the sentence names how many), or λ is not above the smallest one that certifies, which the sentence names.

    Example:
        >>> x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
        >>> step = certify_logistic(x[:10], x[10:], (x[10:, 0] > 0).long(), CertifyConfig(), num_classes=2)
        >>> step.certificate.certified
        True
    """
    problem = _problem(protected, retained, retained_labels, config, num_classes)
    constants = logistic_constants(problem)
    require_strong_convexity(problem, constants)
    reference = _start(problem, pretrained)
    taken = _steps(problem, reference, config.warm_up)
    certificate = _certificate(problem, constants, taken, config)
    sigma = certificate.experimental_sigma
    noisy = None if sigma is None else problem.matrix(add_noise(taken.after, sigma, seed=config.noise_seed))
    accuracy_cost = None if sigma is None else noise_cost(sigma, constants.accuracy.trace, constants.retained_square)
    return CertifiedStep(
        pretrained=problem.matrix(reference),
        stepped=problem.matrix(taken.after),
        released=noisy if certificate.certified else None,
        experimental=noisy if certificate.noise == "seeded" else None,
        certificate=certificate,
        utility=utility_bound(problem, constants, reference),
        constants=constants,
        noise_accuracy_cost=accuracy_cost,
    )


def _problem(
    protected: Tensor, retained: Tensor, retained_labels: Tensor, config: CertifyConfig, num_classes: int
) -> LogisticObjective:
    problem = LogisticObjective(
        protected=with_constant(protected),
        retained=with_constant(retained),
        labels=retained_labels.cpu().long(),
        num_classes=num_classes,
        config=config.objective,
    )
    _require_disjoint(problem)
    return problem


def pretrain_logistic(
    features: Float[Tensor, "batch d"], labels: Int[Tensor, " num_labels"], *, num_classes: int, weight_decay: float
) -> Float[Tensor, "d_in classes"]:
    """Return the W that minimises mean cross-entropy + λ/2·‖W‖² on the examples, to machine precision.

    Raises:
        ValueError: If there are no examples, shapes or labels do not fit, or λ is not above 0.
    """
    rows = with_constant(features)
    if not weight_decay > 0:
        raise ValueError(f"weight_decay must be above 0; got {weight_decay}.")
    # θ cannot be 0; at 0.5 with a protected example of zeros, which has no slope, the cross-entropy counts by half.
    problem = LogisticObjective(
        protected=torch.zeros(1, rows.shape[1], dtype=torch.float64),
        retained=rows,
        labels=labels.cpu().long(),
        num_classes=num_classes,
        config=ObjectiveConfig(theta=0.5, weight_decay=weight_decay / 2, uniformity="kl-u-p"),
    )
    return problem.matrix(minimise(problem, torch.zeros(problem.num_parameters, dtype=torch.float64)))


def _steps(problem: LogisticObjective, start: Float[Tensor, " p"], warm_up: int) -> FullStep:
    """Take at most so many damped steps, and then the full one that the certificate is about."""
    w = start
    for _ in range(warm_up):
        moved = damped_step(problem, w)
        if moved is None:
            break
        w = moved
    direction = newton_direction(problem, w)
    return FullStep(w, direction, w - direction.vector)


def _require_disjoint(problem: LogisticObjective) -> None:
    # Adding 0 makes −0 and 0, which are equal numbers, equal bytes.
    protected, retained = (
        [row.tobytes() for row in (rows + 0.0).numpy()] for rows in (problem.protected, problem.retained)
    )
    known = set(protected)
    common = sum(row in known for row in retained)
    if common:
        raise ValueError(
            f"protected and retained sets must have no row in common; {common} of {len(retained)} retained rows "
            f"{'is' if common == 1 else 'are'} also protected; remove {'it' if common == 1 else 'them'} from one."
        )


def _start(problem: LogisticObjective, pretrained: Float[Tensor, "rows columns"] | None) -> Float[Tensor, " p"]:
    if pretrained is None:
        pretrained = pretrain_logistic(
            problem.retained[:, :-1],
            problem.labels,
            num_classes=problem.num_classes,
            weight_decay=problem.config.weight_decay,
        )
    expected = (problem.retained.shape[1], problem.num_classes)
    if tuple(pretrained.shape) != expected:
        raise ValueError(
            f"pretrained weights must be features and one bias row by classes, {expected}; "
            f"got {tuple(pretrained.shape)}."
        )
    if not bool(pretrained.isfinite().all()):
        raise ValueError("pretrained weights must be finite; some are NaN or infinite.")
    return pretrained.detach().cpu().double().flatten()


def _certificate(
    problem: LogisticObjective, constants: LogisticConstants, step: FullStep, config: CertifyConfig
) -> Certificate:
    bounds = distance_bounds(problem, constants, step)
    nearest = min(bound.value for bound in bounds.values() if bound.value is not None)
    unmet: tuple[str, ...] = ()
    outermost = min(constants.minimiser_radius, float(step.after.norm()) + nearest)
    if config.radius is not None and not outermost < config.radius:
        unmet = (
            f"the minimiser must lie inside the ball of radius {config.radius:g}, but its norm is only known to be at "
            f"most {outermost:.6g}; raise radius above that.",
        )
    return Certificate(
        epsilon=config.epsilon,
        delta=config.delta,
        constants=named_constants(problem, constants, step),
        bounds=bounds,
        noise="secret" if config.noise_seed is None else "seeded",
        unmet=unmet,
    )
