import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from mxd.evaluation.rows import EvaluationRow
from mxd.evaluation.trade import draw_panel, draw_trade, mean_points
from tests.test_report import row


def student(
    id: str, kind: str, ce_increase: float, specialisation: float | None, charge: float | None = None
) -> EvaluationRow:
    facts = {"id": id, "kind": kind, "layer": 2, "k": 16, "ce_increase": ce_increase}
    return dataclasses.replace(row(), **facts, specialisation=specialisation, shared_penalty=charge)


ROWS = [
    student("transcoder-k16-seed0", "transcoder", 0.03, None),
    student("transcoder-k16-seed1", "transcoder", 0.05, None),
    student("shared-transcoder-k16-p1-seed0", "shared-transcoder", 0.02, 0.8, 1.0),
    student("shared-transcoder-k16-p1-seed1", "shared-transcoder", 0.03, 0.9, 1.0),
    student("shared-transcoder-k16-p0.1-seed0", "shared-transcoder", 0.004, 0.5, 0.1),
    student("mxd-k16-model-seed0", "mxd", 0.006, 0.2),
    student("mxd-k16-paper-seed0", "mxd", -0.001, 0.8),
]


def test_a_point_is_the_mean_over_seeds_and_a_line_is_in_the_order_of_specialisation() -> None:
    found = mean_points(ROWS, "ce_increase")
    assert {line: [point.label for point in points] for line, points in found.items()} == {
        ("transcoder", ""): [""],
        ("shared-transcoder", ""): ["0.1", "1"],
        ("mxd", "model"): [""],
        ("mxd", "paper"): [""],
    }
    (level,), charged = found["transcoder", ""], found["shared-transcoder", ""]
    assert level.specialisation is None
    assert abs(level.loss - 0.04) < 1e-12
    assert abs((charged[1].specialisation or 0) - 0.85) < 1e-12


def test_what_is_not_finite_is_left_out_and_a_panel_may_be_empty(tmp_path: Path) -> None:
    bad = [
        dataclasses.replace(ROWS[5], ce_increase=math.nan, kl=math.inf),
        dataclasses.replace(ROWS[6], specialisation=math.nan),
    ]
    assert mean_points(bad, "ce_increase") == mean_points(bad, "kl") == {}
    better = [dataclasses.replace(row, ce_increase=-0.001) for row in ROWS]
    assert draw_trade(better, tmp_path / "trade.png")


@pytest.mark.parametrize(("ce_increase", "scale"), [(0.001, "log"), (-0.001, "linear")])
def test_a_student_no_worse_than_the_original_model_has_its_place_on_a_linear_axis(
    ce_increase: float, scale: str
) -> None:
    axes = Figure().subplots()
    draw_panel(axes, mean_points([*ROWS[:6], dataclasses.replace(ROWS[6], ce_increase=ce_increase)], "ce_increase"))
    assert axes.get_yscale() == scale
    lowest = min(float(value) for line in axes.lines for value in np.asarray(line.get_ydata()))
    assert lowest == ce_increase


def test_no_grid_is_too_large_to_draw(tmp_path: Path) -> None:
    grid = [dataclasses.replace(row, layer=layer) for layer in range(200) for row in ROWS]
    assert draw_trade(grid, tmp_path / "trade.png")


def test_it_is_drawn_where_there_is_something_to_compare(tmp_path: Path) -> None:
    path = tmp_path / "trade.png"
    assert not draw_trade(ROWS[:4], path), "one point, whatever its seeds"
    assert not draw_trade([], path)
    assert not path.exists()
    assert draw_trade(ROWS, path)
    assert path.read_bytes().startswith(b"\x89PNG")
