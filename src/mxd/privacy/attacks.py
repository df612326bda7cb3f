"""What someone who holds the weights can win back: noise, gradients, fine-tuning and probes."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from mxd.atomic import JSON
from mxd.privacy.examples import Examples, Prediction, device_of, fitting_batch, predict, predict_all
from mxd.privacy.gradients import mean_gradient
from mxd.privacy.measures import SetMeasures, measure_predictions, measure_set
from mxd.privacy.objective import accuracy_losses

AttackGoal = Literal["logsumexp", "confidence"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackConfig:
    """How hard an adversary tries."""

    epsilon: float = 1 / 225
    """Most that any pixel (any number of an input) may change; standard deviation of the Gaussian noise."""
    steps: int = 50
    """Steps of projected gradient ascent (PGD)."""
    step_size: float = 1e-3
    """Size of each."""
    start_noise: float = 1e-4
    """PGD starts at the input plus noise with this standard deviation, times epsilon."""
    low: float | None = 0.0
    """Least value that an attacked input may have: that of a black pixel. No bound where None."""
    high: float | None = 1.0
    """Largest value that an attacked input may have: that of a white pixel. No bound where None."""
    relearn_examples: int = 50
    """Public examples that the model is fine-tuned on."""
    relearn_steps: int = 50
    """Full-batch steps of Adam of that fine-tuning."""
    relearn_lr: float = 1e-3
    """Its learning rate."""
    probe_examples: int = 2000
    """Public examples, at most, that a linear probe of the penultimate layer is fitted on."""
    micro_batch: int = 256
    """Examples in memory at a time, fewer where classes are a whole vocabulary."""
    seed: int = 0
    """Of noise and of the choice of public examples."""

    def __post_init__(self) -> None:
        for name in ("epsilon", "step_size", "relearn_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name.replace('_', '-')} must be a number above 0; got {value}.")
        for name in ("steps", "relearn_examples", "relearn_steps", "probe_examples", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}.")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low must lie below high; got {self.low} and {self.high}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackReport:
    """What a model says of the protected examples under each attack; None where an attack does not apply."""

    clean: SetMeasures
    """As they are."""
    gaussian: SetMeasures | None
    """Under Gaussian noise, clamped to the inputs' range."""
    fgsm: SetMeasures | None
    """After one step of size epsilon along the gradient's sign, towards more confidence."""
    pgd: SetMeasures | None
    """After projected gradient ascent on logsumexp of the logits, as in the paper."""
    pgd_confidence: SetMeasures | None
    """After the same on the largest log-probability, which is what the adversary is after."""
    relearned: SetMeasures
    """Of the model after fine-tuning on a few public examples."""
    probe: SetMeasures | None
    """Of a logistic regression on the penultimate layer, fitted on public examples."""

    def to_json(self) -> dict[str, JSON]:
        """All of it, for a file."""
        return cast("dict[str, JSON]", asdict(self))


def attack(model: nn.Module, protected: Examples, public: Examples, config: AttackConfig | None = None) -> AttackReport:
    """Try everything on the protected examples.

    Inputs are attacked where they are numbers with one label each; token ids have no neighbourhood to search.

    Args:
        model: Left unchanged.
        protected: With their true labels, which an adversary wants.
        public: Other labelled examples that an adversary has; not protected ones.
        config: How hard to try.
    """
    config = config or AttackConfig()
    _require_range(protected, config)
    order = torch.randperm(len(public), generator=torch.Generator().manual_seed(config.seed))
    few, many = public.take(order[: config.relearn_examples]), public.take(order[: config.probe_examples])

    def tried(attacked: Callable[[], Tensor]) -> SetMeasures | None:
        if not isinstance(protected.inputs, Tensor) or protected.labels_of != "example":
            return None
        return measure_set(model, protected.with_inputs(attacked()), config.micro_batch)

    return AttackReport(
        clean=measure_set(model, protected, config.micro_batch),
        gaussian=tried(lambda: gaussian_attack(_numbers(protected), config)),
        fgsm=tried(lambda: fgsm(model, _numbers(protected), config)),
        pgd=tried(lambda: pgd(model, _numbers(protected), config, goal="logsumexp")),
        pgd_confidence=tried(lambda: pgd(model, _numbers(protected), config, goal="confidence")),
        relearned=measure_set(relearn(model, few, config), protected, config.micro_batch),
        probe=probe(model, many, protected, config),
    )


def _require_range(examples: Examples, config: AttackConfig) -> None:
    if not isinstance(examples.inputs, Tensor):
        return
    low, high = float(examples.inputs.min()), float(examples.inputs.max())
    if (config.low is not None and low < config.low) or (config.high is not None and high > config.high):
        raise ValueError(
            f"attacked inputs must lie in [{config.low}, {config.high}], to which they are clamped; got {low:g} to "
            f"{high:g}; set --low and --high, to None where there is no bound."
        )


def _numbers(examples: Examples) -> Tensor:
    assert isinstance(examples.inputs, Tensor)
    return examples.inputs


def gaussian_attack(x: Float[Tensor, " n *shape"], config: AttackConfig) -> Float[Tensor, " n *shape"]:
    """The inputs plus Gaussian noise of standard deviation epsilon, clamped to their range."""
    generator = torch.Generator().manual_seed(config.seed)
    return _clamped(x + config.epsilon * torch.randn(x.shape, generator=generator), config)


