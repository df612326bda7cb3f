"""Stop between two steps instead of in the middle of one, and at once while the next one's data are waited for."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal arrived where one ends the work at once."""


class StopRequest:
    """Whether the process was asked to stop; the loop looks at it between steps."""

    requested: str | None
    """Name of the first signal that arrived, such as "SIGINT"; None as long as there was none."""

    def __init__(self) -> None:
        self.requested = None
        self._interrupts = 0
        self._heeds_at_once = False

    @contextmanager
    def at_once(self) -> Generator[None, None, None]:
        """Within it a signal, also one that arrived before, raises `Stopped` instead of waiting to be polled.

        For work whose result may be lost, such as fetching data over a network that hangs.
        """
        self._heeds_at_once = True
        try:
            if self.requested is not None:
                raise Stopped
            yield
        finally:
            self._heeds_at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.requested = self.requested or name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self._heeds_at_once:
            raise Stopped


@contextmanager
def interruptible() -> Generator[StopRequest, None, None]:
    """Turn SIGINT and SIGTERM into a request that the loop polls; a second SIGINT raises KeyboardInterrupt at once.

    The handlers that were there before come back at the end. A signal that is ignored (as under
    nohup or in a background job) stays ignored. Outside the main thread, where Python delivers no
    signals, nothing is changed and no request ever comes.

    Example:
        >>> with interruptible() as stop:
        ...     steps = 0
        ...     while steps < 3 and stop.requested is None:
        ...         steps += 1
        >>> steps
        3
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    # None is a handler that was not installed from Python and could not be put back.
    replaced = {number: handler for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in replaced:
            signal.signal(number, stop._receive)
        yield stop
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
