"""Settings as axes of the grid: which students there are, what they are called, and that they train and resume."""

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.data.activations import ActivationBatch
from mxd.layers import LAYERS, LinearTransformMixtureConfig, SharedTranscoderConfig
from mxd.layers.sizing import num_parameters
from mxd.recipes import find_recipe
from mxd.settings import kinds_that_read
from mxd.training.config import Settings, TrainConfig, require_read, values_of
from mxd.training.estimate import memory, shape_workload
from mxd.training.fitting import largest_grid
from mxd.training.grid import StudentPlan, plan_students
from tests.train_command import Trainer, nothing

BASE = TrainConfig(model="m", text=("t",), layer=(0,), tokens=4096, kind=("mxd",), k=(8,), num_latents=64)
SHAPE = find_recipe("stories260k").shape
VALUES: Mapping[str, tuple[object, ...]] = {
    "num_latents": (64, 128, 256),
    "hidden": ("auto", 16, 32),
    "activation": ("auto", "relu", "gelu"),
    "encoder": ("auto", "mlp", "glu"),
    "rank": ("auto", 4, 16),
    "normalize_experts": (True, False),
    "shared_expert": (False, True),
    "selection": ("topk", "batch-topk", "l1"),
    "l1_coefficient": (None, 0.1, 0.01),
    "random_k": (False, True),
    "init": ("auto", "paper", "model"),
    "shared_penalty": ("auto", 0.1, 1.0),
}


def students_of(**changes: object) -> list[StudentPlan]:
    config = replace(BASE, **changes)  # pyright: ignore[reportArgumentType]
    return plan_students(config, SHAPE.sites(config.layers))


def ids_of(**changes: object) -> list[str]:
    return [student.id for student in students_of(**changes)]


@pytest.mark.parametrize("expansion", [8, 16, 32, 64])
def test_a_shared_expert_takes_half_of_the_parameters_and_at_least_the_models_own_width(expansion: int) -> None:
    (student,) = students_of(kind=("shared-transcoder",), num_latents=None, expansion=expansion)
    network = cast(SharedTranscoderConfig, student.network)
    budget = num_parameters("transcoder", expansion * network.d_in, network.d_in, network.d_out)
    shared = network.num_parameters - network.num_latents * (network.d_in + 1 + network.d_out)
    assert network.num_parameters == pytest.approx(budget, rel=1e-3)
    if expansion == 8:
        assert network.d_hidden == 172, "half of them would be narrower than the MLP, which it begins as"
    else:
        assert shared == pytest.approx(budget / 2, rel=0.01)
        assert network.d_hidden > 172


def test_a_shared_expert_is_as_wide_as_the_mlp_where_no_budget_is_known() -> None:
    (student,) = students_of(kind=("shared-transcoder",), num_latents=64)
    assert cast(SharedTranscoderConfig, student.network).d_hidden == 172
    (student,) = students_of(kind=("shared-transcoder",), num_latents=None, expansion=32, hidden=200)
    assert cast(SharedTranscoderConfig, student.network).d_hidden == 200


def test_a_setting_multiplies_only_the_kinds_that_read_it_and_names_what_it_changes() -> None:
    assert set(VALUES) == set(Settings._fields)
    everyone = ("mxd", "transcoder", "skip-transcoder", "topk-sae", "low-rank", "molt")
    found = ids_of(kind=everyone, hidden=("auto", 64), rank=(4, 16), normalize_experts=(True, False))
    mixtures = [f"h{hidden}" for hidden in (172, 64)]
    assert found == [
        *(f"mxd-k8-{hidden}-{rows}" for hidden, rows in product(mixtures, ("unit", "free"))),
        *("transcoder-k8-unit", "transcoder-k8-free", "skip-transcoder-k8", "topk-sae-k8-unit", "topk-sae-k8-free"),
        *(f"low-rank-k8-{h}-{r}-{rows}" for h, r, rows in product(mixtures, ("r4", "r16"), ("unit", "free"))),
        *("molt-k8-r4", "molt-k8-r16"),
    ]
    assert ids_of(activation=("auto", "relu", "silu"), encoder=("mlp", "glu")) == [
        *("mxd-k8-silu-mlp", "mxd-k8-silu-glu", "mxd-k8-relu-mlp", "mxd-k8-relu-glu")
    ], "the model's own activation is silu"
    assert ids_of(num_latents=(64, 128), k=(8, 16)) == [f"mxd-k{k}-n{n}" for k in (8, 16) for n in (64, 128)]


def test_what_a_selection_does_not_read_makes_no_student() -> None:
    asked = {"selection": ("topk", "batch-topk", "l1"), "l1_coefficient": (0.1, 0.01), "random_k": (False, True)}
    found = students_of(k=(4, 8), **asked)
    assert [student.id for student in found] == [
        *("mxd-k4-topk-fixed", "mxd-k4-topk-random", "mxd-k4-batch-topk", "mxd-k64-l1-c0.1", "mxd-k64-l1-c0.01"),
        *("mxd-k8-topk-fixed", "mxd-k8-topk-random", "mxd-k8-batch-topk"),
    ]
    assert [student.l1_coefficient for student in found] == [None, None, None, 0.1, 0.01, None, None, None]
    assert [student.random_k for student in found] == [False, True, False, False, False, False, True, False]