def fgsm(
    model: nn.Module, x: Float[Tensor, " n *shape"], config: AttackConfig, *, goal: AttackGoal = "logsumexp"
) -> Float[Tensor, " n *shape"]:
    """The inputs moved by epsilon along the sign of the goal's gradient, clamped (Goodfellow et al., 2015)."""
    return _clamped(x + config.epsilon * _ascent(model, x, goal, config.micro_batch), config)


def pgd(
    model: nn.Module, x: Float[Tensor, " n *shape"], config: AttackConfig, *, goal: AttackGoal = "logsumexp"
) -> Float[Tensor, " n *shape"]:
    """The inputs after projected gradient ascent on the goal (Madry et al., 2018).

    Every step moves each number by step_size along the gradient's sign, and goes back to the cube of half-width epsilon
    around the input and into the inputs' range.

    Args:
        model: Takes inputs in their own range (pixels), and normalises them itself.
        x: The inputs.
        config: Steps, sizes and range.
        goal: `logsumexp` of the logits, the paper's, or `confidence`, the largest log-probability. The former also
            grows with a constant that is added to all logits, which no probability shows.
    """
    generator = torch.Generator().manual_seed(config.seed)
    start = config.start_noise * config.epsilon * torch.randn(x.shape, generator=generator)
    attacked = _clamped(x + start.clamp(-config.epsilon, config.epsilon), config)
    for _ in range(config.steps):
        moved = attacked + config.step_size * _ascent(model, attacked, goal, config.micro_batch)
        attacked = _clamped(x + (moved - x).clamp(-config.epsilon, config.epsilon), config)
    return attacked


def _ascent(model: nn.Module, x: Tensor, goal: AttackGoal, batch_size: int) -> Tensor:
    """The sign of the goal's gradient with respect to each input."""
    device, was_training = device_of(model), model.training
    model.eval()
    signs: list[Tensor] = []
    for part in x.split(batch_size):
        moved = part.to(device).requires_grad_()
        output: Any = model(moved)
        logits: Tensor = getattr(output, "logits", output)
        reached = logits.logsumexp(-1) if goal == "logsumexp" else logits.log_softmax(-1).amax(-1)
        (gradient,) = torch.autograd.grad(reached.sum(), moved)
        signs.append(gradient.sign().cpu())
    model.train(was_training)
    return torch.cat(signs)


def _clamped(x: Tensor, config: AttackConfig) -> Tensor:
    return x if config.low is None and config.high is None else x.clamp(config.low, config.high)


def relearn(model: nn.Module, public: Examples, config: AttackConfig) -> nn.Module:
    """A copy of the model, fine-tuned on a few public examples with full-batch Adam, in evaluation mode."""
    tuned = copy.deepcopy(model).eval().requires_grad_(True)
    parameters = list(tuned.parameters())
    optimizer = torch.optim.Adam(parameters, config.relearn_lr)

    def losses(found: Prediction) -> Tensor:
        return accuracy_losses(found.logits, found.labels)

    size = fitting_batch(tuned, public, config.micro_batch)
    for _ in range(config.relearn_steps):
        found = mean_gradient(tuned, parameters, public, losses, size)
        for parameter, gradient in zip(parameters, found.gradient, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return tuned


def probe(model: nn.Module, public: Examples, protected: Examples, config: AttackConfig) -> SetMeasures | None:
    """What a logistic regression on the penultimate layer, fitted on public examples, says of the protected ones.

    Uncertainty that lives in the last layer alone leaves the label in the layer before it. None where the model ends
    in no `nn.Linear` with an output for each class, the public examples have one class only, or labels are next tokens.
    """
    if protected.labels_of == "next-token":
        # A linear probe of a vocabulary is the model's own last layer again, and as large.
        return None
    num_classes = predict_all(model, protected.take(slice(0, 1)), 1).logits.shape[-1]
    last = last_linear(model, protected, num_classes)
    if last is None:
        return None
    # The layer hands on what it reads, so that features are cut into labels' positions as logits are.
    handle = last.register_forward_hook(lambda module, arguments, output: arguments[0])
    try:
        known, unknown = (predict_all(model, examples, config.micro_batch) for examples in (public, protected))
    finally:
        handle.remove()
    if len(known.labels.unique()) < 2:
        return None
    scaler = StandardScaler().fit(known.logits.double().numpy())
    fitted = LogisticRegression(max_iter=2000).fit(
        scaler.transform(known.logits.double().numpy()), known.labels.numpy()
    )
    told = torch.from_numpy(fitted.predict_log_proba(scaler.transform(unknown.logits.double().numpy()))).float()
    # Classes that no public example has are never predicted.
    logits = torch.full((len(unknown.labels), num_classes), -1e4)
    logits[:, torch.from_numpy(fitted.classes_).long()] = told.clamp_min(-1e4)
    return measure_predictions([Prediction(logits, unknown.labels, unknown.rows)])


@torch.no_grad()
def last_linear(model: nn.Module, examples: Examples, num_classes: int) -> nn.Linear | None:
    """The last `nn.Linear` that a forward pass runs, where it has an output for each class."""
    called: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, arguments, output: called.append(module))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    was_training = model.training
    try:
        predict(model.eval(), examples.take(slice(0, 1)).to(device_of(model)))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    last = called[-1] if called else None
    return last if isinstance(last, nn.Linear) and last.out_features == num_classes else None
