"""Loss recovered is a share of what removing the MLP costs, and a number only where that is told from nothing."""

import json
import math
from typing import cast

import pytest
import torch
from torch import Tensor

from mxd.atomic import json_text
from mxd.evaluation.faithfulness import EvaluationText, ModelLoss
from mxd.evaluation.frontier_table import markdown_points
from mxd.evaluation.grid import frontier_points
from mxd.evaluation.interactive import frontier_data
from mxd.evaluation.intervals import percentile_interval, resampled_sums
from mxd.evaluation.rows import EvaluationRow
from mxd.evaluation.tables import markdown_table
from mxd.evaluation.whole_model import ModelFields, WholeModel, _Resampled
from tests.test_report import row

DOCUMENTS, TOKENS = 40, 25


def fields(base: Tensor, student: Tensor, ablated: Tensor) -> ModelFields:
    """Return what a row says where these are the mean losses of each document."""
    tokens = torch.full((len(base),), TOKENS)
    losses = {
        name: ModelLoss(ce_sums=ce * TOKENS, kl_sums=torch.zeros_like(ce), tokens=tokens)
        for name, ce in {"": base, "0/mxd-k4": student, "zero 0": ablated}.items()
    }
    contexts = torch.zeros(len(base), TOKENS + 1, dtype=torch.long)
    text = EvaluationText(contexts=contexts, documents=contexts, special_ids=set(), passthrough=False, module_path=None)
    return WholeModel(
        id="a model",
        losses=losses,
        agreements={"0/mxd-k4": (1.0,)},
        text=text,
        bytes_per_token=None,
        resampled=_Resampled(losses) if len(base) > 1 else None,
    ).fields("0/mxd-k4", "zero 0")


def noise(seed: int, documents: int = DOCUMENTS) -> Tensor:
    return torch.randn(documents, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_where_removing_the_mlp_costs_something_the_share_and_its_interval_are_numbers() -> None:
    base = 3 + noise(0)
    student, ablated = base + 0.1 + 0.01 * noise(1), base + 0.5 + 0.1 * noise(2)
    found = fields(base, student, ablated)
    expected = float((ablated - student).mean() / (ablated - base).mean())
    assert found["loss_recovered"] == pytest.approx(expected)
    low, high = found["loss_recovered_interval"] or (math.nan, math.nan)
    assert 0.7 < low < expected < high < 0.9


@pytest.mark.parametrize("cost", [-0.5, 0.0, 0.01])
def test_where_removing_it_costs_no_more_than_chance_would_there_is_no_share(cost: float) -> None:
    scatter = 0.3 * noise(2)
    base = 3 + noise(0)
    ablated = base + cost + scatter - scatter.mean()
    assert abs(float((ablated - base).mean()) - cost) < 1e-12
    drawn = resampled_sums(torch.stack([base, ablated], 1))
    low, high = percentile_interval((drawn[:, 1] - drawn[:, 0]) / DOCUMENTS) or (math.nan, math.nan)
    assert low <= 0 <= high or high < 0, "or there is something to recover"
    found = fields(base, base + 0.1, ablated)
    assert math.isnan(found["loss_recovered"])
    assert found["loss_recovered_interval"] is None
    assert found["ce_increase"] == pytest.approx(0.1), "what is measured of the student itself stays"


@pytest.mark.parametrize(("cost", "expected"), [(0.5, 0.8), (0.0, math.nan), (-0.5, math.nan)])
def test_with_one_document_its_sign_decides(cost: float, expected: float) -> None:
    base = torch.tensor([3.0], dtype=torch.float64)
    found = fields(base, base + 0.1, base + cost)
    assert found["loss_recovered"] == pytest.approx(expected, nan_ok=True)
    assert found["loss_recovered_interval"] is None


def test_no_share_is_null_in_files_and_not_available_in_tables() -> None:
    nothing = {**row("mxd", 16, 8, 0.1).to_json(), "loss_recovered": None}
    read = EvaluationRow.from_json(json.loads(json_text(nothing)))
    assert read.to_json()["loss_recovered"] is None
    points = frontier_points([read])
    assert points[0].to_json()["loss_recovered"] is None
    assert cast("dict[str, object]", json.loads(json_text(frontier_data(points))))
    assert "n/a" in markdown_points(points)
    assert "n/a" in markdown_table([read])
    assert "nan" not in markdown_points(points) + markdown_table([read])
