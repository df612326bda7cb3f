r"""What test-time privacy minimises: uniform on protected examples, accurate on retained ones.

$$M_\theta(w) = \theta\,L_K(w, D_f) + (1-\theta)\,L_A(w, D_r) + \tfrac{\lambda}{2}\|w\|^2$$

with $D_f$ the protected and $D_r$ the retained examples (Ashiq et al., 2025). $\lambda$ is counted once: $M_\theta$
holds it, so $\nabla M_\theta$ has $\lambda w$ and $\nabla^2 M_\theta$ has $\lambda I$, and nothing is added to either a
second time. $\|w\|^2$ runs over every parameter that is trained, biases too, without which $M_\theta$ of a logistic
regression would not be strongly convex. $L_K$ and $L_A$ are means over all examples of their set (over all counted
positions, where a model labels tokens): how the examples are cut into batches changes nothing, because batches
contribute sums, which are divided by the whole number of examples.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Uniformity: TypeAlias = Literal["kl-u-p", "kl-p-u", "square"]
"""How far a prediction p is from the uniform distribution U over Y classes.

- `kl-u-p`: KL(U‖p) = −log Y − (1/Y) Σ_c log p_c = logsumexp(z) − mean(z) − log Y, convex in the logits z, unbounded.
- `kl-p-u`: KL(p‖U) = log Y − H(p), at most log Y, not convex in the logits.
- `square`: ½ Σ_c (p_c − 1/Y)², at most ½ (1 − 1/Y), not convex in the logits.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The objective θ·L_K + (1−θ)·L_A + λ/2·‖w‖²."""

    theta: float = 0.75
    """θ, the weight of uniformity on protected examples, strictly between 0 and 1; accuracy on the others has 1−θ."""
    weight_decay: float = 5e-4
    """λ, which multiplies half the squared norm of all trained parameters, biases too; at least 0."""
    uniformity: Uniformity = "kl-p-u"
    """Distance of a prediction p from the uniform U: kl-u-p is KL(U‖p), convex; kl-p-u is KL(p‖U); square ½‖p−U‖²."""

    def __post_init__(self) -> None:
        if not 0 < self.theta < 1:
            raise ValueError(
                f"theta must lie strictly between 0 and 1; got {self.theta}; "
                "near 0 only accuracy on retained examples counts, near 1 only uniformity on protected ones."
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be a number of at least 0; got {self.weight_decay}.")
        if self.uniformity not in get_args(Uniformity):
            raise ValueError(f"uniformity must be one of {', '.join(get_args(Uniformity))}; got {self.uniformity!r}.")


def uniformity_losses(logits: Float[Tensor, "*batch classes"], kind: Uniformity) -> Float[Tensor, "*batch"]:
    """How far each prediction is from uniform; 0 where all logits are equal.

    The formulas stand at `Uniformity`. Logits in half precision are raised to float32 first.

    Args:
        logits: One row per example or position; not probabilities.
        kind: Which distance.
    """
    log_p = functional.log_softmax(_at_least_float32(logits), dim=-1)
    classes = logits.shape[-1]
    if kind == "kl-u-p":
        return -math.log(classes) - log_p.mean(-1)
    p = log_p.exp()
    if kind == "kl-p-u":
        return math.log(classes) + (p * log_p).sum(-1)
    return 0.5 * (p - 1 / classes).square().sum(-1)


def uniformity_loss(logits: Float[Tensor, "batch classes"], kind: Uniformity) -> Float[Tensor, ""]:
    """L_K: the mean of `uniformity_losses` over the examples."""
    return uniformity_losses(logits, kind).mean()


def accuracy_losses(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The cross-entropy of each example: −log p of its label.

    Args:
        logits: One row per example or position; half precision is raised to float32 first.
        labels: Each example's class, in [0, classes).
    """
    return functional.cross_entropy(_at_least_float32(logits), labels, reduction="none")


def accuracy_loss(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """L_A: the mean cross-entropy over the examples."""
    return accuracy_losses(logits, labels).mean()


def half_squared_norm(parameters: Iterable[Tensor]) -> Float[Tensor, ""]:
    """½‖w‖² over all the tensors given, which λ multiplies.

    Raises:
        ValueError: If there is no tensor.
    """
    squares = [0.5 * parameter.square().sum() for parameter in parameters]
    if not squares:
        raise ValueError("at least one parameter must be trained; got none; set requires_grad on some.")
    return torch.stack(squares).sum()


def objective(
    config: ObjectiveConfig,
    *,
    protected_logits: Float[Tensor, "num_protected classes"],
    retained_logits: Float[Tensor, "num_retained classes"],
    retained_labels: Int[Tensor, " num_retained"],
    parameters: Iterable[Tensor],
) -> Float[Tensor, ""]:
    """M_θ of the whole protected and retained sets, in one piece (the module's docstring has the equation)."""
    uniform = uniformity_loss(protected_logits, config.uniformity)
    accurate = accuracy_loss(retained_logits, retained_labels)
    return config.theta * uniform + (1 - config.theta) * accurate + config.weight_decay * half_squared_norm(parameters)


def _at_least_float32(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
