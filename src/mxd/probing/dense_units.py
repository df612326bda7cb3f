"""The best single unit of a dense layer for each concept: what single latents are compared with."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mxd.probing.examples import Parts

UNITS_AT_ONCE = 64


class Unit(NamedTuple):
    """A unit that says yes where its value, or the negative of it, reaches a threshold."""

    number: int
    """Its place in the layer."""
    sign: int
    """1, or −1 where low values say yes."""
    threshold: float
    """For the value times the sign."""


def best_units(
    values: Float[np.ndarray, "tokens width"], labels: Bool[np.ndarray, "tokens concepts"], parts: Parts
) -> list[Unit]:
    """Return, for each concept, the unit whose F1 on the validation part is largest.

    All units are tried, each with the sign that its class means have on the training part, and with the threshold that
    is best there.

    Args:
        values: The layer.
        labels: Which tokens are of which concept; each must have some in the training part, and not all.
        parts: Which tokens are for what.
    """
    best = [-1.0] * labels.shape[1]
    found = [Unit(0, 1, np.inf)] * labels.shape[1]
    for first in range(0, values.shape[1], UNITS_AT_ONCE):
        block = _Block(values[:, first : first + UNITS_AT_ONCE], parts)
        for concept in range(labels.shape[1]):
            f1, unit = block.best(labels[:, concept])
            if f1 > best[concept]:
                best[concept], found[concept] = f1, unit._replace(number=first + unit.number)
    return found


class _Block:
    """Some units, sorted once for all concepts."""

    def __init__(self, values: Float[np.ndarray, "tokens units"], parts: Parts) -> None:
        self._parts = parts
        self._train, self._validation = values[parts.train], values[parts.validation]
        self._order = np.argsort(self._train, axis=0, kind="stable")
        self._sorted = np.take_along_axis(self._train, self._order, axis=0)

    def best(self, positive: Bool[np.ndarray, " tokens"]) -> tuple[float, Unit]:
        """Return the largest F1 on the validation part, and the unit, numbered within the block."""
        train, validation = positive[self._parts.train], positive[self._parts.validation]
        signs = np.where(self._train[train].mean(axis=0) >= self._train[~train].mean(axis=0), 1, -1)
        thresholds = self._thresholds(train, signs)
        said = self._validation * signs >= thresholds
        f1 = 2 * said[validation].sum(axis=0) / np.maximum(said.sum(axis=0) + validation.sum(), 1)
        place = int(f1.argmax())
        return float(f1[place]), Unit(place, int(signs[place]), float(thresholds[place]))

    def _thresholds(self, positive: Bool[np.ndarray, " train"], signs: Int[np.ndarray, " units"]) -> np.ndarray:
        ranked = positive[self._order]
        ranked[:, signs > 0] = ranked[::-1, signs > 0]
        values = self._sorted * signs
        values[:, signs > 0] = values[::-1, signs > 0]
        hits = np.cumsum(ranked, axis=0, dtype=np.int32)
        f1 = 2 * hits / (np.arange(1, len(hits) + 1)[:, None] + positive.sum())
        # No threshold parts equal values.
        f1[:-1][values[1:] == values[:-1]] = -1
        return values[f1.argmax(axis=0), np.arange(len(signs))]
