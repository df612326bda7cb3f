"""How sure a number is: 95 % intervals over evaluation documents and over seeds."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Interval: TypeAlias = tuple[float, float]
"""The lower and the upper end."""

RESAMPLES = 1000
"""Times that the evaluation documents are drawn anew: the ends of an interval then wander by about a twentieth of
its half width with the seed of the drawing."""

_T_QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)
"""The 97.5 % quantiles of Student's t with 1, 2, … 20 degrees of freedom. With more, the last one is taken, which makes
the interval at most 7 % too wide."""


def resampled_sums(
    sums: Float[Tensor, "documents columns"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[Tensor, "resamples columns"]:
    """Return the sums over documents of texts that could as well have been evaluated, in float64.

    Each resample draws as many documents as there are, with replacement, and sums all columns over the same draw: what
    is compared within it is compared on the same text. Memory does not grow with documents times resamples.

    Args:
        sums: A document's sums of whatever is measured, such as its tokens and its losses.
        resamples: How many texts to draw.
        seed: Seed of the drawing, which is the same on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    sums, documents = sums.cpu().double(), len(sums)
    drawn: list[Tensor] = []
    for _ in range(resamples):
        chosen = torch.randint(documents, (documents,), generator=generator)
        drawn.append(torch.bincount(chosen, minlength=documents).double() @ sums)
    return torch.stack(drawn)


def percentile_interval(values: Float[Tensor, " resamples"], *, tail: float = 0.025) -> Interval | None:
    """Return the range that holds the middle of what resamples gave; None where a value is not finite.

    Args:
        values: What the resamples gave.
        tail: Share of them that is left out at either end: .025 for the middle 95 %.
    """
    if not bool(values.isfinite().all()):
        return None
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return (low, high)


def seed_interval(values: Sequence[float]) -> Interval | None:
    """Return the 95 % t interval of the mean over seeds, one value a seed; None for fewer than two or one not finite.

    It asks how far the mean of as many other seeds could lie, on the same text. With two seeds it is 12.7 standard
    errors wide on either side: two seeds tell little.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    quantile = _T_QUANTILES[min(len(values) - 1, len(_T_QUANTILES)) - 1]
    mean, half = fmean(values), quantile * stdev(values) / math.sqrt(len(values))
    return (mean - half, mean + half)
