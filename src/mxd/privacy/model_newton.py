"""A Newton step on any classifier, which carries no certificate, and says why."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mxd.privacy.certificate import Bound, Certificate, Constant
from mxd.privacy.certify import CertifyConfig
from mxd.privacy.examples import Examples, device_of, predict, require_logits, require_sets
from mxd.privacy.newton import (
    EXACT_PARAMETERS,
    AutogradObjective,
    damped_step,
    newton_direction,
    stochastic_direction,
)
from mxd.privacy.objective import accuracy_losses, half_squared_norm, uniformity_losses

Part = Callable[[Float[Tensor, " p"]], Float[Tensor, ""]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StochasticConfig:
    """How the full step is estimated from random samples: the paper's third algorithm."""

    scale: float
    """B, at least the largest eigenvalue of the Hessian of every sample, λ included."""
    depth: int
    """Samples in a chain; `chain_depth` gives the paper's number."""
    repeats: int = 8
    """Chains that are averaged."""
    sample: int = 64
    """Protected and retained examples in a sample, of each."""
    seed: int = 0
    """Draws the samples."""


class ModelStep(NamedTuple):
    """A model after a Newton step."""

    model: nn.Module
    """A copy of the model, in its own precision, with the new weights; without noise."""
    certificate: Certificate
    """Why there is no certificate, and what would be promised if the estimates were proofs."""


def newton_step_model(
    model: nn.Module,
    protected: Examples,
    retained: Examples,
    config: CertifyConfig,
    *,
    batch_size: int = 512,
    stochastic: StochasticConfig | None = None,
) -> ModelStep:
    """Take at most `config.warm_up` damped Newton steps on M_θ and one full one, on a float64 copy of any classifier.

    The copy computes on the model's device, or on the CPU where that device has no float64.

    The Hessian is exact up to `EXACT_PARAMETERS` trained weights; beyond, products with it and conjugate gradients; or
    the full step is estimated from samples. The model computes in evaluation mode. No noise is added: the curvature of
    a model whose logits are not linear in its weights is known at single points only, so nothing is certified. For one
    linear layer there is `certify_logistic`.

    Args:
        model: A classifier that returns logits; left as it is.
        protected: Whose predictions are to be uniform.
        retained: Whose accuracy is to stay.
        config: The objective, the steps, and the ε and δ that are asked for; `radius` and `noise_seed` are not used.
        batch_size: Examples in memory at a time.
        stochastic: Estimates the full step; there is no warm-up with it.

    Raises:
        ValueError: If the sets are unfit, no weight is trained, or a Hessian on the way is not positive definite.
    """
    require_sets(protected, retained)
    for name, examples in (("protected", protected), ("retained", retained)):
        require_logits(model, examples, name)
    objective = ModelObjective(model, protected, retained, config, batch_size)
    w = objective.start
    for _ in range(0 if stochastic else config.warm_up):
        moved = damped_step(objective, w)
        if moved is None:
            break
        w = moved
    if stochastic is None:
        after = w - newton_direction(objective, w).vector
    else:
        after = w - objective.estimated_direction(w, stochastic)
    return ModelStep(objective.model_at(model, after), _refusal(objective, after, config))


