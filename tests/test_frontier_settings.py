"""The frontier of students that differ in settings: what is one point, what it is called, and where it stands."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from mxd.evaluation.comparison import compare_runs, write_frontier
from mxd.evaluation.evaluate import Evaluation, evaluate_run, write_evaluation
from mxd.evaluation.frontier import draw_frontier, has_lines
from mxd.evaluation.grid import frontier_points, sparsity_axis, sparsity_ticks
from mxd.evaluation.interactive import frontier_data
from mxd.evaluation.record import read_record
from mxd.evaluation.rows import EvaluationRow
from mxd.evaluation.siblings import RunRows, beside_each_other
from mxd.settings import StudentSettings
from tests.test_report import all_layers, row
from tests.tiny_run import Settings, change_json, copied, tiny_run


def wide(width: int, id: str, seed: int = 0, **more: object) -> EvaluationRow:
    return replace(row(seed=seed, k=16), id=id, d_hidden=width, **more)  # pyright: ignore[reportArgumentType]


def l1(coefficient: float, l0: float, seed: int = 0, layer: int = 8) -> EvaluationRow:
    word = StudentSettings(l1_coefficient=coefficient).words()["l1_coefficient"]
    student = replace(row(k=1024, seed=seed, layer=layer), id=f"mxd-k1024-l1-{word}-seed{seed}", num_latents=1024)
    return replace(student, selection="l1", l1_coefficient=coefficient, random_k=None, l0=l0)


def ids(*runs: tuple[Mapping[str, object], list[EvaluationRow]]) -> list[list[str]]:
    described = [RunRows(Path(f"run{number}"), *run) for number, run in enumerate(runs)]
    return [[found.id for found in rows] for rows in beside_each_other(described)]


def test_one_run_keeps_the_names_that_it_gave() -> None:
    rows = [wide(64, "mxd-k16-h64"), wide(8, "mxd-k16-h8"), row("transcoder", k=16), all_layers("transcoder", k=16)]
    assert ids(({"hidden": [64, 8]}, rows)) == [[found.id for found in rows]]


@pytest.mark.parametrize(
    ("first", "second"),
    [(64, [64, 8]), ("auto", [64, 8]), ([8, 64], [64, 8])],
    ids=["one width beside two", "the width that auto came to", "another order"],
)
def test_what_is_alike_but_for_its_seed_is_one_point_however_it_was_asked_for(first: object, second: object) -> None:
    named = isinstance(first, list)
    one = [wide(64, "mxd-k16-h64" if named else "mxd-k16")]
    other = [wide(64, "mxd-k16-h64", seed=1), wide(8, "mxd-k16-h8", seed=1)]
    found = ids(({"hidden": first}, one), ({"hidden": second}, other))
    assert found == [["mxd-k16-h64-seed0"], ["mxd-k16-h64-seed1", "mxd-k16-h8"]]


def test_ranks_that_auto_came_to_are_named_where_they_differ() -> None:
    one = [replace(row("molt", k=16), id="molt-k16", rank=64)]
    other = [replace(row("molt", k=16, seed=1), id="molt-k16", rank=128)]
    assert ids(({"rank": "auto"}, one), ({"rank": "auto"}, other)) == [["molt-k16-r64"], ["molt-k16-r128"]]
    alike = [replace(found, rank=64) for found in other]
    assert ids(({"rank": "auto"}, one), ({"rank": "auto"}, alike)) == [["molt-k16-seed0"], ["molt-k16-seed1"]]


def test_what_differs_is_named_by_the_setting_and_only_where_a_kind_reads_it() -> None:
    rows = [wide(64, "mxd-k16"), row("transcoder", k=16)]
    others = [wide(8, "mxd-k16", seed=1), row("transcoder", k=16, seed=1)]
    found = ids(({"hidden": 64}, [*rows, replace(rows[0], id="together/mxd-k16", layer=None)]), ({"hidden": 8}, others))
    assert found == [
        ["mxd-k16-h64", "transcoder-k16-seed0", "together/mxd-k16-h64"],
        ["mxd-k16-h8", "transcoder-k16-seed1"],
    ]


def test_settings_are_named_in_one_order_and_only_if_they_were_asked_for() -> None:
    """The number of latents follows from the width where parameters are matched."""
    one = [wide(64, "mxd-k16-relu", activation="relu"), wide(64, "mxd-k16-gelu")]
    other = [wide(8, "mxd-k16", num_latents=30_000)]
    found = ids(({"hidden": 64, "activation": ["relu", "gelu"]}, one), ({"hidden": 8, "activation": "auto"}, other))
    assert found == [["mxd-k16-h64-relu", "mxd-k16-h64-gelu"], ["mxd-k16-h8-gelu"]]


def test_selections_and_coefficients_of_different_runs_are_different_points() -> None:
    once, batch = row(k=16), replace(row(k=16), selection="batch-topk", random_k=None)
    weak, strong = (replace(l1(c, 30.0), id="mxd-k1024") for c in (1e-5, 1e-3))
    configs = [{"selection": "topk"}, {"selection": "batch-topk"}]
    configs += [{"selection": "l1", "l1_coefficient": c} for c in (1e-5, 1e-3)]
    found = ids(*zip(configs, [[once], [batch], [weak], [strong]], strict=True))
    assert found == [*(["mxd-k16-topk"], ["mxd-k16-batch-topk"], ["mxd-k1024-l1-c0.00001"], ["mxd-k1024-l1-c0.001"])]


def test_a_student_with_l1_stands_at_the_number_of_latents_that_it_activates() -> None:
    rows = [row(k=16), row(k=32), *(l1(c, l0 + seed, seed) for c, l0 in ((1e-3, 7.0), (1e-4, 40.0)) for seed in (0, 1))]
    points = frontier_points([*rows, replace(l1(1e-3, 7.0), id="together/mxd-k1024-l1-c0.001", layer=None, l0=None)])
    assert [(point.name, point.series, point.active, point.sparsity) for point in points] == [
        ("MxD", "MxD", 16, "K = 16"),
        ("MxD", "MxD", 32, "K = 32"),
        ("MxD l1 c0.001", "MxD l1", 7.5, "L0 = 7.5"),
        ("MxD l1 c0.0001", "MxD l1", 40.5, "L0 = 40.5"),
        ("MxD l1 c0.001", "MxD l1", None, "L0 unknown"),
    ]
    assert sparsity_ticks(points) == [16, 32]
    assert sparsity_ticks(points[2:4]) == [8, 40]
    assert "with l1 their mean" in sparsity_axis(points)
    assert "l1" not in sparsity_axis(points[:2])
    assert has_lines(points, 8)
    assert not has_lines(points, None)
    (layer,) = json.loads(json.dumps(frontier_data(points)))["layers"]
    assert [point["active"] for point in layer["points"]] == [16, 32, 7.5, 40.5]


@pytest.mark.parametrize("l0s", [(7.0, 40.0, 300.0), (7.0,), (None,)])
def test_the_picture_takes_students_with_l1_alone(l0s: tuple[float | None, ...], tmp_path: Path) -> None:
    rows = [replace(l1(10.0**-place, 1.0), l0=l0) for place, l0 in enumerate(l0s)]
    draw_frontier(rows, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


class Measured(NamedTuple):
    """A run of one student on each of two layers, and what was measured of it."""

    run: Path
    evaluation: Evaluation


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    run = copied(tiny_run(tmp_path_factory.getbasetemp()).run, tmp_path_factory.mktemp("measured") / "run")

    def leave_one(described: Settings) -> None:
        students = cast("list[Settings]", described["students"])
        described["students"] = [student for student in students if student["id"] == "mxd-k4"]

    change_json(run / "run.json", leave_one)
    evaluation = evaluate_run(run, ks=[2, 8, 2], together=True, tokens=128)
    write_evaluation(run, evaluation, title="t", footer="f")
    return Measured(run, evaluation)


def test_measurements_at_other_ks_enter_neither_the_frontier_nor_all_layers_together(measured: Measured) -> None:
    at = [(layer, f"mxd-k4-at{k}") for layer in (0, 1) for k in (2, 8)]
    found = [(row.layer, row.id) for row in measured.evaluation.rows]
    assert found == [(0, "mxd-k4"), (1, "mxd-k4"), *at, (None, "together/mxd-k4")]
    said: list[str] = []
    frontier = compare_runs([measured.run], together=True, say=said.append)
    assert said == [], "the evaluation that is there serves"
    assert [(point.layer, point.k) for point in frontier.points] == [(0, 4), (1, 4), (None, 4)]
    assert len(read_record(measured.run / "evaluation.json").rows) == 7


def test_a_report_that_is_drawn_anew_says_again_what_has_collapsed(measured: Measured, tmp_path: Path) -> None:
    run = copied(measured.run, tmp_path / "run")
    shares = {0: 0.9, 1: 0.2, None: None}
    rows = [replace(row, top_energy_share=shares[row.layer]) for row in measured.evaluation.rows]
    write_evaluation(run, replace(measured.evaluation, rows=rows), title="t", footer="f")
    write_frontier(compare_runs([run]), tmp_path / "out")
    for page in ((run / "report.html").read_text(), (tmp_path / "out" / "report.html").read_text()):
        assert "0/mxd-k4 has nearly collapsed to one latent, which carries 90%" in page
        assert "1/mxd-k4 has" not in page
