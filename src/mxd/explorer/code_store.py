"""The codes of a whole text on disk, read by token and by latent."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mxd.layers.selection import SparseCode

ENTRIES_AT_ONCE = 2**20
"""Entries of codes that are in memory at a time."""

BYTES_AN_ENTRY = 16
"""Bytes on disk of each nonzero entry: a latent, a place and a value twice, by token and by latent."""

Array = np.ndarray[Any, np.dtype[Any]]


class Entries(NamedTuple):
    """The nonzero entries of some neighbouring latents, in the order of latents and, within one, of places."""

    first: int
    """The lowest of these latents."""
    starts: Int[np.ndarray, " latents_and_end"]
    """Where the entries of each latent begin, and at last where all end."""
    places: Int[np.ndarray, " entries"]
    """Number of the token on which the latent fires, counted over all contexts."""
    values: Float[np.ndarray, " entries"]
    """The latent's value there."""

    @property
    def counts(self) -> Int[np.ndarray, " latents"]:
        """Number of entries of each latent."""
        return np.diff(self.starts)

    @property
    def owners(self) -> Int[np.ndarray, " entries"]:
        """Which of these latents each entry belongs to, counted from 0."""
        return np.repeat(np.arange(len(self.starts) - 1), self.counts)


class CodeStore:
    """Takes codes token by token, and gives them back latent by latent.

    In memory are two numbers a token or latent; the entries are in two files of 8 bytes an entry, first in the order
    of tokens and after `finish` also in that of latents. Only values above 0 are kept.

    Args:
        folder: Where the files are made.
        name: What their names begin with.
        num_places: Number of tokens, those included whose codes are never given.
        num_latents: Number of latents.
    """

    def __init__(self, folder: Path, name: str, *, num_places: int, num_latents: int) -> None:
        self._paths = {part: folder / f"{name}.{part}" for part in ("latents", "values", "places", "sorted")}
        self._row_counts = np.zeros(num_places, dtype=np.int64)
        self._firings = np.zeros(num_latents, dtype=np.int64)

    def add(self, code: SparseCode, content: Bool[Tensor, " tokens"], first_place: int) -> None:
        """Take the codes of the next tokens.

        Args:
            code: One row for each of these tokens that counts.
            content: Which of the tokens count.
            first_place: Number of the first of these tokens.
        """
        values = code.values.detach().float().cpu().numpy()
        fires = values > 0
        latents = code.indices.cpu().numpy()[fires].astype(np.int32)
        places = first_place + content.cpu().numpy().nonzero()[0]
        self._row_counts[places] = fires.sum(1)
        self._firings += np.bincount(latents, minlength=len(self._firings))
        for part, numbers in (("latents", latents), ("values", values[fires])):
            # Opened each time, so that none is left open where the reading is broken off.
            with self._paths[part].open("ab") as file:
                file.write(numbers.tobytes())

    def finish(self) -> None:
        """Put the entries in the order of latents; call it once, after the last token.

        Raises:
            OSError: If the files do not hold what was written to them.
        """
        self._row_starts = _with_end(self._row_counts)
        self._starts = _with_end(self._firings)
        total = int(self._starts[-1])
        for part in ("latents", "values"):
            _require_size(self._paths[part], 4 * total)
        self._latents = _mapped(self._paths["latents"], np.int32, total, "r")
        by_token = _mapped(self._paths["values"], np.float32, total, "r")
        self._places = _mapped(self._paths["places"], np.int32, total, "w+")
        self._values = _mapped(self._paths["sorted"], np.float32, total, "w+")
        cursor = self._starts[:-1].copy()
        for first, last in _runs(self._row_starts, ENTRIES_AT_ONCE):
            part = slice(int(self._row_starts[first]), int(self._row_starts[last]))
            order = np.argsort(self._latents[part], kind="stable")
            latents = self._latents[part][order]
            found, begins, counts = np.unique(latents, return_index=True, return_counts=True)
            targets = cursor[latents] + np.arange(len(latents)) - np.repeat(begins, counts)
            places = np.repeat(np.arange(first, last), self._row_counts[first:last])
            self._places[targets] = places[order]
            self._values[targets] = by_token[part][order]
            cursor[found] += counts

    @property
    def firings(self) -> Int[np.ndarray, " num_latents"]:
        """Number of tokens on which each latent fires."""
        return self._firings

    def by_latent(self, most_latents: int) -> Iterator[Entries]:
        """Yield the entries of all latents in order, some latents at a time.

        Args:
            most_latents: Latents at a time at most. There are fewer where they fire often; one that fires oftener than
                the memory is meant for comes alone.
        """
        for first, last in _runs(self._starts, ENTRIES_AT_ONCE, most_latents):
            part = slice(int(self._starts[first]), int(self._starts[last]))
            starts = self._starts[first : last + 1] - self._starts[first]
            yield Entries(first, starts, np.array(self._places[part]), np.array(self._values[part]))

    def active_at(
        self, places: Int[np.ndarray, " chosen"]
    ) -> tuple[Int[np.ndarray, " entries"], Int[np.ndarray, " entries"]]:
        """Return all latents that fire on these tokens, and for each of them which of the tokens it is."""
        counts = self._row_counts[places]
        which = np.repeat(np.arange(len(places)), counts)
        within = np.arange(len(which)) - np.repeat(_with_end(counts)[:-1], counts)
        return np.asarray(self._latents[self._row_starts[places][which] + within]), which


def _with_end(counts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n_and_end"]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])


def _runs(starts: Int[np.ndarray, " n_and_end"], entries: int, most: int = 2**62) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most so many entries and rows, of one row at least."""
    first, rows = 0, len(starts) - 1
    while first < rows:
        last = int(np.searchsorted(starts, starts[first] + entries, side="right")) - 1
        last = min(max(last, first + 1), first + most, rows)
        yield first, last
        first = last


def _require_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else 0
    if found != size:
        raise OSError(
            f"{path} must hold the {size} bytes that were written to it; it holds {found}: something else changed it. "
            "Collect again."
        )


def _mapped(path: Path, dtype: type[np.generic], length: int, mode: str) -> Array:
    if not length:
        # An empty file cannot be mapped.
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r" if mode == "r" else "w+", shape=(length,))