def test_one_value_of_everything_is_named_by_kind_and_k_alone() -> None:
    assert ids_of() == ["mxd-k8"]
    assert ids_of(activation=("relu",), hidden=16, selection=("batch-topk",), seeds=2) == [
        "mxd-k8-seed0",
        "mxd-k8-seed1",
    ]
    one = students_of(activation="relu", hidden=16, rank=4, selection="batch-topk", kind=("mxd", "low-rank"))
    listed = {"activation": ("relu",), "hidden": (16,), "rank": (4,), "selection": ("batch-topk",)}
    several = students_of(kind=("mxd", "low-rank"), **listed)
    assert one == several


@st.composite
def grids(draw: st.DrawFn) -> dict[str, object]:
    def some(values: tuple[object, ...], most: int = 3) -> tuple[object, ...]:
        return tuple(draw(st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)))

    grid: dict[str, object] = {name: some(VALUES[name], 2) for name in VALUES}
    grid |= {
        "kind": some(("mxd", "transcoder", "shared-transcoder", "low-rank", "molt")),
        "k": some((2, 8)),
        "seeds": draw(st.integers(1, 2)),
    }
    selections = values_of(grid["selection"])
    grid["l1_coefficient"] = some((0.1, 0.01), 2) if "l1" in selections else None
    grid["random_k"] = grid["random_k"] if "topk" in selections else False
    return grid


