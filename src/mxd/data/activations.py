"""Shuffled batches of an MLP's inputs and outputs, from blocks that can be computed again."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mxd.data.tokens import TokenPosition, TokenStream, content_positions
from mxd.models import MlpPair

Pairs = Callable[[int, Int[Tensor, "n context"]], Mapping[int, MlpPair]]
"""Returns what flows through each layer's MLP on consecutive contexts, the first of which has this number."""


class FetchCancelled(Exception):
    """A batch is not wanted any more."""


class ActivationRows(NamedTuple):
    """What one layer's MLP read and wrote at the tokens of a batch."""

    x: Float[Tensor, "batch d_in"]
    """The MLP's input."""
    target: Float[Tensor, "batch d_out"]
    """The MLP's output."""


class ActivationBatch(NamedTuple):
    """One training batch: the same tokens at every layer."""

    layers: dict[int, ActivationRows]
    """Rows by layer."""
    is_content: Bool[Tensor, " batch"]
    """False at BOS, padding and what begins a context, which training uses and reconstruction metrics leave out."""


class StreamState(TypedDict):
    """An `ActivationPosition` as JSON."""

    block: int
    batch: int
    tokens: dict[str, int]


class ActivationPosition(NamedTuple):
    """How far an `ActivationStream` has been read."""

    block: int
    """Number of the block."""
    batch: int
    """Number of the next batch within the block."""
    tokens: TokenPosition
    """Where the block's tokens begin."""

    def to_json(self) -> StreamState:
        """The position in types of JSON."""
        return {"block": self.block, "batch": self.batch, "tokens": self.tokens._asdict()}

    @classmethod
    def from_json(cls, state: StreamState) -> "ActivationPosition":
        """Read what `to_json` wrote."""
        return cls(state["block"], state["batch"], TokenPosition(**state["tokens"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """How the contexts of a run fall into blocks: plain arithmetic, so that every context has a number.

    Block b begins at context `b * contexts`, whatever has been read before.
    """

    batch_tokens: int
    """Rows of a batch."""
    buffer_tokens: int
    """Rows of a block at most; at least one batch is."""
    total_tokens: int
    """Tokens to train on; rounded up to whole batches."""
    context: int
    """Tokens of a context."""

    @property
    def num_batches(self) -> int:
        """Batches from beginning to end."""
        return ceil(self.total_tokens / self.batch_tokens)

    @property
    def batches(self) -> int:
        """Batches of a block; the last block may have fewer."""
        return min(self.num_batches, max(1, self.buffer_tokens // self.batch_tokens))

    @property
    def contexts(self) -> int:
        """Contexts of a block; the last block may have fewer."""
        return self.contexts_for(self.batches)

    @property
    def total_contexts(self) -> int:
        """Contexts from beginning to end."""
        whole, rest = divmod(self.num_batches, self.batches)
        return whole * self.contexts + self.contexts_for(rest)

    def contexts_for(self, batches: int) -> int:
        """Contexts that fill so many batches."""
        return ceil(batches * self.batch_tokens / self.context)


class ActivationStream(Iterator[ActivationBatch]):
    """Batches of activations, shuffled in blocks, and resumable bit for bit without storing any activation.

    A block is a whole number of batches, as many as fit into `buffer_tokens`. The activations of its contexts are asked
    for, its rows (one a token) are put in an order drawn from `(seed, block)`, and it is handed out batch by batch
    before the next one is computed. Where the length of a context does not divide the block, the rows left over, fewer
    than a context, are used by no batch. Memory is one block, allocated at once and filled in place.

    Args:
        pairs: Gives each layer's MLP input and output on contexts: runs the model, or reads what is stored. It must be
            deterministic.
        tokens: Where the contexts come from.
        widths: Layer to the widths `(d_in, d_out)` of its MLP.
        batch_tokens: Rows of a batch.
        buffer_tokens: Rows to shuffle together at most; at least one batch is.
        total_tokens: Tokens to train on; rounded up to whole batches, after which the stream ends.
        forward_contexts: Contexts to ask for at once.
        special_ids: Tokens that are no content.
        seed: Seed of the orders.
        dtype: Type in which activations are kept and handed out.
        device: Where they are kept and handed out.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(
        self,
        pairs: Pairs,
        tokens: TokenStream,
        *,
        widths: Mapping[int, tuple[int, int]],
        batch_tokens: int,
        buffer_tokens: int,
        total_tokens: int,
        forward_contexts: int,
        special_ids: Collection[int],
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = (batch_tokens, buffer_tokens, total_tokens, forward_contexts)
        if min(sizes) < 1:
            raise ValueError(
                "batch_tokens, buffer_tokens, total_tokens and forward_contexts must be positive; "
                f"got {', '.join(map(str, sizes))}. Choose at least 1 for each."
            )
        self._pairs = pairs
        self._tokens = tokens
        self._batch_tokens = batch_tokens
        self._forward_contexts = forward_contexts
        self._special_ids = special_ids
        self._seed = seed
        self._blocks = Blocks(
            batch_tokens=batch_tokens, buffer_tokens=buffer_tokens, total_tokens=total_tokens, context=tokens.context
        )
        self.num_batches = self._blocks.num_batches
        """Batches from beginning to end."""
        rows = self._blocks.contexts * tokens.context
        self._rows = {
            layer: ActivationRows(*(torch.empty(rows, width, dtype=dtype, device=device) for width in pair))
            for layer, pair in widths.items()
        }
        self._is_content = torch.empty(rows, dtype=torch.bool, device=device)
        self._order: Int[Tensor, " rows"] | None = None
        self._cancelled = False
        # Whether a block was left half filled, and the tokens stand somewhere within or behind it. They go back when
        # the block is asked for again: to go back may mean to read from the network that has just failed.
        self._is_torn = False
        self._position = ActivationPosition(0, 0, tokens.state())

    @property
    def buffer_bytes(self) -> int:
        """Bytes that the block's activations take."""
        return sum(tensor.nbytes for rows in self._rows.values() for tensor in rows)

    def state(self) -> ActivationPosition:
        """The position of the next batch."""
        return self._position

    def restore(self, position: ActivationPosition) -> None:
        """Go to a position that `state` gave, of a stream built in the same way; the next batch recomputes its block.

        Raises:
            ValueError: If no such stream has this position.
        """
        if not 0 <= position.batch < self._blocks.batches or position.block < 0:
            raise ValueError(
                f"A position must lie within a block of {self._blocks.batches} batches; got {position}. "
                "Resume with the batch, buffer and number of tokens that the run began with."
            )
        self._tokens.restore(position.tokens)
        self._position = position
        self._order = None
        self._cancelled = self._is_torn = False

    def cancel(self) -> None:
        """Make a fetch that goes on in another thread end soon, with `FetchCancelled`; `restore` allows new ones."""
        self._cancelled = True

    def __next__(self) -> ActivationBatch:
        """Return the next batch, asking for activations where a block begins."""
        block, batch, _ = self._position
        batches = min(self._blocks.batches, self.num_batches - block * self._blocks.batches)
        if batch >= batches:
            raise StopIteration
        if self._order is None:
            if self._is_torn:
                self._tokens.restore(self._position.tokens)
            self._is_torn = True
            self._order = self._fill(block, batches)
            self._is_torn = False
        chosen = self._order[batch * self._batch_tokens : (batch + 1) * self._batch_tokens]
        layers = {
            layer: ActivationRows(*(tensor.index_select(0, chosen) for tensor in rows))
            for layer, rows in self._rows.items()
        }
        is_content = self._is_content.index_select(0, chosen)
        if batch + 1 < self._blocks.batches:
            self._position = self._position._replace(batch=batch + 1)
        else:
            self._position = ActivationPosition(block + 1, 0, self._tokens.state())
            self._order = None
        return ActivationBatch(layers, is_content)

    @torch.no_grad()
    def _fill(self, block: int, batches: int) -> Int[Tensor, " rows"]:
        contexts = self._tokens.take(self._blocks.contexts_for(batches))
        self._is_content[: contexts.numel()] = content_positions(contexts, self._special_ids).flatten()
        for first in range(0, len(contexts), self._forward_contexts):
            if self._cancelled:
                raise FetchCancelled
            chunk = contexts[first : first + self._forward_contexts]
            start = first * self._tokens.context
            captured = self._pairs(block * self._blocks.contexts + first, chunk)
            for layer, rows in self._rows.items():
                for kept, new in zip(rows, captured[layer], strict=True):
                    kept[start : start + chunk.numel()] = new.flatten(0, 1)
        # numpy's generator takes both numbers as a seed; torch's would need them mixed into one.
        order = np.random.default_rng([self._seed, block]).permutation(contexts.numel())
        return torch.from_numpy(order).to(self._is_content.device)
