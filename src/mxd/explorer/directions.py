"""What latents write: their mean atoms, which tokens those promote, and which latents write alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.evaluation.collect import TopTable
from mxd.layers import SparseLayer

LATENTS_AT_ONCE = 2048
INPUTS_KEPT = 4
"""Contexts of each latent, the strongest, over which its atom is averaged."""


class TopInputs:
    """The layer's inputs at the strongest activations of each latent, on disk, kept up as the text is read.

    Args:
        path: The file that is made; 4 · num_latents · d_in · `INPUTS_KEPT` bytes.
        num_latents: Number of latents.
        d_in: Width of the layer's input.
    """

    def __init__(self, path: Path, num_latents: int, d_in: int) -> None:
        self._inputs = np.memmap(path, dtype=np.float32, mode="w+", shape=(num_latents, INPUTS_KEPT, d_in))
        self._values = torch.zeros(num_latents, INPUTS_KEPT)
        self._contexts = torch.zeros(num_latents, INPUTS_KEPT, dtype=torch.int64)

    def follow(self, top: TopTable, x: Float[Tensor, "contexts context d_in"], first_context: int) -> None:
        """Take over what some new contexts changed in the table.

        Args:
            top: The table of the strongest activations after them.
            x: The layer's inputs in these contexts.
            first_context: Number of the first of them.
        """
        values, contexts, positions = (column[:, :INPUTS_KEPT].cpu() for column in top)
        changed = ((values != self._values) | (contexts != self._contexts)).any(1).nonzero().squeeze(1)
        for rows in changed.split(LATENTS_AT_ONCE):
            here, before = contexts[rows], self._contexts[rows]
            # A context holds at most one place of a latent, so it tells where an input stood.
            moved_from = ((here[:, :, None] == before[:, None, :]) & (self._values[rows] > 0)[:, None, :]).int()
            held = torch.from_numpy(self._inputs[rows.numpy()])
            moved = held.gather(1, moved_from.argmax(2)[:, :, None].expand_as(held))
            fresh = (here >= first_context) & (values[rows] > 0)
            moved[fresh] = x[here[fresh] - first_context, positions[rows][fresh]].float().cpu()
            self._inputs[rows.numpy()] = moved.numpy()
        # The table's own tensors are changed in place by the next contexts.
        self._values, self._contexts = values.clone(), contexts.clone()

    @torch.no_grad()
    def mean_atoms(self, layer: SparseLayer) -> Float[Tensor, "num_latents d_out"]:
        """Return the mean of each latent's atoms at its strongest activations; 0 where it never fires."""
        parameter = layer.scorer.weight
        blocks: list[Tensor] = []
        for latents in torch.arange(len(self._inputs)).split(LATENTS_AT_ONCE):
            x = torch.from_numpy(self._inputs[latents.numpy()]).to(parameter)
            numbers = latents.to(parameter.device)[:, None, None].expand(-1, INPUTS_KEPT, 1)
            taken = (self._values[latents] > 0).to(parameter)[:, :, None]
            atoms = layer.atoms(x, numbers).squeeze(2)
            blocks.append(((atoms * taken).sum(1) / taken.sum(1).clamp_min(1)).float().cpu())
        return torch.cat(blocks)


class Neighbours(NamedTuple):
    """The latents whose mean atoms point the same way."""

    latents: Int[Tensor, "num_latents neighbours"]
    """Their numbers, the nearest first."""
    cosines: Float[Tensor, "num_latents neighbours"]
    """Cosines of the mean atoms."""


def nearest(directions: Float[Tensor, "num_latents d_out"], count: int) -> Neighbours:
    """Return for each latent the `count` others with the largest cosine, fewer where there are fewer."""
    unit = torch.nn.functional.normalize(directions, dim=1)
    count = max(min(count, len(unit) - 1), 0)
    cosines, latents = [], []
    for rows in torch.arange(len(unit)).split(LATENTS_AT_ONCE):
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -2.0
        values, indices = similarity.topk(count, dim=1)
        cosines.append(values.clamp(-1, 1))
        latents.append(indices)
    return Neighbours(torch.cat(latents), torch.cat(cosines))


