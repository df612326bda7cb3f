"""Measures of how much a model gives away on protected examples, and of what it is worth on the others."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mxd.atomic import JSON
from mxd.privacy.examples import Examples, Prediction, predict_all, predictions

CALIBRATION_BINS = 15
PROBABILITIES_AT_ONCE = 2**25
"""Probabilities, at most, that are computed at a time: 128 MiB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetMeasures:
    """What a model says of one set."""

    examples: int
    """Number of labels that count."""
    accuracy: float
    """Share of labels that are the model's first choice."""
    confidence_distance: float
    """Mean of max(0, max_c p_c − 1/Y): 0 when every prediction is uniform."""
    largest_confidence_distance: float
    """The most that any one label gives away."""
    cross_entropy: float
    """Mean −log p of the label, in nats."""
    calibration_error: float
    """Expected calibration error, 15 bins of equal width: Σ (bin's share) · |its accuracy − its mean confidence|."""
    brier: float
    """Mean of Σ_c (p_c − [c is the label])²."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyMeasures:
    """What a model gives away on protected examples, and what it is worth on the others."""

    num_classes: int
    """Number of classes; guessing is right once in so many times."""
    protected: SetMeasures
    """On the protected examples."""
    retained: SetMeasures
    """On the retained examples."""
    test: SetMeasures | None = None
    """On examples that neither set holds."""
    neighbours: SetMeasures | None = None
    """On the nearest test example of each protected one: whether uncertainty has spread to innocent examples."""

    def to_json(self) -> dict[str, JSON]:
        """All of it, for a file."""
        return cast("dict[str, JSON]", asdict(self))


def confidence_distances(logits: Float[Tensor, "counted classes"]) -> Float[Tensor, " counted"]:
    """How far each row's largest probability lies above 1/Y: max(0, max_c p_c − 1/Y) (Ashiq et al., 2025)."""
    return _above_uniform(logits.softmax(-1).amax(-1), logits.shape[-1])


def _above_uniform(confidence: Float[Tensor, " counted"], num_classes: int) -> Float[Tensor, " counted"]:
    return (confidence - 1 / num_classes).clamp_min(0)


def calibration_gaps(
    confidence: Float[Tensor, " counted"], right: Float[Tensor, " counted"], bins: int = CALIBRATION_BINS
) -> Float[Tensor, " bins"]:
    """For each bin of confidence the number of right labels less their confidences: n_b · (accuracy_b − confidence_b).

    Summed over batches, made absolute and divided by the number of labels, it is the expected calibration error (Guo et
    al., 2017). Bins are of equal width in the largest probability, open below and closed above.

    Args:
        confidence: Largest probability of each row, in float64 on the CPU.
        right: 1 where the class that has it is the label, else 0.
        bins: Number of bins.
    """
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)


def measure_predictions(parts: Iterable[Prediction]) -> SetMeasures:
    """Measure what a model said of a set, batch by batch.

    Probabilities are computed where the logits are; what is left of each row, a few numbers, is summed on the CPU, in
    float64, which not every device has.

    Raises:
        ValueError: If no label counts.
    """
    count, largest = 0, 0.0
    right = distance = entropy = brier = 0.0
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
    for logits, labels in _slices(parts):
        p = logits.softmax(-1)
        confidence, choice = p.max(-1)
        rows = [confidence, choice == labels, logits.argmax(-1) == labels, _above_uniform(confidence, p.shape[-1])]
        rows += [p.gather(1, labels[:, None])[:, 0], p.square().sum(-1)]
        sure, chosen, first, distances, hit, squares = (row.cpu().double() for row in rows)
        count += len(labels)
        right += float(first.sum())
        distance += float(distances.sum())
        largest = max(largest, float(distances.amax())) if len(labels) else largest
        entropy += float(functional.cross_entropy(logits, labels, reduction="sum"))
        # Σ_c (p_c − y_c)² = Σ p² − 2 p_label + 1
        brier += float((squares - 2 * hit + 1).sum())
        gaps += calibration_gaps(sure, chosen)
    if count == 0:
        raise ValueError("a set to be measured must hold at least one labelled example; it is empty.")
    return SetMeasures(
        examples=count,
        accuracy=right / count,
        confidence_distance=distance / count,
        largest_confidence_distance=largest,
        cross_entropy=entropy / count,
        calibration_error=float(gaps.abs().sum()) / count,
        brier=brier / count,
    )


def _slices(parts: Iterable[Prediction]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels, so many rows at a time that their probabilities fit in memory."""
    for logits, labels, _ in parts:
        size = max(1, PROBABILITIES_AT_ONCE // logits.shape[-1])
        yield from zip(logits.split(size), labels.split(size), strict=True)


def measure_set(model: nn.Module, examples: Examples, batch_size: int = 256) -> SetMeasures:
    """Run a model on a set and measure what it says."""
    return measure_predictions(predictions(model, examples, batch_size))


def measure_privacy(
    model: nn.Module, *, protected: Examples, retained: Examples, test: Examples | None = None, batch_size: int = 256
) -> PrivacyMeasures:
    """Measure a model on protected, retained and test examples, and on the protected ones' nearest test neighbours.

    Args:
        model: Returns logits.
        protected: Whose predictions should be uniform.
        retained: Whose predictions should be as before.
        test: What neither training nor the choice of a model has seen. Neighbours are found where it holds tensors.
        batch_size: Examples in memory at a time.
    """
    neighbours = None
    if test is not None and isinstance(test.inputs, Tensor) and isinstance(protected.inputs, Tensor):
        near = nearest_rows(protected.inputs, test.inputs)
        neighbours = measure_set(model, test.take(near), batch_size)
    return PrivacyMeasures(
        num_classes=predict_all(model, protected.take(slice(0, 1))).logits.shape[-1],
        protected=measure_set(model, protected, batch_size),
        retained=measure_set(model, retained, batch_size),
        test=None if test is None else measure_set(model, test, batch_size),
        neighbours=neighbours,
    )


def nearest_rows(
    queries: Float[Tensor, " batch *shape"], among: Float[Tensor, " num_rows *shape"], block: int = 4096
) -> Int[Tensor, " batch"]:
    """Which of the rows is nearest to each query by Euclidean distance; the first of equally near ones.

    Args:
        queries: What neighbours are sought for.
        among: The rows to choose from, of the same shape.
        block: Rows that are compared at a time, which bounds the memory.
    """
    flat = queries.flatten(1).float()
    best = torch.full((len(flat),), math.inf)
    rows = torch.zeros(len(flat), dtype=torch.long)
    for start in range(0, len(among), block):
        # Without the shortcut through the squares, which loses digits where points are close.
        distances = torch.cdist(
            flat, among[start : start + block].flatten(1).float(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        least, place = distances.min(1)
        nearer = least < best
        best[nearer], rows[nearer] = least[nearer], place[nearer] + start
    return rows
