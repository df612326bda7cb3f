"""The points of the frontier: rows that differ in their seed alone, taken together."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple, TypeAlias

from mxd.atomic import JSON
from mxd.evaluation.drawing import group_name, split_student
from mxd.evaluation.intervals import Interval, seed_interval
from mxd.evaluation.rows import EvaluationRow
from mxd.layers import L1

Metric: TypeAlias = Literal["ce_increase", "nmse", "kl", "loss_recovered"]
METRIC_NAMES: dict[Metric, str] = {
    "ce_increase": "Cross-entropy increase (nats/token)",
    "nmse": "Normalised squared error",
    "kl": "KL divergence (nats/token)",
    "loss_recovered": "Loss recovered (share)",
}

HOW_INTERVALS_WERE_MADE = (
    "Intervals are of 95 %. Of several seeds: Student's t interval of the mean over seeds, on the same text; none "
    "where a seed diverged, and the mean is then of the others. Of a single seed: percentile bootstrap over "
    "evaluation documents, the original model and the replaced one on the same 1,000 resamples; a document's tokens "
    "stay together although they are packed into contexts, for it is documents that are independent of each other. "
    "There is none over documents for the normalised squared error."
)


class Estimate(NamedTuple):
    """A number of a setting, from one seed or several."""

    values: tuple[float, ...]
    """Of each seed; those that are not finite are left out."""
    over_seeds: Interval | None
    """95 % t interval of the mean over seeds; None with one, or where one diverged."""
    over_documents: Interval | None
    """95 % bootstrap interval over evaluation documents; None with several seeds, whose rows have one each."""

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return fmean(self.values)

    @property
    def interval(self) -> Interval | None:
        """The interval that is drawn."""
        return self.over_seeds or self.over_documents


class FrontierPoint(NamedTuple):
    """A setting at one K and layer."""

    layer: int | None
    """The layer; None for all layers together."""
    name: str
    """What the setting is called beside its K: its kind and what else the student's id names."""
    kind: str
    """Its kind."""
    k: int
    """Latents active on each token, at most."""
    rows: tuple[EvaluationRow, ...]
    """One a seed."""

    @property
    def series(self) -> str:
        """What its line is called: its name without the L1 coefficient, by which such a line's points differ."""
        coefficient = self.rows[0].settings.words().get("l1_coefficient")
        return self.name.replace(f" {coefficient}", "")

    @property
    def active(self) -> int | float | None:
        """Where it stands on the axis of sparsity: its K; with l1, which has none, its mean `l0`, if that is known."""
        if self.rows[0].selection != L1.name:
            return self.k
        found = [row.l0 for row in self.rows if row.l0 and math.isfinite(row.l0)]
        return fmean(found) if found else None

    @property
    def sparsity(self) -> str:
        """The same in words, such as `K = 16` or `L0 = 40.2`."""
        if self.active is None:
            return "L0 unknown"
        return f"K = {self.k}" if self.active == self.k else f"L0 = {self.active:.3g}"

    def estimate(self, metric: Metric) -> Estimate | None:
        """Return a metric of this point; None where no seed has it."""
        found: list[float | None] = [getattr(row, metric) for row in self.rows]
        values = tuple(value for value in found if value is not None and math.isfinite(value))
        if not values:
            return None
        documents: Interval | None = getattr(self.rows[0], f"{metric}_interval", None)
        # Where some diverged, the others are no sample of all seeds.
        over_seeds = seed_interval(values) if len(values) == len(self.rows) else None
        return Estimate(values, over_seeds, documents if len(self.rows) == 1 else None)

    def to_json(self) -> dict[str, JSON]:
        """Return the point as frontier.json has it."""
        first = self.rows[0]
        written: dict[str, JSON] = {
            "layer": self.layer,
            "name": self.name,
            "kind": self.kind,
            "k": self.k,
            "active": self.active,
            "parameters": first.parameters,
            "flops_per_token": first.flops_per_token,
            "tokens_trained": first.tokens_trained,
            "students": [row.id for row in self.rows],
            "seeds": [row.seed for row in self.rows],
        }
        for metric in METRIC_NAMES:
            estimate = self.estimate(metric)
            written[metric] = None if estimate is None else estimate.mean
            written[f"{metric}_over_seeds"] = None if estimate is None else estimate.over_seeds
            written[f"{metric}_over_documents"] = None if estimate is None else estimate.over_documents
        return written


def frontier_points(rows: Sequence[EvaluationRow]) -> list[FrontierPoint]:
    """Return the points of the frontier, in the order of the rows; a row without a K has none."""
    found: dict[tuple[int | None, str, int], list[EvaluationRow]] = {}
    for row in rows:
        if row.k is not None:
            found.setdefault((row.layer, split_student(row.student)[0], row.k), []).append(row)
    return [
        FrontierPoint(layer, group_name(group, members[0].kind), members[0].kind, k, tuple(members))
        for (layer, group, k), members in found.items()
    ]


def drawn_layers(points: Sequence[FrontierPoint]) -> list[int | None]:
    """Return the layers that have points; all layers together, which is None, come last."""
    layers = {point.layer for point in points}
    return [*sorted(layer for layer in layers if layer is not None), *([None] if None in layers else [])]


def sparsity_axis(points: Sequence[FrontierPoint]) -> str:
    """Return what stands below the axis of sparsity."""
    unlimited = any(point.active != point.k for point in points)
    return "K, active latents per token" + ("; with l1 their mean" if unlimited else "")


def sparsity_ticks(points: Sequence[FrontierPoint]) -> list[int]:
    """Return what is marked on the axis of sparsity: the Ks, and where there are none the places of the points."""
    places = [point.active for point in points if point.active is not None]
    return sorted({point.k for point in points if point.active == point.k} or {round(place) for place in places})


def layer_name(layer: int | None) -> str:
    """Return a layer's name in headings."""
    return "All layers" if layer is None else f"Layer {layer}"
