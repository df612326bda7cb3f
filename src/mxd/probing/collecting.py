"""Running a model over texts, and keeping of its layers what probes are fitted on: sparse codes stay sparse."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mxd.data.tokenization import Tokenizer, bos_token
from mxd.data.tokens import special_tokens
from mxd.evaluation.faithfulness import Candidate
from mxd.layers import MlpWeights
from mxd.models import BlockActivations, block_activations, device_of, find_mlp, hidden_units, mlp_weights

BATCH_TOKENS = 4096
"""Tokens of one pass of the model."""

HIDDEN, RESIDUAL = "dense hidden", "residual stream"
"""What a layer's sparse codes are compared with: the hidden units of the model's own MLP, and what leaves the block."""

Report = Callable[[str, int, int], None]
"""Is told what is being done, how far it is, and how far it goes."""


def say_nothing(doing: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, eq=False)
class Probed:
    """The model and the layers that are probed."""

    model: nn.Module
    """The language model."""
    tokenizer: Tokenizer
    """Its tokenizer."""
    students: Sequence[Candidate]
    """The sparse layers, each named `<layer>/<id>`."""
    context: int
    """Tokens of one context, the one that begins it counted."""
    module_path: str | None = None
    """Where the MLPs are, in a family that is not listed."""

    @property
    def layers(self) -> list[int]:
        """The blocks that have students."""
        return sorted({student.layer for student in self.students})

    @property
    def bos(self) -> int | None:
        """The token that begins a context."""
        return bos_token(self.tokenizer)

    @property
    def body(self) -> int:
        """Tokens of text in a context."""
        return self.context - (self.bos is not None)

    def content(self, ids: Int[np.ndarray, " tokens"]) -> Bool[np.ndarray, " tokens"]:
        """Return which tokens are content: all but BOS and padding, should a text hold them."""
        return ~np.isin(ids, sorted(special_tokens(self.tokenizer)))

    @cached_property
    def mlps(self) -> dict[int, tuple[MlpWeights, str | None]]:
        """The weights of each layer's MLP, with its activation, where it is dense maps that can be read."""
        found: dict[int, tuple[MlpWeights, str | None]] = {}
        for layer in self.layers:
            site = find_mlp(self.model, layer, self.module_path)
            try:
                found[layer] = (mlp_weights(site), site.activation)
            except ValueError:
                # A mixture of experts, say, has no hidden layer to compare with.
                continue
        return found


class Dense(NamedTuple):
    """What dense features there are of some tokens, by `<layer>/<name>`."""

    name: str
    """The layer and what it is."""
    values: Float[Tensor, "positions width"]
    """Its values, in float32."""


class Entries(NamedTuple):
    """The nonzero entries of a student's codes."""

    name: str
    """The student, `<layer>/<id>`."""
    positions: Int[np.ndarray, " entries"]
    """Number of the position among those asked for."""
    latents: Int[np.ndarray, " entries"]
    """The latent."""
    values: Float[np.ndarray, " entries"]
    """Its value, above 0."""


class Flow(NamedTuple):
    """What flowed through the layers at some positions of one batch."""

    dense: Iterator[Dense]
    """The dense features, layer by layer; to be read before `codes`, or not at all."""
    codes: Iterator[Entries]
    """The codes of all students, one after the other."""


def flow(
    probed: Probed, contexts: Sequence[Int[np.ndarray, " _tokens"]], wanted: Sequence[Bool[np.ndarray, " _tokens"]]
) -> Flow:
    """Run the model on a batch and return what flows through its layers.

    Args:
        probed: The model and the layers.
        contexts: Token ids, without BOS; each at most `probed.body` long.
        wanted: At which of each context's tokens to look; positions count through these, context after context.
    """
    ids, mask, chosen = _padded(probed, contexts, wanted)
    seen = block_activations(probed.model, ids, probed.layers, mask, probed.module_path)
    return Flow(_dense(probed, seen, chosen), _codes(probed, seen, chosen))


class _Padded(NamedTuple):
    ids: Int[Tensor, "batch seq"]
    mask: Int[Tensor, "batch seq"]
    chosen: Bool[Tensor, "batch seq"]


def _padded(
    probed: Probed, contexts: Sequence[Int[np.ndarray, " _tokens"]], wanted: Sequence[Bool[np.ndarray, " _tokens"]]
) -> _Padded:
    device = device_of(probed.model)
    first = int(probed.bos is not None)
    width = first + max(map(len, contexts))
    ids = np.zeros((len(contexts), width), dtype=np.int64)
    mask, chosen = np.zeros_like(ids), np.zeros(ids.shape, dtype=bool)
    for row, (context, which) in enumerate(zip(contexts, wanted, strict=True)):
        end = first + len(context)
        ids[row, first:end], mask[row, :end], chosen[row, first:end] = context, 1, which
    if probed.bos is not None:
        ids[:, 0] = probed.bos
    return _Padded(*(torch.from_numpy(array).to(device) for array in (ids, mask, chosen)))


def _dense(probed: Probed, seen: Mapping[int, BlockActivations], chosen: Tensor) -> Iterator[Dense]:
    for layer in probed.layers:
        if layer in probed.mlps:
            weights, activation = probed.mlps[layer]
            yield Dense(f"{layer}/{HIDDEN}", hidden_units(weights, seen[layer].x[chosen].float(), activation))
        yield Dense(f"{layer}/{RESIDUAL}", seen[layer].residual[chosen].float())


def _codes(probed: Probed, seen: Mapping[int, BlockActivations], chosen: Tensor) -> Iterator[Entries]:
    for student in probed.students:
        network = student.network
        given = network.given(seen[student.layer].x, seen[student.layer].target)
        with torch.no_grad():
            code = network.encode(given[chosen].float())
        positions, slots = (code.values > 0).nonzero(as_tuple=True)
        yield Entries(
            student.name,
            positions.cpu().numpy(),
            code.indices[positions, slots].cpu().numpy(),
            code.values[positions, slots].float().cpu().numpy(),
        )
