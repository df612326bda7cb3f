"""A model on its way to uncertainty: one step after another, and all that a step depends on."""

import copy
import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
import tyro
from torch import Tensor, nn

from mxd.atomic import JSON
from mxd.privacy.examples import Examples, Prediction, fitting_batch
from mxd.privacy.fitting import warmup_and_cosine
from mxd.privacy.gradients import dot, mean_gradient, project_onto_ball_, symmetric_surgery
from mxd.privacy.measures import measure_set
from mxd.privacy.objective import ObjectiveConfig, accuracy_losses, uniformity_losses
from mxd.runs.faults import TrainingFault
from mxd.runs.snapshots import Snapshot

logger = logging.getLogger(__name__)
DECAY_STEP, DECAY_FACTOR = 30, 0.2
"""The schedule "step": from which step on the learning rate is multiplied by what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InduceConfig:
    """How uncertainty is induced."""

    objective: Annotated[ObjectiveConfig, tyro.conf.arg(name="")] = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    steps: int = 200
    """Optimiser steps, at most."""
    retained_batch: int | None = None
    """Retained examples a step, in an order reshuffled every pass; all of them, accumulated, unless given."""
    protected_batch: int | None = None
    """Protected examples a step; all of them unless given."""
    micro_batch: int = 256
    """Examples in memory at a time, fewer where classes are a whole vocabulary; changes nothing but rounding."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum, or Adam."""
    lr: float = 0.1
    """Learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    schedule: Literal["constant", "step", "cosine"] = "constant"
    """Over the steps: constant; step, a fifth from step 30 on, as released; cosine, after a rise of a tenth."""
    surgery: bool = True
    """Whether the part of each of the two gradients that works against the other is taken out."""
    max_norm: float | None = None
    """C: after every step all trained weights, as one vector, are shrunk to this length at most. Off unless given."""
    validation_fraction: float = 0.1
    """Share of the retained examples that is set aside to choose the model by, unless validation examples are given."""
    check_every: int = 10
    """Steps between two checks of confidence distance and validation accuracy."""
    max_accuracy_drop: float = 0.002
    """Most validation accuracy that the chosen model may have lost, as a share: 0.002 is 0.2 points."""
    min_accuracy: float | None = None
    """Least validation accuracy of the chosen model, instead of max_accuracy_drop."""
    target_distance: float | None = None
    """Stop at the first check that is accurate enough with a confidence distance of at most this. Off unless given."""
    patience: int | None = None
    """Stop after so many checks in a row without a better model. Off unless given."""
    seed: int = 0
    """Of the split and of the order of examples."""

    def __post_init__(self) -> None:
        for name in ("steps", "retained_batch", "protected_batch", "micro_batch", "check_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1; got {value}.")
        for name in ("lr", "max_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name.replace('_', '-')} must be a number above 0; got {value}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1); got {self.momentum}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation-fraction must lie between 0 and 1; got {self.validation_fraction}.")
        for name in ("max_accuracy_drop", "min_accuracy", "target_distance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name.replace('_', '-')} must lie in [0, 1]; got {value}.")


class Check(NamedTuple):
    """What one look at the model found."""

    step: int
    """Optimiser steps taken."""
    confidence_distance: float
    """Mean on the protected examples."""
    validation_accuracy: float
    """On retained examples that no step has seen."""


class Sets(NamedTuple):
    """The examples of a request, told apart."""

    protected: Examples
    """To be uniform on."""
    retained: Examples
    """To stay accurate on."""
    validation: Examples
    """To choose by."""


class Induced(NamedTuple):
    """A model with uncertainty induced."""

    model: nn.Module
    """The chosen model, in evaluation mode; the one that was given is unchanged."""
    chosen: Check
    """The check it was chosen at; step 0 is the model as given."""
    checks: tuple[Check, ...]
    """All checks."""
    least_accuracy: float
    """Validation accuracy below which no model was chosen."""


class Tuning:
    """A model on its way: weights, optimiser, checks and the best weights so far.

    Everything that a step reads is a function of the request and of this state, so that a copy restored from `tensors`
    and `state` goes on bit for bit.
    """

    def __init__(self, model: nn.Module, sets: Sets, config: InduceConfig) -> None:
        self.model = copy.deepcopy(model).eval()
        self.sets, self.config, self.done = sets, config, 0
        self._named = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self._parameters = list(self._named.values())
        pair = (sets.protected, sets.retained)
        self._micro_batch = min(fitting_batch(self.model, examples, config.micro_batch) for examples in pair)
        if config.optimizer == "sgd":
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self._parameters, config.lr, momentum=config.momentum
            )
        else:
            self._optimizer = torch.optim.Adam(self._parameters, config.lr)
        self._orders = {name: Order(len(getattr(sets, name)), config.seed) for name in ("protected", "retained")}
        self.checks: list[Check] = []
        self.best = self._look()
        self._best_weights = [value.detach().clone() for value in self._parameters]
        given = config.min_accuracy
        # A share of whole examples: what is meant to be equal must not differ by rounding.
        self.least = self.best.validation_accuracy - config.max_accuracy_drop - 1e-9 if given is None else given

    def step(self) -> dict[str, float]:
        """Take one step, look at the model where that is due, and return what there is to log."""
        objective, batch = self.config.objective, self._micro_batch
        protected, retained = self._batch("protected"), self._batch("retained")
        theta = objective.theta

        def uniform_losses(found: Prediction) -> Tensor:
            return theta * uniformity_losses(found.logits, objective.uniformity)

        def accurate_losses(found: Prediction) -> Tensor:
            return (1 - theta) * accuracy_losses(found.logits, found.labels)

        uniform = mean_gradient(self.model, self._parameters, protected, uniform_losses, batch)
        accurate = mean_gradient(self.model, self._parameters, retained, accurate_losses, batch)
        value = uniform.loss + accurate.loss + 0.5 * objective.weight_decay * dot(self._parameters, self._parameters)
        if not math.isfinite(value):
            raise TrainingFault(f"the objective must stay finite; it is {value} at step {self.done + 1:,}; lower lr.")
        parts = symmetric_surgery(uniform.gradient, accurate.gradient)
        pair = (parts.uniform, parts.accurate) if self.config.surgery else (uniform.gradient, accurate.gradient)
        self._move(*pair)
        self.done += 1
        record = {
            "objective": value,
            "uniformity_loss": uniform.loss / theta,
            "accuracy_loss": accurate.loss / (1 - theta),
            "cosine": parts.cosine,
        }
        if self.done % self.config.check_every == 0 or self.done == self.config.steps:
            found = self._look()
            record |= {
                "confidence_distance": found.confidence_distance,
                "validation_accuracy": found.validation_accuracy,
            }
            if found.validation_accuracy >= self.least and not self._beaten(found):
                self.best = found
                self._best_weights = [value.detach().clone() for value in self._parameters]
        return record

    def _beaten(self, found: Check) -> bool:
        enough = self.best.validation_accuracy >= self.least
        return enough and self.best.confidence_distance <= found.confidence_distance

    def finished(self) -> bool:
        """Whether there is nothing more to do."""
        config = self.config
        if self.done >= config.steps:
            return True
        reached = config.target_distance is not None and (
            self.best.validation_accuracy >= self.least and self.best.confidence_distance <= config.target_distance
        )
        since = sum(check.step > self.best.step for check in self.checks)
        return reached or (config.patience is not None and since >= config.patience)

    def result(self) -> Induced:
        """The chosen model."""
        with torch.no_grad():
            for parameter, weights in zip(self._parameters, self._best_weights, strict=True):
                parameter.copy_(weights)
        if self.best.step == 0:
            logger.warning(
                "No check kept a validation accuracy of %.4f with a lower confidence distance: the model is as it was. "
                "Take more steps, another theta or learning rate, or allow a larger drop.",
                self.least,
            )
        return Induced(self.model, self.best, tuple(self.checks), self.least)

    def tensors(self) -> dict[str, Tensor]:
        """All that a step changes."""
        found: dict[str, Tensor] = {}
        for (name, parameter), best in zip(self._named.items(), self._best_weights, strict=True):
            found[f"weights/{name}"], found[f"best/{name}"] = parameter, best
            for key, value in self._optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    found[f"optimizer/{key}/{name}"] = value
        return found

    def state(self) -> dict[str, JSON]:
        """What else a step changes."""
        return {"checks": [list(check) for check in self.checks], "best": list(self.best), "least": self.least}

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Go on where a snapshot was taken."""
        keys = {name.split("/", 2)[1] for name in snapshot.tensors if name.startswith("optimizer/")}
        for place, (name, parameter) in enumerate(self._named.items()):
            parameter.copy_(snapshot.tensors[f"weights/{name}"])
            self._best_weights[place] = snapshot.tensors[f"best/{name}"].to(parameter.device)
            for key in keys:
                # Adam counts its steps on the CPU, wherever the weights are.
                value = snapshot.tensors[f"optimizer/{key}/{name}"]
                self._optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
        state = cast("dict[str, Any]", snapshot.state)
        self.checks = [Check(*check) for check in state["checks"]]
        self.best, self.least, self.done = Check(*state["best"]), state["least"], snapshot.step

    def _batch(self, name: Literal["protected", "retained"]) -> Examples:
        examples: Examples = getattr(self.sets, name)
        size: int | None = getattr(self.config, f"{name}_batch")
        return (
            examples
            if size is None or size >= len(examples)
            else examples.take(self._orders[name].rows(self.done, size))
        )

    @torch.no_grad()
    def _move(self, uniform: Sequence[Tensor], accurate: Sequence[Tensor]) -> None:
        decay, config = self.config.objective.weight_decay, self.config
        for parameter, u, c in zip(self._parameters, uniform, accurate, strict=True):
            parameter.grad = (u + c).add_(parameter, alpha=decay)
        for group in self._optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(config, self.done)
        self._optimizer.step()
        if config.max_norm is not None:
            project_onto_ball_(self._parameters, config.max_norm)

    def _look(self) -> Check:
        size = self.config.micro_batch
        told, held_out = (measure_set(self.model, of, size) for of in (self.sets.protected, self.sets.validation))
        check = Check(self.done, told.confidence_distance, held_out.accuracy)
        self.checks.append(check)
        return check


def lr_factor(config: InduceConfig, step: int) -> float:
    """By what the learning rate is multiplied at a step, counted from 0."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return DECAY_FACTOR if step >= DECAY_STEP else 1.0
    return warmup_and_cosine(step, config.steps)


class Order:
    """Which examples a step takes: each pass over them in a new order, which depends on seed and pass alone."""

    def __init__(self, length: int, seed: int) -> None:
        self._length, self._seed = length, seed
        self._pass, self._order = -1, torch.empty(0, dtype=torch.long)

    def rows(self, step: int, size: int) -> Tensor:
        """The rows of a step."""
        per_pass = math.ceil(self._length / size)
        number, place = divmod(step, per_pass)
        if number != self._pass:
            seed = int.from_bytes(hashlib.sha256(f"{self._seed} {number}".encode()).digest()[:7], "big")
            self._order = torch.randperm(self._length, generator=torch.Generator().manual_seed(seed))
            self._pass = number
        # Nearly equal parts: a last one of a single example would weigh as much as a whole batch.
        return self._order.tensor_split(per_pass)[place]
