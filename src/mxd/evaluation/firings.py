"""Where latents fire in a text, entry by entry: for a few latents, or for a text that is not too long."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.data.tokens import content_positions
from mxd.evaluation.faithfulness import EvaluationText
from mxd.layers import SparseLayer
from mxd.models import device_of, mlp_pairs

TOKENS_AT_ONCE = 4096


class Firings(NamedTuple):
    """Every place where some latents fire, in order of latent, context and position: 16 bytes each."""

    latents: Int[Tensor, " entries"]
    """The latent that fires, as int32."""
    values: Float[Tensor, " entries"]
    """Its value, in float32, above 0."""
    contexts: Int[Tensor, " entries"]
    """The context in which it does, as int32."""
    positions: Int[Tensor, " entries"]
    """Its position in the context, as int32."""

    def of(self, latent: int) -> "Firings":
        """Return one latent's entries."""
        start, end = torch.searchsorted(self.latents, torch.tensor([latent, latent + 1], dtype=torch.int32)).tolist()
        return Firings(*(column[start:end] for column in self))

    def quantile(self, latent: int, share: float) -> float | None:
        """Return a quantile of one latent's values where it fires; None where it never does."""
        values = self.of(latent).values
        if not len(values):
            return None
        # torch.quantile takes at most 16 million values.
        ordered = values.double().sort().values
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


@torch.no_grad()
def collect_firings(
    model: nn.Module,
    layer: int,
    network: SparseLayer,
    text: EvaluationText,
    latents: Collection[int] | None = None,
) -> Firings:
    """Return where latents fire in a text, at content positions.

    Args:
        model: The language model.
        layer: Index of the block.
        network: The sparse layer.
        text: What the model reads.
        latents: Which latents; all where None.
    """
    wanted = None if latents is None else torch.tensor(sorted(latents))
    found: list[Firings] = []
    for first, contexts in text.chunks(TOKENS_AT_ONCE):
        pair = mlp_pairs(model, contexts.to(device_of(model)), [layer], module_path=text.module_path)[layer]
        code = network.encode(network.given(*pair).float())
        values, indices = code.values.cpu().float(), code.indices.cpu()
        fires = (values > 0) & content_positions(contexts, text.special_ids)[..., None]
        if wanted is not None:
            fires &= torch.isin(indices, wanted)
        context, position, slot = fires.nonzero(as_tuple=True)
        chosen = (context, position, slot)
        found.append(Firings(indices[chosen].int(), values[chosen], (context + first).int(), position.int()))
    every = Firings(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    order = torch.sort(every.latents, stable=True).indices
    return Firings(*(column[order] for column in every))
