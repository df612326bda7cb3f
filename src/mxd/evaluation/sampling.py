"""Which part of the evaluated text is looked at where all of it would be too much."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.data.tokens import content_positions
from mxd.evaluation.faithfulness import EvaluationText
from mxd.models import device_of, mlp_pairs


def evenly_spaced(available: int, wanted: int) -> Int[Tensor, " chosen"]:
    """Return which of `available` things to take: all of them, or `wanted`, evenly spaced from first to last."""
    if available <= wanted:
        return torch.arange(available)
    return torch.linspace(0, available - 1, wanted, dtype=torch.float64).round().long()


class LayerSample(NamedTuple):
    """What one MLP was given and returned at content positions of some held-out contexts."""

    x: Float[Tensor, "tokens d_in"]
    """Its inputs, in float32."""
    target: Float[Tensor, "tokens d_out"]
    """Its outputs, in float32."""
    dtype: torch.dtype
    """The type in which the model gave it its inputs."""


@torch.no_grad()
def sample_layer(model: nn.Module, layer: int, text: EvaluationText, num_tokens: int) -> LayerSample:
    """Return what the MLP of one block reads and writes in about this many tokens of the text.

    The contexts are evenly spaced, each is whole, and the model runs on them once, as far as this block.
    """
    chosen = evenly_spaced(len(text.contexts), max(1, num_tokens // text.contexts.shape[1]))
    contexts = text.contexts[chosen].to(device_of(model))
    pair = mlp_pairs(model, contexts, [layer], module_path=text.module_path)[layer]
    content = content_positions(contexts, text.special_ids)
    return LayerSample(pair.x[content].float(), pair.target[content].float(), pair.x.dtype)
