"""The frontier as the report's script takes it."""

from collections.abc import Sequence
from importlib.resources import files

from mxd.atomic import JSON
from mxd.evaluation.drawing import kind_style
from mxd.evaluation.grid import (
    METRIC_NAMES,
    Estimate,
    FrontierPoint,
    drawn_layers,
    layer_name,
    sparsity_axis,
    sparsity_ticks,
)
from mxd.quantities import compact


def frontier_script() -> str:
    """Return the script that draws what `frontier_data` returns."""
    return files("mxd").joinpath("evaluation/frontier.js").read_text("utf-8")


def frontier_data(points: Sequence[FrontierPoint]) -> JSON:
    """Return points as the report's script takes them, all texts ready to be shown."""
    points = [point for point in points if point.active is not None]
    kinds = dict.fromkeys(point.kind for point in points)
    styles = {kind: kind_style(kind) for kind in kinds}
    return {
        "metrics": [{"id": metric, "name": name} for metric, name in METRIC_NAMES.items()],
        "kinds": [
            {"id": kind, "name": style.name, "colour": style.colour, "marker": style.marker}
            for kind, style in styles.items()
        ],
        "layers": [
            _layer(layer, [point for point in points if point.layer == layer]) for layer in drawn_layers(points)
        ],
    }


def _layer(layer: int | None, points: Sequence[FrontierPoint]) -> JSON:
    return {
        "name": layer_name(layer),
        "axis": sparsity_axis(points),
        "ticks": sparsity_ticks(points),
        "points": [_point(point) for point in points],
    }


def _point(point: FrontierPoint) -> JSON:
    first = point.rows[0]
    sizes = {"parameters": first.parameters, "FLOPs a token": first.flops_per_token}
    facts = [f"{compact(size)} {name}" for name, size in sizes.items() if size is not None]
    if first.tokens_trained is not None:
        facts.append(f"{compact(first.tokens_trained)} tokens trained")
    return {
        "name": point.name,
        "series": point.series,
        "kind": point.kind,
        "active": point.active,
        "sparsity": point.sparsity,
        "students": [row.id for row in point.rows],
        "facts": facts,
        "values": {metric: _estimate(point.estimate(metric)) for metric in METRIC_NAMES},
    }


def _estimate(estimate: Estimate | None) -> JSON:
    if estimate is None:
        return None
    over = f"over {len(estimate.values)} seeds" if estimate.over_seeds else "over documents"
    return {"mean": estimate.mean, "each": estimate.values, "interval": estimate.interval, "over": over}