@settings(deadline=None, max_examples=12)
@given(grids())
def test_ids_are_unique_and_neither_order_nor_a_sibling_of_another_kind_changes_them(
    grid: dict[str, object],
) -> None:
    students = students_of(**grid)
    assert len({student.id for student in students}) == len(students)
    assert len({replace(student, id="") for student in students}) == len(students), "no two students are alike"
    turned = {name: value[::-1] if isinstance(value, tuple) and name != "k" else value for name, value in grid.items()}
    assert {s.id: replace(s, id="") for s in students_of(**turned)} == {s.id: replace(s, id="") for s in students}
    for kind in values_of(grid["kind"]):
        alone = students_of(**(grid | {"kind": (kind,)}))
        assert alone == [student for student in students if student.kind == kind]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"activation": ("relu", "relu")}, "activation must name each only once; got relu relu"),
        ({"hidden": ()}, "hidden must name at least one; got none"),
        ({"activation": ("relu", "rely")}, "activation must be one of relu.*got 'rely'"),
        ({"rank": (4, 0)}, "rank must be at least 1; got 0"),
        ({"num_latents": (64, 4)}, "k must be at most num-latents, 4; got 8"),
        ({"selection": "l1"}, "l1-coefficient must be given with selection l1 and only with it; got none"),
        ({"l1_coefficient": 0.1}, "l1-coefficient must be given with.*got 0.1 with selection topk"),
        ({"selection": "l1", "l1_coefficient": (0.1, -1.0)}, "l1-coefficient must be finite positive numbers"),
        ({"selection": "batch-topk", "random_k": True}, "random-k needs selection topk.*got batch-topk"),
        ({"selection": "batch-topk", "micro_batch_tokens": 64}, "micro-batch-tokens must be left out.*got 64"),
        ({"k": (48,), "random_k": True}, "k must be at most two thirds of the number of latents.*got 48 of 64 for mxd"),
        ({"selection": "batch-topk", "num_latents": 8193}, "at most 8,192 with selection batch-topk"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_sentence(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        students_of(**changes)


def test_the_largest_part_of_a_grid_counts_every_setting() -> None:
    config = replace(BASE, kind=("mxd", "transcoder"), k=(4, 8), hidden=(16, 64), seeds=2, device="cpu")
    config = replace(config, num_latents=4096, buffer_tokens=4096)
    whole = shape_workload(config, SHAPE)
    found = largest_grid(whole, memory(whole).total)
    assert found is not None
    assert (found.students, found.ks, found.seeds) == (12, (4, 8), 2)
    part = largest_grid(whole, memory(shape_workload(replace(config, k=(8,)), SHAPE)).total)
    assert part is not None
    assert part.students == 6, "two hidden widths of mxd and one transcoder, with one k and two seeds or the reverse"


def test_students_with_l1_count_with_the_first_k_even_if_another_k_is_their_number_of_latents() -> None:
    config = replace(BASE, k=(8, 64), selection=("topk", "l1"), l1_coefficient=0.1, device="cpu", buffer_tokens=4096)
    needed = memory(shape_workload(replace(config, k=(8,)), SHAPE)).total
    found = largest_grid(shape_workload(config, SHAPE), needed)
    assert found is not None
    assert (found.ks, found.students, found.total) == ((8,), 2, needed)


def test_batch_topk_and_random_k_resume_bit_for_bit(trainer: Trainer, tmp_path: Path) -> None:
    words = ["--kind", "transcoder", "--selection", "topk", "batch-topk", "--random-k", "False", "True"]
    words += ["--snapshot-every", "600"]

    def files(run: Path) -> dict[str, bytes]:
        return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("layers/*/*/*")}

    def stop(step: int, batch: ActivationBatch) -> None:
        if step == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    assert trainer(tmp_path / "whole", *words).status == 0
    trainer.before_batch = stop
    assert trainer(tmp_path / "parts", *words).status == 130
    trainer.before_batch = nothing
    assert trainer(tmp_path / "parts", *words, "--resume").status == 0
    assert trainer.steps[0] == 13
    expected = files(tmp_path / "whole")
    names = {name.split("/")[2] for name in expected}
    assert names == {"transcoder-k4-topk-fixed", "transcoder-k4-topk-random", "transcoder-k4-batch-topk"}
    assert files(tmp_path / "parts") == expected
    one, other = (expected[f"layers/0/transcoder-k4-topk-{how}/model.safetensors"] for how in ("fixed", "random"))
    assert one != other


OTHER: Mapping[str, object] = {
    "num_latents": 128,
    "hidden": 16,
    "activation": "relu",
    "encoder": "mlp",
    "rank": 4,
    "normalize_experts": False,
    "shared_expert": True,
    "selection": "batch-topk",
    "random_k": True,
    "shared_penalty": 1.0,
}
"""A value of each setting, l1-coefficient and init apart, with which no student is as it is by default."""


@pytest.mark.parametrize("name", OTHER)
def test_a_kind_reads_a_setting_if_and_only_if_its_students_come_out_otherwise(name: str) -> None:
    changed = [kind for kind in LAYERS if students_of(kind=(kind,)) != students_of(kind=(kind,), **{name: OTHER[name]})]
    assert kinds_that_read(name, OTHER[name]) == changed != []


def test_a_beginning_is_read_by_the_kinds_that_then_begin_so() -> None:
    for init in ("paper", "model"):
        begun = [kind for kind in LAYERS if students_of(kind=(kind,), init=init)[0].init == init]
        assert kinds_that_read("init", init) == begun
    assert set(OTHER) | {"init", "l1_coefficient"} == set(Settings._fields)


def test_what_no_kind_reads_is_refused_unless_another_kind_or_the_recipe_does() -> None:
    def check(own: TrainConfig | None = None, **changes: object) -> None:
        require_read(replace(BASE, **changes), own)  # pyright: ignore[reportArgumentType]

    check(kind=("transcoder",), init="paper", normalize_experts=(True, False))
    check(kind=("transcoder", "molt"), rank=(4, 16))
    with pytest.raises(ValueError, match=r"^rank 4 is read by low-rank, molt only; got it with kind transcoder mxd;"):
        check(kind=("transcoder", "mxd"), rank=("auto", 4))
    with pytest.raises(ValueError, match=r"^normalize-experts False is read by mxd, .*, low-rank only; got it with"):
        check(kind=("molt",), normalize_experts=(True, False))
    with pytest.raises(ValueError, match=r"^init model is read by mxd, shared-transcoder only"):
        check(kind=("transcoder",), init=("paper", "model"))
    paper = find_recipe("paper-gpt2").config()
    require_read(replace(paper, kind=("transcoder",)), paper)
    with pytest.raises(ValueError, match=r"^activation gelu is read by mxd, shared-transcoder, low-rank only"):
        require_read(replace(paper, kind=("transcoder",)))
    with pytest.raises(ValueError, match=r"^activation relu is read by"):
        require_read(replace(paper, kind=("transcoder",), activation="relu"), paper)


@pytest.mark.parametrize(("expansion", "k"), product([1, 4, 16, 32, 64], [(1,), (4, 16), (32,), (100, 8), (300,)]))
def test_a_molts_widest_rank_is_the_width_or_the_largest_part_that_leaves_128_transforms_whatever_the_ks(
    expansion: int, k: tuple[int, ...]
) -> None:
    def parameters(rank: int, transforms: int) -> int:
        return num_parameters("molt", transforms, 64, 64, rank=rank)

    budget, fewest = num_parameters("transcoder", expansion * 64, 64, 64), 128
    wanted = next((rank for rank in (64, 32, 16, 8, 4, 2) if parameters(rank, fewest) <= budget), 1)
    asked = {"kind": ("molt",), "expansion": expansion, "num_latents": None, "k": k}
    if parameters(wanted, max(k)) > budget:
        with pytest.raises(ValueError, match="k must lie in"):
            students_of(**asked)
        return
    for student in students_of(**asked):
        network = cast(LinearTransformMixtureConfig, student.network)
        assert network.rank == wanted
        assert wanted == 1 or network.num_latents >= fewest
    (given,) = students_of(kind=("molt",), num_latents=max(k), k=max(k))
    assert cast(LinearTransformMixtureConfig, given.network).rank == 64