class Promoted(NamedTuple):
    """Tokens whose logits a direction raises, or lowers, most."""

    tokens: Int[Tensor, "latents count"]
    """Their ids, the most changed first."""
    effects: Float[Tensor, "latents count"]
    """Change of the logit for each unit of the latent's value."""


class LogitMap(NamedTuple):
    r"""The linear effect of something added to the residual stream on the logits, past all later layers.

    $$\Delta = W_U \bar J \delta, \qquad \bar J = \frac 1 T \sum_t \frac{\partial\, \mathrm{norm}(h)}{\partial h}(h_t)$$

    The final norm is not linear: it is replaced by the mean of its Jacobians at the residual stream's final states h_t
    on some text. That applies its weights, takes out the mean where it is a LayerNorm, divides by the size that the
    stream really has, and takes out what would only make h_t longer, which the norm undoes. A direction multiplied by
    the unembedding alone has none of this right.
    """

    jacobian: Float[Tensor, "d_model d_model"]
    """The mean Jacobian, applied as `jacobian @ delta`."""
    unembedding: Float[Tensor, "vocabulary d_model"]
    """W_U."""

    def extremes(
        self, directions: Float[Tensor, "num_latents d_model"], count: int
    ) -> Iterator[tuple[Promoted, Promoted]]:
        """Yield the most promoted and the most suppressed tokens, some latents at a time and in order.

        None where the model maps its residual stream to another width before the unembedding.
        """
        count = min(count, len(self.unembedding))
        if directions.shape[1] != self.jacobian.shape[1]:
            none = Promoted(torch.empty(len(directions), 0, dtype=torch.int64), torch.empty(len(directions), 0))
            yield none, none
            return
        for block in directions.split(LATENTS_AT_ONCE // 4):
            effects = block @ self.jacobian.T @ self.unembedding.T
            raised, lowered = effects.topk(count, dim=1), effects.topk(count, dim=1, largest=False)
            yield Promoted(raised.indices, raised.values), Promoted(lowered.indices, lowered.values)


@torch.no_grad()
def logit_map(model: nn.Module, contexts: Int[Tensor, "n context"]) -> LogitMap:
    """Return the map from the residual stream to the logits, measured on some text.

    Args:
        model: A Hugging Face language model.
        contexts: The text; some thousand tokens are enough.

    Raises:
        ValueError: If the model has no output embeddings.
    """
    output = cast("nn.Module | None", model.get_output_embeddings())  # pyright: ignore[reportCallIssue]
    if output is None:
        raise ValueError(f"The model must have an unembedding; {type(model).__name__} has none. Use a language model.")
    unembedding = cast("Tensor", output.weight).detach().float().cpu()
    found = _final_norm(model, contexts)
    if found is None:
        return LogitMap(torch.eye(unembedding.shape[1]), unembedding)
    norm, states = found
    return LogitMap(_mean_jacobian(norm, states).float().cpu(), unembedding)


def _mean_jacobian(norm: nn.Module, states: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "d_model d_model"]:
    def mean_output(delta: Tensor) -> Tensor:
        return norm(states + delta).mean(0)

    jacobian: Tensor = torch.func.jacrev(mean_output, chunk_size=32)(torch.zeros_like(states[0]))  # pyright: ignore[reportAssignmentType, reportCallIssue]
    return jacobian


def _final_norm(
    model: nn.Module, contexts: Int[Tensor, "n context"]
) -> tuple[nn.Module, Float[Tensor, "tokens d_model"]] | None:
    """Return the norm that makes the model's last hidden state, and what it was given; None where there is none."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # Only the last can be the final one.
        calls[:] = [(module, args[0], output)]

    body = cast("nn.Module", model.base_model)
    norms = [module for module in body.modules() if "norm" in type(module).__name__.lower()]
    handles = [module.register_forward_hook(note) for module in norms]
    try:
        last = cast("Tensor", body(contexts, use_cache=False).last_hidden_state)
    finally:
        for handle in handles:
            handle.remove()
    if not calls or calls[0][2].shape != last.shape or not torch.equal(calls[0][2], last):
        return None
    return calls[0][0], calls[0][1].flatten(0, -2).detach()
