"""What checks are made of: random parameters and inputs, a dense restatement of a layer, and what is required."""

import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mxd.layers import SparseCode, SparseLayer

EXACT = 1e-10
"""Difference allowed in float64, in units of the largest expected entry (or of 1 where that is smaller)."""
COARSE = 0.03
"""Difference allowed in bfloat16, in the same units."""


class Check(Protocol):
    """One fact that must hold of a layer."""

    __name__: str

    def __call__(self, layer: SparseLayer, *, seed: int = 0) -> None:
        """Raise an `AssertionError` if the fact does not hold."""


class Example(NamedTuple):
    """A layer to check, and what to check it on."""

    layer: SparseLayer
    """The copy."""
    x: Tensor
    """Inputs, one a row."""
    generator: torch.Generator
    """For what else is drawn."""


class Restatement(NamedTuple):
    """What a layer has to return."""

    prediction: Tensor
    """The prediction."""
    code: Tensor
    """The code, dense."""


def example(layer: SparseLayer, seed: int, tokens: int = 8) -> Example:
    """Return a float64 copy with random parameters, half of whose inputs have fewer than `k` active latents."""
    generator = torch.Generator().manual_seed(seed)
    layer = copy.deepcopy(layer).to("cpu", torch.float64).requires_grad_().eval()
    layer.zero_grad()
    with torch.no_grad():
        for buffer in layer.selection.buffers():
            buffer.fill_(COARSE / 2)  # a threshold that rounding may cross unnoticed
        for parameter in layer.parameters():
            scale = 0.3 if parameter.ndim < 2 else parameter.shape[0] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        x = torch.randn(tokens, layer.config.d_in, generator=generator, dtype=torch.float64)
        smallest = layer.pre_activations(x).topk(layer.config.k).values[:, -1].sort().values
        # Between two of them: a score of exactly zero has two one-sided derivatives.
        layer.scorer.bias.sub_(smallest[tokens // 2 - 1 : tokens // 2 + 1].mean())
    return Example(layer, x, generator)


def restate(layer: SparseLayer, x: Tensor) -> Restatement:
    """Return what the contract says that a layer returns, with all latents written out."""
    scores = layer.pre_activations(x)
    code = scores.relu() * layer.selection.kept(scores.detach(), layer.config.k)
    everyone = torch.arange(layer.config.num_latents).expand(len(x), -1)
    return Restatement(layer.base(x) + torch.einsum("tn,tno->to", code, layer.atoms(x, everyone)), code)


def gradients_of(layer: SparseLayer, x: Tensor, prediction: Tensor, code: Tensor) -> list[tuple[str, Tensor]]:
    """Return the gradients of a fixed random function of prediction and dense code."""
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        ((part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum() for part in (prediction, code)),
        start=torch.zeros((), dtype=prediction.dtype),
    )
    names, leaves = zip(("the input", x), *layer.named_parameters(), strict=True)
    return list(zip(names, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True), strict=True))


def dense_code(layer: SparseLayer, code: SparseCode) -> Tensor:
    """Return a code with all latents written out."""
    return code.dense(layer.config.num_latents)


def require_close(actual: Tensor, expected: Tensor, sentence: str, tolerance: float = EXACT) -> None:
    """Raise an `AssertionError` unless two tensors are alike.

    Args:
        actual: What was found.
        expected: What must be found.
        sentence: What must hold; what was found is added to it.
        tolerance: Difference allowed, in units of the largest expected entry, or of 1 where that is smaller.
    """
    shapes = tuple(actual.shape), tuple(expected.shape)
    require(shapes[0] == shapes[1], f"{sentence}; its shape is {shapes[0]}, not {shapes[1]}.")
    if actual.numel() == 0:
        return
    difference = float((actual - expected).detach().abs().max())
    allowed = tolerance * max(1.0, float(expected.detach().abs().max()))
    require(difference <= allowed, f"{sentence}; it is off by {difference:.2g}.")


def require(holds: bool, sentence: str) -> None:
    """Raise an `AssertionError` with this sentence unless something holds."""
    if not holds:
        raise AssertionError(sentence)
