"""Gradients of means over whole sets, however they are cut, and what to do when two of them disagree."""

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mxd.privacy.examples import Examples, Prediction, device_of, predict

Losses: TypeAlias = Callable[[Prediction], Float[Tensor, " counted"]]
"""The loss of each label that counts."""


class MeanGradient(NamedTuple):
    """A mean loss and its gradient."""

    loss: float
    """Mean over all labels that count."""
    gradient: list[Tensor]
    """One tensor a parameter; zeros for a parameter that the loss does not reach."""


def mean_gradient(
    model: nn.Module, parameters: Sequence[nn.Parameter], examples: Examples, losses: Losses, batch_size: int
) -> MeanGradient:
    """The gradient of a mean loss over all the examples, accumulated over batches.

    Each batch adds its sum divided by the number of labels of the whole set, so that the last, smaller batch weighs
    what it should.

    Args:
        model: In the mode in which it is meant: batch normalisation with batch statistics is not a mean over examples.
        parameters: With respect to which.
        examples: The whole set.
        losses: The loss of each label.
        batch_size: Examples in memory at a time.
    """
    # A small batch of sequences may hold no position that counts; its gradient is 0.
    device, counted = device_of(model), max(examples.num_counted, 1)
    means: list[Tensor] = []
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in examples.batches(batch_size):
        mean = losses(predict(model, batch.to(device))).sum() / counted
        found = torch.autograd.grad(mean, parameters, allow_unused=True, materialize_grads=True)
        for accumulated, gradient in zip(total, found, strict=True):
            accumulated += gradient
        means.append(mean.detach())
    # Read at the end: the device need not wait between batches.
    return MeanGradient(sum((mean.item() for mean in means), 0.0), total)


class Surgery(NamedTuple):
    """Two gradients after their conflict is taken out."""

    uniform: list[Tensor]
    """That of the uniformity."""
    accurate: list[Tensor]
    """That of the accuracy."""
    cosine: float
    """Of the angle between the two as they came; below 0 they disagreed. 0 where one is 0."""


def symmetric_surgery(uniform: Sequence[Tensor], accurate: Sequence[Tensor]) -> Surgery:
    r"""Where two gradients point against each other, take out of each its part along the other.

    $$g_u \leftarrow g_u - \frac{g_u \cdot g_c}{\|g_c\|^2} g_c, \qquad
      g_c \leftarrow g_c - \frac{g_u \cdot g_c}{\|g_u\|^2} g_u \qquad \text{if } g_u \cdot g_c < 0,$$

    both from the gradients as they came (PCGrad, Yu et al., 2020): the order does not matter, and the
    sum of the two increases neither loss to first order.

    Args:
        uniform: g_u, a tensor a parameter.
        accurate: g_c, of the same shapes.
    """
    product, squared_u, squared_c = dot(uniform, accurate), dot(uniform, uniform), dot(accurate, accurate)
    norms = (squared_u * squared_c) ** 0.5
    cosine = product / norms if norms > 0 else 0.0
    # A gradient whose square is no normal number is 0 for all purposes, and would be divided by.
    if not (product < 0 and min(squared_u, squared_c) >= sys.float_info.min):
        return Surgery(list(uniform), list(accurate), cosine)
    return Surgery(
        [u - (product / squared_c) * c for u, c in zip(uniform, accurate, strict=True)],
        [c - (product / squared_u) * u for u, c in zip(uniform, accurate, strict=True)],
        cosine,
    )


def dot(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    """The inner product of two lists of tensors, summed in float64."""
    products = [(_in_float64(a) * _in_float64(b)).sum() for a, b in zip(first, second, strict=True)]
    return float(functools.reduce(operator.add, products)) if products else 0.0


def _in_float64(tensor: Tensor) -> Tensor:
    # Apple's devices have no float64.
    return (tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()).double()


@torch.no_grad()
def project_onto_ball_(parameters: Sequence[Tensor], radius: float) -> None:
    """Shrink all the tensors by one factor, so that as one vector they are at most `radius` long."""
    length = dot(parameters, parameters) ** 0.5
    if length > radius:
        for parameter in parameters:
            parameter.mul_(radius / length)
