import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mxd.evaluation.faithfulness import EvaluationText, ModelLoss
from mxd.evaluation.frontier_table import format_points, markdown_points
from mxd.evaluation.grid import Metric, frontier_points
from mxd.evaluation.intervals import seed_interval
from mxd.evaluation.rows import EvaluationRow
from mxd.evaluation.siblings import RunRows, beside_each_other
from mxd.evaluation.whole_model import WholeModel, together_row
from mxd.settings import StudentSettings
from tests.test_report import all_layers, row


def test_a_diverged_seed_is_not_passed_over_in_silence() -> None:
    rows = [row(k=16, seed=seed, ce_increase=0.1 * (seed + 1)) for seed in range(3)]
    diverged = replace(rows[2], ce_increase=math.nan, nmse=math.nan)
    points = frontier_points([*rows[:2], EvaluationRow.from_json(diverged.to_json())])
    means: dict[Metric, float] = {"ce_increase": 0.15, "nmse": 0.9}
    for metric, mean in means.items():
        estimate = points[0].estimate(metric)
        assert estimate is not None
        assert (estimate.mean, estimate.interval) == (pytest.approx(mean), None)
    assert "| 2 of 3 | 0.1500 |" in markdown_points(points)


def test_long_names_leave_the_numbers_whole() -> None:
    long = replace(row(k=128), id="mxd-k128-batch_tokens=4096-lr=0.001-weight_decay=0.1")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(format_points(frontier_points([long])))
    text = console.export_text()
    assert "…" not in text.replace(" … ", "")
    assert {"128", "0.0123", "0.0738", "0.9385"} <= set(text.split())


def test_points_take_seeds_together_and_keep_settings_apart() -> None:
    rows = [row(k=16, seed=seed, ce_increase=0.1 * (seed + 1)) for seed in range(3)]
    wide = replace(row(k=16), id="mxd-k16-h64")
    points = {(point.layer, point.name): point for point in frontier_points([*rows, wide, all_layers(k=16)])}
    assert set(points) == {(8, "MxD"), (8, "MxD h64"), (None, "MxD")}
    estimate = points[8, "MxD"].estimate("ce_increase")
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.2)
    assert estimate.interval == estimate.over_seeds == pytest.approx(seed_interval([0.1, 0.2, 0.3]))
    assert estimate.over_documents is None
    single = points[8, "MxD h64"].estimate("ce_increase")
    assert single is not None
    assert (single.over_seeds, single.interval) == (None, wide.ce_increase_interval)
    assert points[None, "MxD"].estimate("nmse") is None


def test_runs_that_differ_in_their_seed_alone_are_seeds_of_one_setting() -> None:
    config = {"lr": "auto", "seed": 0, "tokens": 100}
    runs = [
        RunRows(Path("a"), config, [row(k=16), row("transcoder", k=16)]),
        RunRows(Path("b"), config | {"seed": 1}, [replace(row(k=16), seed=1)]),
    ]
    ids = [[found.id for found in rows] for rows in beside_each_other(runs)]
    assert ids == [["mxd-k16-seed0", "transcoder-k16"], ["mxd-k16-seed1"]]
    again = RunRows(Path("x/c-d"), config, [row(k=16)])
    ids = [[found.id for found in rows] for rows in beside_each_other([*runs, again])]
    assert ids == [["mxd-k16-run=a-seed0", "transcoder-k16"], ["mxd-k16-seed1"], ["mxd-k16-run=x_c_d-seed0"]]
    longer = RunRows(Path("d"), config | {"tokens": 200}, [row(k=16)])
    ids = [[found.id for found in rows] for rows in beside_each_other([runs[0], longer])]
    assert ids == [["mxd-k16-tokens=100-seed0", "transcoder-k16"], ["mxd-k16-tokens=200-seed0"]]


@pytest.mark.parametrize("folders", [("seed1", "seed2"), ("k1", "k2"), ("a-b", "a_b")])
def test_copies_of_a_run_are_no_seeds_whatever_their_folders_are_called(folders: tuple[str, str]) -> None:
    runs = [RunRows(Path(folder), {"seed": 0}, [row(k=16)]) for folder in folders]
    points = frontier_points([found for rows in beside_each_other(runs) for found in rows])
    assert [(point.k, len(point.rows)) for point in points] == [(16, 1), (16, 1)]


def test_options_are_named_as_they_are_for_a_kind() -> None:
    rates: list[object] = [1e-05, {"mxd": 1e-05, "transcoder": 0.002}]
    runs = [
        RunRows(Path(f"r{seed}"), {"lr": lr}, [row(k=16, seed=seed), row("transcoder", k=16, seed=seed)])
        for seed, lr in enumerate(rates)
    ]
    ids = [[found.id for found in rows] for rows in beside_each_other(runs)]
    assert ids == [
        ["mxd-k16-seed0", "transcoder-k16-lr=0.00001-seed0"],
        ["mxd-k16-seed1", "transcoder-k16-seed1-lr=0.002"],
    ]


def test_all_layers_together_tell_every_setting_that_they_agree_in() -> None:
    tokens = torch.tensor([3, 5])
    loss = ModelLoss(ce_sums=torch.ones(2).double(), kl_sums=torch.ones(2).double(), tokens=tokens)
    whole = WholeModel(
        id="gpt2",
        losses={"": loss, "together/mxd-k16": loss, "zero together": loss},
        agreements={"together/mxd-k16": (1.0,) * 8},
        text=EvaluationText(contexts=torch.zeros(2, 6).long(), documents=torch.zeros(2, 6).long(), special_ids=()),
        bytes_per_token=None,
        resampled=None,
    )
    settings = {"hidden": 64, "rank": 2, "l1_coefficient": 0.5} | {"shared_penalty": 0.1, "shared_expert": True}
    told = StudentSettings(num_latents=8, activation="silu", encoder="glu", normalize_experts=False, selection="l1")
    told = told._replace(random_k=True, init="model", **settings)
    assert None not in told, "every setting is one that could get lost"
    members = [replace(row(k=16, layer=layer), **told.row_fields()) for layer in (0, 1)]
    assert all(member.settings == told for member in members)
    together = together_row(whole, "together/mxd-k16", members)
    assert together.settings == told
    for name in StudentSettings._fields:
        field = "d_hidden" if name == "hidden" else name
        others = [members[0], replace(members[1], **{field: None})]
        assert together_row(whole, "together/mxd-k16", others).settings == told._replace(**{name: None}), name
    runs: list[RunRows] = []
    for seed, charge in enumerate((0.1, 0.2)):
        charged = [replace(member, shared_penalty=charge, seed=seed) for member in members]
        rows = [*charged, together_row(whole, "together/mxd-k16", charged)]
        runs.append(RunRows(Path(f"r{seed}"), {"shared_penalty": charge, "seed": seed}, rows))
    points = frontier_points([found for rows in beside_each_other(runs) for found in rows])
    assert [(point.layer, len(point.rows)) for point in points if point.layer is None] == [(None, 1), (None, 1)]
