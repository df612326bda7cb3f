"""Training on normalised inputs, without a trace of it in the layer that is saved."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.layers import LinearMap, SparseLayer
from mxd.metrics import ErrorSums


class InputNormalization(NamedTuple):
    """The shift and scale that give a layer's inputs mean 0 and mean square 1."""

    mean: Float[Tensor, " d_in"]
    """Mean input."""
    scale: Float[Tensor, ""]
    """Root mean square of the centred inputs' coordinates."""

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the normalised input."""
        return (x - self.mean) / self.scale

    def inverse(self) -> "InputNormalization":
        """Return the shift and scale that lead from normalised inputs back to plain ones."""
        return InputNormalization(-self.mean / self.scale, 1 / self.scale)


def input_normalization(sums: ErrorSums) -> InputNormalization:
    """Return the normalisation of inputs of which these are the sums (`error_sums(x, x)`), in float32.

    Raises:
        ValueError: If they do not vary or are not finite, so that there is no scale.
    """
    mean = sums.target / sums.tokens
    variance = sums.variation / sums.tokens / len(mean)
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"inputs must vary and be finite to be normalised; their variance is {variance}.")
    return InputNormalization(mean.float(), torch.tensor(variance).sqrt())


@torch.no_grad()
def fold_input_normalization_(layer: SparseLayer, normalization: InputNormalization) -> None:
    r"""Change the layer's weights so that it does on plain inputs what it did on normalised ones.

    $W^\top (x - \mu)/s + b = (W/s)^\top x + (b - W^\top \mu / s)$ for every map that reads the input.

    Raises:
        ValueError: If the layer's kind has no maps to fold into.
    """
    require_foldable([layer])
    fold_into_(layer.input_maps(), normalization)


@torch.no_grad()
def fold_into_(maps: Iterable[LinearMap], normalization: InputNormalization) -> None:
    """Change maps so that they do on plain inputs what they did on normalised ones."""
    for weight, bias in maps:
        weight /= normalization.scale.to(weight.dtype)
        bias -= normalization.mean.to(weight.dtype) @ weight


def require_foldable(layers: Iterable[SparseLayer]) -> None:
    """Check that every layer can take an input normalisation.

    Raises:
        ValueError: If a layer's kind has no maps to fold it into.
    """
    for layer in layers:
        if not layer.input_maps():
            raise ValueError(
                f"normalize-input cannot be folded into a {layer.kind}, which has no maps that take it up; "
                "train this kind in a run of its own without it."
            )