class ModelObjective(AutogradObjective):
    """M_θ of a classifier as a function of its trained weights, laid end to end in float64.

    Args:
        model: The classifier.
        protected: Whose predictions are to be uniform.
        retained: Whose accuracy is to stay.
        config: The objective.
        batch_size: Examples in memory at a time.
    """

    def __init__(
        self, model: nn.Module, protected: Examples, retained: Examples, config: CertifyConfig, batch_size: int
    ) -> None:
        given = device_of(model)
        self._device = torch.device("cpu") if given.type == "mps" else given
        self._model = copy.deepcopy(model).to(self._device).double().eval()
        self._names = [name for name, parameter in self._model.named_parameters() if parameter.requires_grad]
        if not self._names:
            raise ValueError("at least one weight of the model must require a gradient; none does.")
        trained = dict(self._model.named_parameters())
        self._shapes = [trained[name].shape for name in self._names]
        self.start: Tensor = torch.cat([trained[name].detach().flatten() for name in self._names])
        self._config = config
        self._sets = (_in_float64(protected), _in_float64(retained))
        parts: list[Part] = [lambda w: config.weight_decay * half_squared_norm([w])]
        for role, examples in enumerate(self._sets):
            parts += [self._part(role, batch, examples.num_counted) for batch in examples.batches(batch_size)]
        super().__init__(parts)

    def estimated_direction(self, w: Float[Tensor, " p"], config: StochasticConfig) -> Float[Tensor, " p"]:
        """Estimate H⁻¹∇M_θ at `w` from random samples of both sets; the gradient itself is that of all examples."""

        def sample_product(v: Tensor, generator: torch.Generator) -> Tensor:
            total = self._config.weight_decay * v
            for role, examples in enumerate(self._sets):
                rows = torch.randint(len(examples), (min(config.sample, len(examples)),), generator=generator)
                chosen = examples.take(rows)
                # The sum over the sample, times how many times it fits into the set, is right on average.
                weight = examples.num_counted * len(rows) / len(examples)
                total = total + AutogradObjective([self._part(role, chosen, weight)]).hessian_at(w)(v)
            return total

        return stochastic_direction(
            sample_product,
            self.gradient(w),
            scale=config.scale,
            depth=config.depth,
            repeats=config.repeats,
            seed=config.seed,
        )

    def model_at(self, model: nn.Module, w: Float[Tensor, " p"]) -> nn.Module:
        """Return a copy of a model with these weights, rounded to its precision."""
        moved = copy.deepcopy(model)
        parameters = dict(moved.named_parameters())
        with torch.no_grad():
            for name, value in self._unpack(w).items():
                parameters[name].copy_(value.to(parameters[name].dtype))
        return moved

    def _part(self, role: int, batch: Examples, divisor: int | float) -> Part:
        """Return θ or 1 − θ times the sum of a batch's losses over `divisor`."""
        theta, kind = self._config.theta, self._config.uniformity

        def part(w: Tensor) -> Tensor:
            found = predict(_At(self._model, self._unpack(w)), batch.to(self._device))
            if role == 0:
                return theta / divisor * uniformity_losses(found.logits, kind).sum()
            return (1 - theta) / divisor * accuracy_losses(found.logits, found.labels).sum()

        return part

    def _unpack(self, w: Float[Tensor, " p"]) -> dict[str, Tensor]:
        pieces: Sequence[Tensor] = w.split([shape.numel() for shape in self._shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(self._names, pieces, self._shapes, strict=True)}


class _At(nn.Module):
    """A model with other weights in place of its own."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self._inner, self._trained = model, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns with those weights."""
        return functional_call(self._inner, self._trained, args, kwargs)


def _refusal(objective: ModelObjective, after: Float[Tensor, " p"], config: CertifyConfig) -> Certificate:
    slope = float(objective.gradient(after).norm())
    constants = {
        "theta": Constant(config.theta, "given", "θ, the weight of uniformity"),
        "weight_decay": Constant(config.weight_decay, "given", "λ, counted once: inside M_θ"),
        "num_parameters": Constant(len(after), "given", "trained weights"),
        "gradient_after": Constant(slope, "computed", "‖∇M_θ(w̃)‖, its λw included"),
    }
    bounds: dict[str, Bound] = {}
    if len(after) <= EXACT_PARAMETERS:
        smallest = float(torch.linalg.eigvalsh(objective.hessian(after))[0])
        constants["smallest_eigenvalue"] = Constant(
            smallest, "estimated", "of ∇²M_θ at w̃ alone; nothing is known of it on the way to the minimiser"
        )
        guess = slope / smallest if smallest > 0 else None
        bounds["a posteriori, if w̃'s curvature were everywhere's"] = Bound(guess, "‖∇M(w̃)‖ / smallest_eigenvalue")
    unmet = (
        "M_θ must be strongly convex, with one minimiser; this model's logits are not known to be linear in its "
        "weights, so no weight_decay is proved to suffice; certify_logistic certifies a single linear layer.",
    )
    return Certificate(
        epsilon=config.epsilon, delta=config.delta, constants=constants, bounds=bounds, noise="secret", unmet=unmet
    )


def _in_float64(examples: Examples) -> Examples:
    if isinstance(examples.inputs, Tensor):
        return examples.with_inputs(
            examples.inputs.double() if examples.inputs.is_floating_point() else examples.inputs
        )
    return examples.with_inputs(
        {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in examples.inputs.items()}
    )
