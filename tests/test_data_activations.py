import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int
from torch import Tensor

from mxd.data.activations import ActivationBatch, ActivationPosition, ActivationStream, Blocks, FetchCancelled
from mxd.data.tokens import LocalTokens
from mxd.models import MlpPair

WIDTHS = {1: (3, 2), 4: (5, 5)}
NUM_TOKENS = 500
TABLES = {layer: tuple(torch.randn(NUM_TOKENS, width) for width in pair) for layer, pair in WIDTHS.items()}


class Model:
    """Stands for a language model whose activations depend on the token alone; layer 1's x names the token."""

    def __init__(self) -> None:
        self.seen: list[Int[Tensor, "n context"]] = []
        self.numbers: list[int] = []

    def __call__(self, first: int, contexts: Int[Tensor, "n context"]) -> Mapping[int, MlpPair]:
        self.seen.append(contexts)
        self.numbers += range(first, first + len(contexts))
        pairs = {layer: MlpPair(x[contexts], target[contexts]) for layer, (x, target) in TABLES.items()}
        names = contexts[:, :, None].expand(-1, -1, 3).float()
        return {**pairs, 1: MlpPair(names, pairs[1].target)}


def open_stream(
    model: Model,
    *,
    context: int = 8,
    batch_tokens: int = 16,
    buffer_tokens: int = 64,
    total_tokens: int = 200,
    seed: int = 0,
) -> ActivationStream:
    tokens = LocalTokens(np.arange(1, NUM_TOKENS), context=context, bos=0, seed=5)
    return ActivationStream(
        model,
        tokens,
        widths=WIDTHS,
        batch_tokens=batch_tokens,
        buffer_tokens=buffer_tokens,
        total_tokens=total_tokens,
        forward_contexts=3,
        special_ids={0},
        seed=seed,
    )


def named_tokens(batch: ActivationBatch) -> list[int]:
    return batch.layers[1].x[:, 0].int().tolist()


def equal(one: ActivationBatch, other: ActivationBatch) -> bool:
    return torch.equal(one.is_content, other.is_content) and all(
        torch.equal(a, b) for layer in one.layers for a, b in zip(one.layers[layer], other.layers[layer], strict=True)
    )


def test_a_block_is_handed_out_whole_and_in_another_order() -> None:
    model = Model()
    stream = open_stream(model)
    batches = [next(stream) for _ in range(4)]
    read = torch.cat(model.seen).flatten().tolist()
    handed_out = [token for batch in batches for token in named_tokens(batch)]
    assert len(model.seen) == 3
    assert len(read) == 64
    assert handed_out != read
    assert sorted(handed_out) == sorted(read)


def test_rows_of_all_layers_belong_to_the_same_token() -> None:
    for batch in open_stream(Model()):
        tokens = torch.tensor(named_tokens(batch))
        assert torch.equal(batch.layers[1].target, TABLES[1][1][tokens])
        assert torch.equal(batch.layers[4].x, TABLES[4][0][tokens])
        assert torch.equal(batch.layers[4].target, TABLES[4][1][tokens])
        assert torch.equal(batch.is_content, tokens != 0)


@given(
    context=st.integers(2, 30),
    batch_tokens=st.integers(1, 40),
    buffer_tokens=st.integers(1, 200),
    total_tokens=st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_the_stream_ends_after_the_total_and_wastes_less_than_a_context_a_block(
    context: int, batch_tokens: int, buffer_tokens: int, total_tokens: int
) -> None:
    model = Model()
    stream = open_stream(
        model, context=context, batch_tokens=batch_tokens, buffer_tokens=buffer_tokens, total_tokens=total_tokens
    )
    batches = list(stream)
    assert len(batches) == stream.num_batches == -(-total_tokens // batch_tokens)
    assert all(len(batch.is_content) == batch_tokens for batch in batches)
    blocks = stream.state().block + (stream.state().batch > 0)
    read = sum(contexts.numel() for contexts in model.seen)
    assert model.numbers == list(range(read // context))
    blocks_of_run = Blocks(
        batch_tokens=batch_tokens, buffer_tokens=buffer_tokens, total_tokens=total_tokens, context=context
    )
    assert len(model.numbers) == blocks_of_run.total_contexts
    assert 0 <= read - stream.num_batches * batch_tokens < blocks * context
    rows = stream.buffer_bytes // (15 * 4)
    assert rows < max(batch_tokens, min(buffer_tokens, total_tokens + batch_tokens)) + context


@given(st.integers(0, 13), st.sampled_from([16, 20, 48, 64, 1000]))
@settings(max_examples=30, deadline=None)
def test_a_restored_stream_goes_on_as_if_never_interrupted(before: int, buffer_tokens: int) -> None:
    expected = list(open_stream(Model(), buffer_tokens=buffer_tokens))
    interrupted = open_stream(Model(), buffer_tokens=buffer_tokens)
    for _ in range(before):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.state().to_json()))
    for stream in (open_stream(Model(), buffer_tokens=buffer_tokens), interrupted):
        stream.restore(ActivationPosition.from_json(state))
        assert stream.state() == ActivationPosition.from_json(state)
        rest = list(stream)
        assert len(rest) == len(expected) - before
        assert all(map(equal, rest, expected[before:]))


def test_a_cancelled_fetch_breaks_off_and_a_restored_stream_goes_on() -> None:
    expected = list(open_stream(Model()))
    stream = open_stream(Model())
    position = stream.state()
    stream.cancel()
    with pytest.raises(FetchCancelled):
        next(stream)
    stream.restore(position)
    assert all(map(equal, list(stream), expected))


def test_the_order_depends_on_the_seed_and_the_block_only() -> None:
    one, same, other = (list(open_stream(Model(), seed=seed)) for seed in (0, 0, 1))
    assert all(map(equal, one, same))
    assert not equal(one[0], other[0])
    flat = open_stream(Model(), context=8, batch_tokens=64, total_tokens=128)
    tokens = [torch.tensor(named_tokens(batch)).eq(0).nonzero().flatten().tolist() for batch in flat]
    assert tokens[0] != tokens[1]


def test_memory_is_taken_once_and_in_the_type_of_storage() -> None:
    tokens = LocalTokens(np.arange(1, NUM_TOKENS), context=8, bos=0, seed=5)
    stream = ActivationStream(
        Model(),
        tokens,
        widths=WIDTHS,
        batch_tokens=16,
        buffer_tokens=70,
        total_tokens=10**6,
        forward_contexts=3,
        special_ids=(),
        seed=0,
        dtype=torch.bfloat16,
    )
    assert stream.buffer_bytes == 64 * 15 * 2
    before = [tensor.data_ptr() for rows in stream._rows.values() for tensor in rows]
    batch = next(stream)
    for _ in range(9):
        next(stream)
    assert [tensor.data_ptr() for rows in stream._rows.values() for tensor in rows] == before
    assert batch.layers[4].target.dtype == torch.bfloat16
    # Every context begins with its BOS, which is told from content also where it is not named.
    assert torch.equal(batch.is_content, batch.layers[1].x[:, 0] != 0)


def test_what_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="must be positive; got 0, 64, 200, 3"):
        open_stream(Model(), batch_tokens=0)
    stream = open_stream(Model())
    with pytest.raises(ValueError, match="Resume with the batch, buffer"):
        stream.restore(ActivationPosition(0, 4, stream.state().tokens))
