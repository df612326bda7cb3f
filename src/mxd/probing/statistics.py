"""How good a probe is, and how sure that is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.special import ndtr, stdtrit
from sklearn.metrics import average_precision_score, roc_auc_score

from mxd.evaluation.intervals import Interval, percentile_interval, resampled_sums

LEAST_GROUPS = 5
"""Documents of the test part that must hold a class, and what is not of it, for an interval: of fewer, too few
resamples differ."""


class Verdict(NamedTuple):
    """What a probe said of the test examples."""

    positive: Bool[np.ndarray, " examples"]
    """Which are of the class."""
    predicted: Bool[np.ndarray, " examples"]
    """Which it took for such."""
    scores: Float[np.ndarray, " examples"]
    """By what, higher for the class."""


class Quality(NamedTuple):
    """How good a probe is on the test part, with 95 % bootstrap intervals."""

    f1: float
    """Harmonic mean of precision and recall; 0 where nothing was found."""
    f1_interval: Interval | None
    """Over examples, or over documents where examples are tokens; None where fewer than five hold the class, or where
    no resample differs, as when nothing was told wrong: neither says how sure the number is."""
    balanced_accuracy: float
    """Mean of the shares of positives and of negatives that were told right."""
    balanced_accuracy_interval: Interval | None
    """The same for it."""
    precision: float
    """Share of what was taken for the class that is of it; 0 where nothing was."""
    recall: float
    """Share of the class that was found."""
    roc_auc: float
    """Area under the receiver's curve of the scores."""
    average_precision: float
    """Area under the precision-recall curve of the scores."""


def judge(verdicts: Sequence[Verdict], groups: Int[np.ndarray, " examples"] | None = None) -> list[Quality]:
    """Return how good probes of the same test examples are.

    All are scored on the same resamples: 1,000 draws, with replacement, of as many groups as there are. The ends of
    intervals are the quantiles of `small_sample_tail`.

    Args:
        verdicts: What each probe said.
        groups: What is drawn together, such as the document of each token; each example by itself where None.
    """
    if not verdicts:
        return []
    numbers = np.arange(len(verdicts[0].positive)) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = sparse.csr_array((np.ones(len(numbers)), (numbers, np.arange(len(numbers)))))
    cells = np.stack([_cells(verdict) for verdict in verdicts], axis=1)
    table = (members @ cells.reshape(len(cells), -1)).reshape(-1, *cells.shape[1:])
    flat = torch.from_numpy(table.reshape(len(table), -1))
    resampled = resampled_sums(flat).numpy().reshape(-1, len(verdicts), 4)
    return [_quality(verdict, table[:, number], resampled[:, number]) for number, verdict in enumerate(verdicts)]


def groups_with(positive: Bool[np.ndarray, " examples"], groups: Int[np.ndarray, " examples"] | None = None) -> int:
    """Return how many groups have an example of the class; each example is one by itself where `groups` is None."""
    return int(positive.sum()) if groups is None else len(np.unique(groups[positive]))


def small_sample_tail(count: int) -> float:
    r"""Return the share to leave out at either end of resamples of so few groups for a 95 % interval.

    Resamples of n groups scatter by $\sqrt{(n-1)/n}$ too little, and their quantiles are the normal distribution's
    where a mean of n has Student's. So the ends are moved out, to $\Phi(-\sqrt{n/(n-1)}\,t_{n-1})$ with the 97.5 %
    quantile of Student's t (the expanded percentile interval; Hesterberg, 2015, What Teachers Should Know About the
    Bootstrap). It is .001 for 5 groups and .020 for 40, and tends to .025.

    Args:
        count: Number of groups, at least 2.
    """
    return float(ndtr(-math.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.975)))


def _cells(verdict: Verdict) -> Float[np.ndarray, "examples 4"]:
    """Return whether each example is a true positive, a false one, a false negative, a true one."""
    yes, said = verdict.positive, verdict.predicted
    return np.stack([yes & said, ~yes & said, yes & ~said, ~yes & ~said], axis=1).astype(np.float64)


def _quality(
    verdict: Verdict, table: Float[np.ndarray, "groups 4"], resampled: Float[np.ndarray, "resamples 4"]
) -> Quality:
    cells = table.sum(axis=0)
    hits, wrong, missed, _ = cells.tolist()
    both = 0 < verdict.positive.sum() < len(verdict.positive)
    holding = int((table[:, [0, 2]].sum(axis=1) > 0).sum())
    lacking = int((table[:, [1, 3]].sum(axis=1) > 0).sum())
    # A resample without positives can have no other F1 than 0, and none has a share of them that was told right.
    resampled = resampled[resampled[:, [0, 2]].sum(axis=1) > 0]
    return Quality(
        f1=float(_f1(cells[None])[0]),
        f1_interval=_interval(_f1(resampled), holding),
        balanced_accuracy=float(_balanced(cells[None])[0]),
        balanced_accuracy_interval=_interval(_balanced(resampled), min(holding, lacking)),
        precision=hits / (hits + wrong) if hits + wrong else 0.0,
        recall=hits / (hits + missed) if hits + missed else 0.0,
        roc_auc=float(roc_auc_score(verdict.positive, verdict.scores)) if both else math.nan,
        average_precision=float(average_precision_score(verdict.positive, verdict.scores)) if both else math.nan,
    )


def _f1(cells: Float[np.ndarray, "*some 4"]) -> Float[np.ndarray, "*some"]:
    hits, wrong, missed = cells[..., 0], cells[..., 1], cells[..., 2]
    return 2 * hits / np.maximum(2 * hits + wrong + missed, 1)


def _balanced(cells: Float[np.ndarray, "*some 4"]) -> Float[np.ndarray, "*some"]:
    hits, wrong, missed, right = (cells[..., place] for place in range(4))
    # A resample without negatives says nothing of their share: NaN.
    with np.errstate(invalid="ignore", divide="ignore"):
        return (hits / (hits + missed) + right / (right + wrong)) / 2


def _interval(values: Float[np.ndarray, " resamples"], groups: int) -> Interval | None:
    if groups < LEAST_GROUPS:
        return None
    found = percentile_interval(torch.from_numpy(np.ascontiguousarray(values)), tail=small_sample_tail(groups))
    return None if found is None or found[0] == found[1] else found
