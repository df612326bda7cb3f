"""Ordinary training of a classifier: what comes before uncertainty is induced, and what the baselines do."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mxd.privacy.examples import Examples, device_of, predict


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How a classifier is trained on labelled examples; labels of examples only."""

    epochs: int = 2
    """Passes over the examples."""
    batch: int = 128
    """Examples a step."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """SGD with Nesterov's momentum of 0.9, or Adam."""
    lr: float = 2e-3
    """Largest learning rate; it rises over the first tenth of the steps and falls to 0 as a cosine."""
    weight_decay: float = 0.0
    """λ of a penalty λ/2·‖w‖² (for Adam: decoupled)."""
    mixup: float | None = None
    """α of mixup's Beta(α, α); no mixup unless given."""
    seed: int = 0
    """Of the order of the examples and of mixup."""

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch", self.batch), ("lr", self.lr)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0; got {value}.")


def fit_classifier(
    model: nn.Module,
    examples: Examples,
    config: FitConfig,
    *,
    after_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train a classifier in place by cross-entropy, and leave it in evaluation mode.

    Args:
        model: Takes the examples' inputs and returns logits.
        examples: With one label each.
        config: How.
        after_step: Called with the steps done, the steps in all and the step's loss.

    Raises:
        ValueError: If the labels are not one an example, or the loss is not finite.
    """
    if examples.labels_of != "example" or not isinstance(examples.inputs, Tensor):
        raise ValueError("ordinary training needs tensors with one label an example; got other inputs or labels.")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters, config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
        )
    generator = torch.Generator().manual_seed(config.seed)
    per_epoch = math.ceil(len(examples) / config.batch)
    total, done = config.epochs * per_epoch, 0
    model.train()
    for _ in range(config.epochs):
        order = torch.randperm(len(examples), generator=generator)
        for rows in order.split(config.batch):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * warmup_and_cosine(done, total)
            loss = _loss(model, examples.take(rows).to(device_of(model)), config.mixup, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"training must keep a finite loss; got {value} at step {done}; lower lr.")
            if after_step is not None:
                after_step(done, total, value)
    model.eval()


def warmup_and_cosine(done: int, total: int) -> float:
    """The learning rate's factor after `done` of `total` steps: up over the first tenth, then down to 0 as a cosine."""
    warmup = max(1, total // 10)
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, total - warmup)))


def _loss(model: nn.Module, batch: Examples, mixup: float | None, generator: torch.Generator) -> Float[Tensor, ""]:
    """Cross-entropy, under mixup that of a blend of each example with another (Zhang et al., 2018)."""
    if mixup is None:
        found = predict(model, batch)
        return functional.cross_entropy(found.logits, found.labels)
    assert isinstance(batch.inputs, Tensor)
    share = _beta(mixup, generator)
    other = torch.randperm(len(batch), generator=generator)
    blended = share * batch.inputs + (1 - share) * batch.inputs[other]
    found = predict(model, batch.with_inputs(blended))
    first = functional.cross_entropy(found.logits, batch.labels)
    return share * first + (1 - share) * functional.cross_entropy(found.logits, batch.labels[other])


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(α, α), seeded by the generator."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(numpy.random.default_rng(seed).beta(alpha, alpha))
