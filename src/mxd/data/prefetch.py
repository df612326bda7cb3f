"""Batches fetched in a second thread while the ones before them are trained on."""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch

from mxd.data.activations import ActivationBatch, ActivationPosition

logger = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that closing waits for a fetch that does not heed `cancel`: a network that hangs, say."""


@runtime_checkable
class CancellableSource(Protocol):
    """A stream of activations that can be told to stop; `ActivationStream` is one."""

    def __iter__(self) -> Iterator[ActivationBatch]: ...

    def state(self) -> ActivationPosition:
        """The position of the next batch."""
        ...

    def restore(self, position: ActivationPosition) -> None:
        """Go to a position that `state` gave, also after `cancel`."""
        ...

    def cancel(self) -> None:
        """Make a fetch that goes on in another thread raise soon."""
        ...


class Prefetch(Iterator[ActivationBatch]):
    """The batches of a source, in its order, of which the next few are fetched by a thread of their own.

    Numbers and positions are the source's: `state` is the position of the batch that the caller gets next, however far
    the thread is ahead, and what the source raises is raised here in place of the batch that it stands for. While this
    is open the source belongs to the thread.

    The thread computes with one thread of PyTorch's, so that it takes no core from training but its own; where the
    number of threads decides how the language model's products round (a model that runs on the CPU), do not prefetch.

    Args:
        source: Where batches come from; used by nothing else while this is open.
        depth: Batches that wait at most.

    Raises:
        ValueError: If depth is not positive.
    """

    def __init__(self, source: CancellableSource, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1 batch; got {depth}.")
        self._source = source
        self._depth = depth
        self._position = source.state()
        self._source_is_there = True
        self._lane: _Lane | None = None
        self._finish: Callable[[], object] | None = None

    def __enter__(self) -> "Prefetch":
        """Nothing is fetched before the first batch is asked for."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> ActivationBatch:
        """Return the next batch, waiting for it if need be."""
        if self._lane is None:
            self._lane = self._open_lane()
            # At the latest when this is garbage or the process ends: a thread that still computes while the interpreter
            # is taken down would crash it. The lane does not know this object, which could never be garbage otherwise.
            self._finish = weakref.finalize(self, self._lane.close)
        fetched = self._lane.take()
        if isinstance(fetched, BaseException):
            self.close()
            raise fetched
        batch, self._position = fetched
        return batch

    def state(self) -> ActivationPosition:
        """The position of the batch that the caller gets next."""
        return self._position

    def restore(self, position: ActivationPosition) -> None:
        """Go to a position that `state` gave; batches that wait are dropped."""
        self.close()
        self._source.restore(position)
        self._position = position
        self._source_is_there = True

    def close(self) -> None:
        """End the thread and drop the batches that wait; asking for another batch goes on from `state`."""
        if self._finish is not None:
            self._finish()
            self._lane = self._finish = None
            self._source_is_there = False

    def _open_lane(self) -> "_Lane":
        if not self._source_is_there:
            self.restore(self._position)
        return _Lane(self._source, self._depth)


class _Lane:
    """One thread, and the batches that it has fetched and nobody has taken."""

    def __init__(self, source: CancellableSource, depth: int) -> None:
        self._source = source
        self._depth = depth
        self._fetched: deque[tuple[ActivationBatch, ActivationPosition] | BaseException] = deque()
        self._changed = threading.Condition()
        self._closed = False
        threads, started = torch.get_num_threads(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="mxd-prefetch", daemon=True)
        self._thread.start()
        started.wait()
        # Each thread has a number of its own, but a new one (autograd's) begins with the one that was set last.
        torch.set_num_threads(threads)

    def take(self) -> tuple[ActivationBatch, ActivationPosition] | BaseException:
        """Wait for the next batch, or what was raised instead."""
        with self._changed:
            # Windows lets no signal end a wait that has no end of its own.
            while not self._changed.wait_for(lambda: self._fetched, timeout=1.0):
                pass
            self._changed.notify_all()
            return self._fetched.popleft()

    def close(self) -> None:
        """End the thread, whatever it is doing, and drop what it fetched."""
        with self._changed:
            self._closed = True
            self._fetched.clear()
            self._changed.notify_all()
        # Garbage is collected by whichever thread happens to allocate, which may be this lane's.
        if not self._thread.is_alive() or self._thread is threading.current_thread():
            return
        self._source.cancel()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning("A fetch of activations did not end within %.0f seconds; it is left behind.", PATIENCE)

    def _run(self, started: threading.Event) -> None:
        # The first question after a thread's own number gives it the number that was set last anywhere: ask first.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.set()
        batches: Iterator[ActivationBatch] | None = None
        while self._wait_for_room():
            try:
                batches = iter(self._source) if batches is None else batches
                fetched = (next(batches), self._source.state())
            # Everything, the end of the stream too: it is the caller's to deal with.
            except BaseException as error:
                self._hand_over(error)
                return
            self._hand_over(fetched)

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._fetched) < self._depth)
            return not self._closed

    def _hand_over(self, fetched: tuple[ActivationBatch, ActivationPosition] | BaseException) -> None:
        with self._changed:
            if not self._closed:
                self._fetched.append(fetched)
                self._changed.notify_all()
