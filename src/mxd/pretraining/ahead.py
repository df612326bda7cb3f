"""Contexts that are read and tokenised while the device computes."""

from concurrent.futures import Future, ThreadPoolExecutor, wait

from jaxtyping import Int
from torch import Tensor

from mxd.data.tokens import TokenPosition, TokenStream


class ContextsAhead:
    """Takes contexts from a stream, the next ones in a second thread where that is asked for; it changes no number.

    Args:
        tokens: The stream, which nobody else may take from.
        count: Contexts of a batch.
        ahead: Whether to take the next batch while this one is used. On a CPU it would take the model's cores.
    """

    def __init__(self, tokens: TokenStream, count: int, *, ahead: bool) -> None:
        self._tokens, self._count = tokens, count
        self._thread = ThreadPoolExecutor(1, "contexts") if ahead else None
        self._next: Future[tuple[Tensor, TokenPosition]] | None = None
        self._position = tokens.state()

    def take(self) -> Int[Tensor, "count context"]:
        """Return the next contexts; what went wrong when they were read is raised here."""
        contexts, self._position = self._read() if self._next is None else self._next.result()
        self._next = None if self._thread is None else self._thread.submit(self._read)
        return contexts

    def position(self) -> TokenPosition:
        """Return where in the text the next context is."""
        return self._position

    def restore(self, position: TokenPosition) -> None:
        """Go to a position that `position` gave."""
        if self._next is not None:
            wait([self._next])
            self._next = None
        self._tokens.restore(position)
        self._position = position

    def _read(self) -> tuple[Tensor, TokenPosition]:
        contexts = self._tokens.take(self._count)
        return contexts, self._tokens.state()
