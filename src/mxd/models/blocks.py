"""What flows through blocks: their MLPs, and the residual stream that leaves them."""

from collections.abc import Collection
from contextlib import ExitStack, suppress
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.models.requirements import require_ids
from mxd.models.sites import find_block, hidden_part
from mxd.models.surgery import DeepestReached, capture_mlp


class BlockActivations(NamedTuple):
    """What flows through one block."""

    x: Float[Tensor, "batch seq d_in"]
    """The MLP's input."""
    target: Float[Tensor, "batch seq d_out"]
    """The MLP's output."""
    residual: Float[Tensor, "batch seq d_model"]
    """The residual stream behind the block."""


@torch.no_grad()
def block_activations(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    layers: Collection[int],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    module_path: str | None = None,
) -> dict[int, BlockActivations]:
    """Return what flows through these blocks, without gradients; the pass stops behind the deepest of them.

    Args:
        model: A Hugging Face language model.
        input_ids: Token ids.
        layers: Indices of the blocks, at least one.
        attention_mask: 1 where there is a token and 0 where there is padding; none means no padding.
        module_path: Where the MLPs are, for a family that is not listed (see `find_mlp`).

    Raises:
        TypeError: As `mlp_pairs`.
        ValueError: As `mlp_pairs`.
    """
    require_ids(input_ids)
    residuals: dict[int, Tensor] = {}
    with ExitStack() as stack:
        pairs = stack.enter_context(capture_mlp(model, layers, module_path))
        for layer in sorted(layers):
            hook = partial(_record, residuals, layer, layer == max(layers))
            stack.callback(find_block(model, layer, module_path).register_forward_hook(hook).remove)
        with suppress(DeepestReached):
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return {layer: BlockActivations(*pairs[layer], residuals[layer]) for layer in layers}


def _record(
    residuals: dict[int, Tensor], layer: int, is_last: bool, block: nn.Module, args: object, output: object
) -> None:
    residuals[layer] = hidden_part(output, f"block {layer}")
    if is_last:
        raise DeepestReached
