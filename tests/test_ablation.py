"""Ablations: their recipes, their pictures, and what shows that a layer has collapsed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mxd.evaluation.ablation import ablated_settings, draw_ablations
from mxd.evaluation.evaluate import evaluate_run, write_evaluation
from mxd.evaluation.expert_use import collapse_warnings, energy_use
from mxd.evaluation.record import read_record
from mxd.evaluation.rows import EvaluationRow
from mxd.layers import LAYERS, LinearTransformMixture, LinearTransformMixtureConfig, Transcoder, TranscoderConfig
from mxd.recipes import RECIPES, ablation, ablation_stories260k, demo, find_recipe, stories260k
from mxd.training.ablations import ABLATIONS
from mxd.training.grid import plan_students
from tests.test_report import all_layers, row
from tests.test_selection import layer_of
from tests.tiny_run import Settings, TinyRun, assert_refused, command, copied, training

EXPERTS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
GRIDS: dict[str, dict[str, object]] = {
    # The paper has ReLU, GELU and Swish-GLU; SiLU without a gate is ours.
    "activation": {"kind": ("mxd",), "activation": ("relu", "gelu", "silu"), "encoder": ("mlp", "glu")},
    "rank": {"kind": ("mxd", "low-rank")},
    "experts": {"kind": ("mxd",), "num_latents": EXPERTS},
    "random-k": {"kind": ("mxd", "transcoder"), "k": (16, 32, 64), "random_k": (False, True)},
    "selection": {
        "kind": ("mxd", "transcoder"),
        "k": (8, 16, 32, 64),
        "num_latents": 1024,
        "selection": ("topk", "batch-topk", "l1"),
        "l1_coefficient": (3e-5, 1e-4, 3e-4, 1e-3),
        "tokens": 2_000_000,
        "seeds": 1,
    },
    "normalization": {"kind": ("mxd", "low-rank", "transcoder"), "normalize_experts": (True, False)},
    "shared-expert": {"kind": ("mxd",), "k": (8, 16, 32, 64), "shared_expert": (False, True)},
    "sae": {"kind": ("mxd", "transcoder", "topk-sae"), "k": (8, 16, 32, 64)},
    "molt": {"kind": ("mxd", "transcoder", "molt"), "k": (8, 16, 32, 64)},
    "shared": {
        "kind": ("transcoder", "skip-transcoder", "mxd", "shared-transcoder"),
        "k": (16,),
        "init": ("auto", "model"),
        "shared_penalty": (0.03, 0.1, 0.3, 1.0),
        "normalize_experts": (True, False),
        "tokens": 8_000_000,
        "schedule": "linear",
    },
}
BUNDLED: dict[str, object] = {"layer": (3,), "k": (32,), "expansion": 32, "tokens": 2_000_000, "seeds": 3}
STORIES: dict[str, object] = {"layer": (2,), "k": (16,), "expansion": 32, "tokens": 8_000_000, "seeds": 3}
RANKS: dict[str, dict[str, tuple[int, ...]]] = {
    "rank": {"bundled": (16, 32, 64, 128, 256), "stories": (4, 8, 16, 32, 64)},
    "molt": {"bundled": (64, 256), "stories": (16, 64)},
}
STUDENTS = dict(zip(GRIDS, (6, 6, 7, 12, 24, 6, 8, 12, 16, 11), strict=True))


@pytest.mark.parametrize("name", GRIDS)
def test_a_recipe_varies_what_it_says_and_nothing_else_field_by_field(name: str) -> None:
    assert GRIDS.keys() == ABLATIONS.keys()
    for base, own, which, suffix in (
        (demo(), BUNDLED, "bundled", ""),
        (stories260k(), STORIES, "stories", "-stories"),
    ):
        recipe = find_recipe(f"ablation-{name}{suffix}")
        config = recipe.config()
        expected = own | GRIDS[name] | {"recipe": f"ablation-{name}{suffix}"}
        expected |= {"rank": RANKS[name][which]} if name in RANKS else {}
        assert config == replace(base, **expected)  # pyright: ignore[reportArgumentType]
        students = plan_students(config, recipe.shape.sites(config.layers))
        assert len(students) == STUDENTS[name] * config.seeds
        if config.num_latents is None:
            sizes = [student.network.num_parameters for student in students]
            assert max(sizes) < 1.01 * min(sizes), "parameters are matched"
    assert ablation(name, layer=1).layer == (1,)
    assert ablation_stories260k(name, layer=4).layer == (4,)
    assert f"ablation-{name}" in RECIPES


def rows_of(**fields: tuple[object, ...]) -> list[EvaluationRow]:
    """Rows over two seeds that differ in these fields, all at a time."""
    return [
        replace(row(seed=seed, ce_increase=0.01 + 0.001 * place), **dict(zip(fields, values, strict=True)))  # pyright: ignore
        for place, values in enumerate(zip(*fields.values(), strict=True))
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("fields", "ablated"),
    [
        ({"activation": ("relu", "gelu")}, ["activation"]),
        # Matched parameters move the number of latents along; alone it is a setting like others.
        ({"rank": (8, 16, 32), "num_latents": (900, 700, 500)}, ["rank"]),
        ({"num_latents": (1024, 4096)}, ["num-latents"]),
        ({"encoder": ("mlp", "mlp", "glu", "glu"), "d_hidden": (8, 9, 8, 9)}, ["hidden", "encoder"]),
        ({"selection": ("topk", "l1", "l1"), "k": (8, 1024, 1024), "k_trained": (8, 1024, 1024),
          "l1_coefficient": (None, 0.1, 0.2), "l0": (8.0, 30.0, 12.0), "random_k": (False, None, None)}, ["selection"]),
        ({"random_k": (False, True)}, ["random-k"]),
        ({"k": (8, 16), "k_trained": (8, 16)}, []),
        # Kinds that do not read a setting have null there, which is no value of it.
        ({"kind": ("mxd", "low-rank"), "rank": (None, 8)}, []),
    ],
)  # fmt: skip
def test_a_picture_is_drawn_of_each_setting_that_varies_alone(
    fields: dict[str, tuple[object, ...]], ablated: list[str], tmp_path: Path
) -> None:
    rows = [*rows_of(**fields), all_layers()]
    assert [setting.option for setting in ablated_settings(rows)] == ablated
    assert ablated_settings([]) == []
    written = draw_ablations(rows, tmp_path)
    assert [path.name for path in written] == [f"ablation-{option}.png" for option in ablated]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize(
    ("fields", "option", "lines"),
    [
        ({"d_hidden": (8, 8, 16, 16), "num_latents": (64, 128, 64, 128)}, "hidden",
         {"MxD, num-latents 64": [8, 16], "MxD, num-latents 128": [8, 16]}),
        ({"d_hidden": (8, 8, 16, 16), "selection": ("l1",) * 4, "l1_coefficient": (0.1, 0.2, 0.1, 0.2)}, "hidden",
         {"MxD, coefficient 0.1": [8, 16], "MxD, coefficient 0.2": [8, 16]}),
        ({"selection": ("topk", "topk", "batch-topk"), "random_k": (False, True, None), "l0": (32.0, 32.0, 31.0)},
         "selection", {"MxD, fixed K, topk": [32], "MxD, random K, topk": [32], "MxD, batch-topk": [31]}),
        ({"selection": ("topk", "topk", "l1", "l1"), "random_k": (False, True, None, None),
          "l1_coefficient": (None, None, 0.1, 0.2), "l0": (32.0, 32.0, 40.0, 20.0)},
         "random-k", {"MxD, topk, fixed K": [32], "MxD, topk, random K": [32], "MxD, l1": [20, 40]}),
    ],
    ids=["number of latents", "coefficient", "random K", "students of another selection"],
)  # fmt: skip
def test_only_seeds_are_taken_together(
    fields: dict[str, tuple[object, ...]],
    option: str,
    lines: dict[str, list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: dict[str, dict[str, list[float]]] = {}

    def note(drawing: Figure) -> bytes:
        bars = [bar for bar in drawing.axes[0].containers if isinstance(bar, ErrorbarContainer)]
        places = {str(bar.get_label()): np.asarray(cast("Line2D", bar[0]).get_xdata()).tolist() for bar in bars}
        drawn[drawing.texts[0].get_text()] = places
        return b""

    monkeypatch.setattr("mxd.evaluation.ablation.png", note)
    draw_ablations(rows_of(**fields), tmp_path)
    assert drawn[f"Ablation of --{option}"] == lines


def test_energy_is_that_of_what_each_latent_adds() -> None:
    for kind in LAYERS:
        layer, x = layer_of(kind).double(), torch.randn(40, 5, dtype=torch.float64)
        code = layer.encode(x)
        energy = torch.zeros(12, dtype=torch.float64)
        for token in range(40):
            for value, latent in zip(code.values[token], code.indices[token], strict=True):
                atom = layer.atoms(x[token : token + 1], latent.view(1, 1))[0, 0]
                energy[latent] += (value * atom).square().sum().detach()
        shares = energy / energy.sum()
        found = energy_use(layer, x)
        entropy = -sum(float(share) * math.log(share) for share in shares if share > 0)
        assert found.effective_latents == pytest.approx(math.exp(entropy), rel=1e-5)
        assert found.top_share == pytest.approx(float(shares.max()), rel=1e-5)


@pytest.mark.parametrize("alive", [1, 4])
def test_the_effective_number_of_equal_latents_is_their_number(alive: int) -> None:
    layer = LinearTransformMixture(LinearTransformMixtureConfig(d_in=4, d_out=4, num_latents=31, rank=2, k=4))
    with torch.no_grad():
        layer.W_gate.zero_()
        layer.b_gate.fill_(-1.0)[7 : 7 + alive] = 1.0
        for latent in range(31):
            block = slice(layer.offsets[latent], layer.offsets[latent + 1])
            layer.W_down[:, block], layer.W_dec[block] = 0.0, 0.0
            layer.W_down[0, block.start], layer.W_dec[block.start, 1] = 1.0, 1.0
    use = energy_use(layer, torch.randn(20, 4))
    assert use.effective_latents == pytest.approx(alive, rel=1e-6)
    assert use.top_share == pytest.approx(1 / alive, rel=1e-6)


def test_a_layer_without_energy_has_no_shares_of_it() -> None:
    layer = Transcoder(TranscoderConfig(d_in=4, d_out=4, num_latents=8, k=2))
    with torch.no_grad():
        layer.b_enc.fill_(-100.0)
    use = energy_use(layer, torch.randn(5, 4))
    assert math.isnan(use.effective_latents)
    assert math.isnan(use.top_share)


def test_a_latent_with_more_than_half_of_the_energy_is_a_collapse() -> None:
    shares = (0.97, 0.5, math.nan, None)
    rows = [replace(row("molt", k=4, layer=2), top_energy_share=share, effective_latents=1.2) for share in shares]
    (warning,) = collapse_warnings(rows)
    assert warning.startswith("2/molt-k4 has nearly collapsed to one latent, which carries 97% of the energy")
    assert "(effective number of latents: 1.2)" in warning


def test_a_layer_is_measured_at_other_ks_than_its_own_with_the_same_weights(tiny: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny.run, tmp_path / "run")
    evaluation = evaluate_run(run, students=["0/mxd-k4", "1/mxd-k4"], ks=[2, 4, 9], tokens=256)
    rows = [row for row in evaluation.rows if row.layer == 0]
    assert [(row.id, row.k, row.k_trained) for row in rows] == [
        *(("mxd-k4", 4, 4), ("mxd-k4-at2", 2, 4), ("mxd-k4-at9", 9, 4))
    ]
    assert [row.l0 for row in rows] == pytest.approx([4, 2, 9], rel=0.1)
    assert len({row.fvu for row in rows}) == 3
    plain = evaluate_run(run, students=["0/mxd-k4"], tokens=256).rows[0]
    assert replace(rows[0], jacobian_cosine=None) == replace(plain, jacobian_cosine=None)
    write_evaluation(run, evaluation, title="t", footer="f")
    assert "at9" not in (run / "report.html").read_text(), "the report is about what was trained"
    with pytest.raises(ValueError, match=r"k must lie in \[1, "):
        evaluate_run(run, students=["0/mxd-k4"], ks=[10**6])


def test_every_ablation_is_an_option_with_several_values_of_one_command(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mxd = tmp_path / "run", command(capsys)
    grid: Settings = {"hidden": (8, "auto"), "selection": ("topk", "batch-topk", "l1"), "l1_coefficient": 0.01}
    assert mxd(*training(tiny, run, kind="mxd", **grid)).status == 0
    ended = mxd("evaluate", run, "--tokens", 128)
    drawn = [f"ablation-{option}.png" for option in ("hidden", "selection")]
    assert f"Wrote {run}/evaluation.json, frontier.png, {', '.join(drawn)}, trade.png and report.html." in ended.err
    assert sorted(path.name for path in run.glob("ablation-*.png")) == drawn
    rows = {row.id: row for row in read_record(run / "evaluation.json").rows}
    widths = (8, 40)
    assert rows.keys() == {
        f"mxd-k{k}-h{h}-{how}" for h in widths for k, how in ((4, "topk"), (4, "batch-topk"), (16, "l1"))
    }
    l1, topk = rows["mxd-k16-h8-l1"], rows["mxd-k4-h8-topk"]
    assert (l1.k, l1.k_trained, l1.l1_coefficient, l1.random_k) == (16, 16, 0.01, None)
    assert l1.l0 is not None
    assert 4 < l1.l0 < 16
    # An expert more is a row of W_expert more: 2 · d_out operations.
    assert cast("int", l1.flops_per_token) - cast("int", topk.flops_per_token) == (round(l1.l0) - 4) * 2 * 16
    refused = mxd("evaluate", run, "--student", "mxd-k16-h8-l1", "--k", 2)
    assert_refused(refused, "evaluate", "k needs a student with selection topk")
