import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int
from torch import Tensor

from mxd.data import prefetch
from mxd.data.activations import ActivationBatch, ActivationPosition, ActivationRows, ActivationStream, FetchCancelled
from mxd.data.prefetch import Prefetch
from mxd.data.tokens import LocalTokens, TokenPosition
from mxd.models import MlpPair

WAIT = 10.0
"""Seconds after which a thread that was expected to do something is taken to hang."""


class Numbers:
    """Batches that hold their own number; what stands in for the model may wait, fail or be watched."""

    def __init__(self, length: int, before: Callable[[int], None] = lambda number: None) -> None:
        self.length = length
        self.before = before
        self.number = 0
        self.fetched: list[int] = []
        self.cancelled = threading.Event()

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        self.before(self.number)
        if self.number == self.length:
            raise StopIteration
        x = torch.full((1, 1), float(self.number))
        self.fetched.append(self.number)
        self.number += 1
        return ActivationBatch({0: ActivationRows(x, x)}, torch.ones(1, dtype=torch.bool))

    def state(self) -> ActivationPosition:
        return ActivationPosition(0, self.number, TokenPosition(0, 0))

    def restore(self, position: ActivationPosition) -> None:
        self.number = position.batch
        self.cancelled.clear()

    def cancel(self) -> None:
        self.cancelled.set()


def number_of(batch: ActivationBatch) -> int:
    return int(batch.layers[0].x)


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mxd-prefetch"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def open_stream() -> ActivationStream:
    tokens = LocalTokens(np.arange(1, 500), context=8, bos=0, seed=5)

    def pairs(first: int, contexts: Int[Tensor, "n context"]) -> dict[int, MlpPair]:
        x = contexts[:, :, None].float()
        return {0: MlpPair(x, -x)}

    return ActivationStream(
        pairs,
        tokens,
        widths={0: (1, 1)},
        batch_tokens=20,
        buffer_tokens=64,
        total_tokens=200,
        forward_contexts=3,
        special_ids={0},
        seed=0,
    )


@given(depth=st.integers(1, 5), moves=st.lists(st.integers(0, 10), max_size=4))
@settings(max_examples=30, deadline=None)
def test_batches_and_positions_are_those_of_the_source_wherever_it_is_interrupted(depth: int, moves: list[int]) -> None:
    plain = open_stream()
    positions, expected = [plain.state()], [torch.empty(0)]
    for batch in plain:
        expected.append(batch.layers[0].x)
        positions.append(plain.state())
    with Prefetch(open_stream(), depth) as stream:
        for move in [0, *moves]:
            stream.restore(positions[move])
            for number in range(move, min(move + 4, 10)):
                assert stream.state() == positions[number]
                assert torch.equal(next(stream).layers[0].x, expected[number + 1])
                assert stream.state() == positions[number + 1]
    assert running() == []


def test_no_more_batches_wait_than_depth_and_none_is_fetched_past_the_end() -> None:
    source = Numbers(6)
    with Prefetch(source, depth=2) as stream:
        assert source.fetched == []
        assert number_of(next(stream)) == 0
        wait_until(lambda: source.fetched == [0, 1, 2])
        time.sleep(0.02)
        assert source.fetched == [0, 1, 2]
        assert [number_of(batch) for batch in stream] == [1, 2, 3, 4, 5]
        assert stream.state().batch == 6
        assert source.fetched == [0, 1, 2, 3, 4, 5]
        with pytest.raises(StopIteration):
            next(stream)


def test_what_the_source_raises_arrives_in_place_of_its_batch_and_it_can_be_tried_again() -> None:
    broken = {3}

    def fail(number: int) -> None:
        if number in broken:
            broken.clear()
            raise ConnectionError("the hub is gone")

    with Prefetch(Numbers(6, fail), depth=5) as stream:
        assert [number_of(next(stream)) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ConnectionError, match="the hub is gone"):
            next(stream)
        assert stream.state().batch == 3
        assert [number_of(batch) for batch in stream] == [3, 4, 5]


def test_the_next_batch_is_fetched_while_the_caller_works() -> None:
    fetched = threading.Event()
    with Prefetch(Numbers(2, lambda number: fetched.set() if number else None)) as stream:
        next(stream)
        assert fetched.wait(WAIT)


def blocking(entered: threading.Event) -> Numbers:
    """A source whose second batch takes forever unless it is cancelled."""
    source = Numbers(3)

    def block(number: int) -> None:
        if number == 1:
            entered.set()
            assert source.cancelled.wait(WAIT)
            raise FetchCancelled

    source.before = block
    return source


def test_closing_breaks_off_a_fetch_that_goes_on() -> None:
    entered = threading.Event()
    with Prefetch(blocking(entered)) as stream:
        next(stream)
        assert entered.wait(WAIT)
    assert running() == []
    stream.close()
    assert stream.state().batch == 1


def test_a_stream_that_nobody_holds_any_more_ends_its_thread() -> None:
    entered = threading.Event()
    stream = Prefetch(blocking(entered))
    next(stream)
    assert entered.wait(WAIT)
    gone = weakref.ref(stream)
    del stream
    gc.collect()
    assert gone() is None
    assert running() == []


def test_a_fetch_that_does_not_heed_is_left_behind_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefetch, "PATIENCE", 0.01)
    entered, released = threading.Event(), threading.Event()

    def hang(number: int) -> None:
        entered.set()
        assert released.wait(WAIT)

    stream = Prefetch(Numbers(3, lambda number: hang(number) if number else None))
    next(stream)
    assert entered.wait(WAIT)
    stream.close()
    assert "did not end within" in caplog.text
    released.set()
    wait_until(lambda: running() == [])


def test_the_thread_computes_with_one_thread_and_leaves_the_callers_number_alone() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    try:
        torch.set_num_threads(3)

        def look(number: int) -> None:
            # By now the caller has put its own number back.
            time.sleep(0.1)
            seen.append(torch.get_num_threads())

        with Prefetch(Numbers(2, look)) as stream:
            list(stream)
        assert torch.get_num_threads() == 3
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1, 3]


def test_a_depth_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1 batch; got 0"):
        Prefetch(Numbers(1), depth=0)
