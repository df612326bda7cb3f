import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mxd import memory as host
from mxd.kernels.backends import using_backend
from mxd.recipes import find_recipe
from mxd.training import decompose as decomposing
from mxd.training import estimate, machine
from mxd.training.config import TrainConfig
from mxd.training.decompose import make_plan
from mxd.training.estimate import (
    Workload,
    duration,
    host_memory,
    memory,
    operations,
    plan_workload,
    shape_workload,
    student_cost,
)
from mxd.training.fitting import largest_grid, require_memory
from mxd.training.grid import plan_students
from tests.tiny_run import Command, TinyRun, assert_refused, training

OFFLINE = ("paper-gpt2", "paper-pythia-410m", "paper-pythia-1.4b", "paper-llama-3.2-3b", "qwen3-1.7b", "gemma-3-4b")
"""Recipes of models that are on no disk of ours."""


@pytest.fixture
def with_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Say how much memory there is, and that the hub's cache is empty."""

    def amount(available: int | None) -> None:
        def told(device: str) -> int | None:
            return available

        for place in ("mxd.training.fitting", "mxd.cli.train"):
            monkeypatch.setattr(f"{place}.available_memory", told)

    def not_cached(model: str, file: str, revision: str | None) -> None:
        return None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", not_cached)
    return amount


def of_recipe(name: str, **changes: object) -> Workload:
    recipe = find_recipe(name)
    return shape_workload(replace(recipe.config(), device="cpu", threads=1, **changes), recipe.shape)  # pyright: ignore


@pytest.mark.parametrize("name", OFFLINE)
def test_a_dry_run_of_a_recipe_needs_neither_model_nor_text(
    mxd: Command, tmp_path: Path, with_memory: Callable[[int | None], None], name: str
) -> None:
    with_memory(2**50)
    ended = mxd("train", "--recipe", name, "--out", tmp_path / "run", "--dry-run", "--device", "cpu")
    assert (ended.status, ended.out) == (0, "")
    for words in ("skip-transcoder-k256", "480,000,000 tokens", "is not on this disk", "Memory, estimated: "):
        assert words in ended.err
    assert re.search(r"Time, estimated: [\d.,]+ days of training; .* GFLOP/s that a matrix product reached", ended.err)
    assert not (tmp_path / "run").exists()


def test_another_layer_context_or_model_than_the_recipes_is_checked(
    mxd: Command, tmp_path: Path, with_memory: Callable[[int | None], None]
) -> None:
    with_memory(None)
    words = ("train", "--recipe", "paper-gpt2", "--out", tmp_path / "run", "--dry-run", "--device", "cpu")
    assert_refused(mxd(*words, "--layer", "12"), "train", "layer must lie in [0, 11]", "got 12")
    assert_refused(mxd(*words, "--context", "2048"), "train", "context must be at most 1024", "got 2048")
    assert_refused(mxd(*words, "--model", tmp_path / "none"), "train", "found no folder")
    ended = mxd(*words, "--layer", "11", "--kind", "mxd", "--k", "32")
    assert ended.status == 0
    assert "how much is available cannot be told here" in ended.err


def test_a_grid_that_does_not_fit_is_refused_with_the_largest_that_does(
    mxd: Command, tmp_path: Path, with_memory: Callable[[int | None], None]
) -> None:
    whole = of_recipe("paper-gpt2")
    with_memory(memory(whole).total // 2)
    ended = mxd("train", "--recipe", "paper-gpt2", "--out", tmp_path / "run", "--dry-run", "--device", "cpu")
    assert ended.status == 2
    assert "Memory, estimated: " in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("mxd train: what was asked for must fit in memory; an estimated ")
    assert "--layer 8 --kind mxd transcoder skip-transcoder --k 16" in last
    given = re.search(r"fits is (--layer .*) \((\d+) of 15 students\)", last)
    assert given is not None
    words = ("train", "--recipe", "paper-gpt2", "--out", tmp_path / "run", "--dry-run", "--device", "cpu")
    assert mxd(*words, *given[1].split()).status == 0, "what was named fits"


def test_nothing_is_trained_or_written_where_memory_is_short(
    mxd: Command, tiny: TinyRun, tmp_path: Path, with_memory: Callable[[int | None], None]
) -> None:
    with_memory(1000)
    ended = mxd(*training(tiny, tmp_path / "run"))
    assert_refused(ended, "train", "must fit in memory", "beside the model", "not even one student of them fits")
    assert not (tmp_path / "run").exists()
    with_memory(None)
    ended = mxd(*training(tiny, tmp_path / "run"))
    assert ended.status == 0
    assert "how much is available cannot be told here" in ended.err


def grid(**changes: object) -> Workload:
    settings: dict[str, object] = {"layer": (0, 1, 2), "kind": ("mxd", "transcoder"), "k": (4, 8, 16), "seeds": 2}
    return of_recipe("stories260k", **(settings | {"buffer_tokens": 4096, "expansion": 128} | changes))


def test_no_larger_grid_fits() -> None:
    whole = grid()
    asked = whole.config
    totals = {
        (layers, kinds, ks, seeds): memory(
            grid(layer=asked.layer[:layers], kind=asked.kind[:kinds], k=asked.k[:ks], seeds=seeds)
        ).total
        for layers, kinds, ks, seeds in product((1, 2, 3), (1, 2), (1, 2, 3), (1, 2))
    }
    results: set[bool] = set()
    for part in (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0):
        available = int(part * memory(whole).total)
        largest = largest_grid(whole, available)
        results.add(largest is None)
        # A part is charged the largest step of the whole grid.
        surely = [size for size, total in totals.items() if total + memory(whole).step <= available]
        if largest is None:
            assert surely == []
            continue
        found = (len(largest.layers), len(largest.kinds), len(largest.ks), largest.seeds)
        assert totals[found] <= largest.total <= available
        assert largest.students == prod(found)
        comparable = [size for size in surely if size[1] == 2] or surely
        assert largest.students >= max(map(prod, comparable), default=0)
    assert results == {True, False}


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "skip-transcoder", "topk-sae"])
def test_weights_and_moments_are_counted_exactly(tiny: TinyRun, kind: str) -> None:
    config = TrainConfig(
        model=str(tiny.model), text=(str(tiny.text),), layer=(0,), tokens=512, kind=(kind,), k=(4,), num_latents=24,
        batch_tokens=64, context=16, buffer_tokens=256, device="cpu", precision="float32", lr=1e-3,
    )  # fmt: skip
    plan = make_plan(config)
    workload = plan_workload(plan)
    needed, (cost,) = memory(workload), workload.costs
    student = decomposing._student(plan, plan.students[0])
    x, target = torch.randn(64, plan.sites[0].d_in), torch.randn(64, plan.sites[0].d_out)
    student.step(0, x, target, torch.ones(64, dtype=torch.bool), lr_factor=1.0, autocast=None)
    tensors = student.tensors()
    assert sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("layer.")) == needed.weights
    moments = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("optimizer.") and tensor.ndim)
    assert moments == needed.moments
    apart = [tensor for name, tensor in tensors.items() if name.startswith("layer.") and not tensor.is_contiguous()]
    assert sum(tensor.nbytes for tensor in apart) == cost.copied_bytes
    model = plan.language_model.model
    assert needed.model == sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
    stream = decomposing.activation_stream(plan)
    assert stream.buffer_bytes <= needed.buffer <= stream.buffer_bytes + 2 * 64 * (x.shape[1] + target.shape[1]) * 4


@pytest.mark.parametrize(
    ("kind", "encoder"), [("mxd", "mlp"), ("mxd", "glu"), ("transcoder", "mlp"), ("skip-transcoder", "mlp")]
)
def test_operations_are_those_that_torch_counts(kind: str, encoder: str) -> None:
    recipe = find_recipe("demo")
    config = replace(recipe.config(), kind=(kind,), k=(8,), encoder=encoder, num_latents=40, device="cpu")  # pyright: ignore
    (student,) = plan_students(config, recipe.shape.sites((3,)))
    cost, network, tokens = student_cost(student, config, "cpu"), student.network, 16
    layer = student.build()
    x, target = torch.randn(tokens, network.d_in), torch.randn(tokens, network.d_out)
    with using_backend("torch"), FlopCounterMode(display=False) as counter:
        prediction = layer(x).prediction
        forward = counter.get_total_flops()
        (prediction - target).square().sum().backward()
    # What touches k rows is no matrix product, so that torch does not count it.
    rows = 2 * network.k * network.d_out
    assert forward == tokens * (cost.forward - rows)
    assert counter.get_total_flops() == tokens * (cost.training - 3 * rows - 2 * network.k * network.d_in)


def test_a_model_costs_what_its_shape_says(tiny: TinyRun) -> None:
    recipe = find_recipe("demo")
    config = replace(recipe.config(), text=(str(tiny.text),), device="cpu", precision="float32", tokens=4096)
    config = replace(config, batch_tokens=256)
    loaded, guessed = plan_workload(make_plan(config)), shape_workload(config, recipe.shape)
    assert operations(loaded) == operations(guessed)
    assert memory(loaded) == memory(guessed)
    # Oldfield et al., 2025: 42.5 million operations a token forward for GPT-2's mixture, of which 9.4 are the MLP's.
    gpt2 = of_recipe("paper-gpt2", kind=("mxd",), k=(32,), num_latents=21_490)
    assert operations(gpt2).forward == pytest.approx(42.5e6, rel=2e-3)
    assert operations(gpt2).model == 9 * (2 * 7_087_872 + 4 * 128 * 768)


def test_time_follows_from_operations_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = grid()

    def speed(device: str, dtype: torch.dtype) -> float:
        return 1e12

    monkeypatch.setattr(estimate, "product_speed", speed)
    needed = operations(workload)
    taken = duration(workload)
    assert taken.speed == 1e12
    assert taken.seconds == pytest.approx(8e6 * (needed.training + needed.model) / (1e12 * estimate.EFFICIENCY))
    assert needed.forward < needed.training < 3 * needed.forward


def test_speed_is_measured_without_touching_random_numbers() -> None:
    state = torch.get_rng_state()
    assert machine.product_speed("cpu", torch.float32) > 1e6
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_is_read_from_the_kernel_and_from_every_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:    700 kB\n")
    assert host._available_on_linux(tmp_path / "meminfo") == 700 * 1024
    assert host._available_on_linux(tmp_path / "none") is None
    group = tmp_path / "groups" / "above" / "own"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("1:name=systemd:/elsewhere\n0::/above/own\n")
    for folder, limit in {group: "max", group.parent: "5000"}.items():
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("4000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert host._left_to_control_groups(tmp_path / "cgroup", tmp_path / "groups") == [1300]
    assert host._left_to_control_groups(tmp_path / "none") == []
    monkeypatch.setattr(host, "_left_to_control_groups", lambda: [1300])
    monkeypatch.setattr(host, "_available_on_linux", lambda: 700)
    assert host.available_memory("cpu") == 700
    monkeypatch.setattr(host, "_available_on_linux", lambda: 7000)
    assert host.available_memory("cpu") == 1300
    assert host.available_memory("meta") is None
    monkeypatch.setattr(host, "_available_on_linux", lambda: None)
    assert host.available_memory("cpu") == host._installed()


def test_what_fits_is_let_through(with_memory: Callable[[int | None], None]) -> None:
    workload = grid()
    with_memory(memory(workload).total)
    assert require_memory(workload) == memory(workload).total
    with_memory(memory(workload).total - 1)
    with pytest.raises(ValueError, match="must fit in memory"):
        require_memory(workload)


def test_a_cuda_device_and_its_host_are_charged_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = replace(grid(), shard_bytes=2**30)
    on_cuda = replace(on_cpu, resources=replace(on_cpu.resources, device="cuda"))
    assert host_memory(on_cpu) == 0
    assert host_memory(on_cuda) == memory(on_cuda).weights + memory(on_cuda).moments + 2**30
    assert memory(on_cpu).buffer - memory(replace(on_cpu, shard_bytes=0)).buffer == 2**30
    assert memory(on_cuda).buffer == memory(on_cpu).buffer - 2**30
    assert memory(on_cuda).step == memory(on_cpu).step + estimate.CUDA_BYTES
    free = {"cuda": memory(on_cuda).total, "cpu": host_memory(on_cuda)}
    monkeypatch.setattr("mxd.training.fitting.available_memory", free.get)
    assert require_memory(on_cuda) == free["cuda"]
    free["cpu"] -= 1
    with pytest.raises(
        ValueError, match=r"in the host's memory too.*and a shard of the cache: an estimated 1\.\d+ GiB"
    ):
        require_memory(on_cuda)
    free |= {"cpu": 2**50, "cuda": memory(on_cuda).total - 1}
    with pytest.raises(ValueError, match=r"must fit in memory; .* available on cuda; the largest grid"):
        require_memory(on_cuda)


SHRINKING: dict[str, tuple[dict[str, object], str]] = {
    "buffer": ({"buffer_tokens": 2**20}, "--buffer-tokens"),
    "batch": ({"batch_tokens": 2**17, "buffer_tokens": 2**17}, "--micro-batch-tokens"),
    "batch with micro-batches": ({"batch_tokens": 2**17, "aux_coefficient": 0.1}, "--batch-tokens"),
    "matched sizes": ({"expansion": 2048}, "--expansion"),
    "given sizes": ({"num_latents": (5000, 40000)}, "--num-latents"),
}


@pytest.mark.parametrize("case", SHRINKING)
def test_a_run_that_does_not_fit_names_the_options_with_which_all_of_it_would(
    with_memory: Callable[[int | None], None], case: str
) -> None:
    changes, option = SHRINKING[case]
    whole = grid(**changes)
    available = int(0.8 * memory(whole).total)
    with_memory(available)
    with pytest.raises(ValueError, match="all of it fits with") as refusal:
        require_memory(whole)
    words = str(refusal.value).partition("all of it fits with ")[2].rstrip(".")
    named = {part.split()[0]: tuple(map(int, part.split()[1:])) for part in words.split(", or with ")}
    assert option in named
    for name, values in named.items():
        setting = name.removeprefix("--").replace("-", "_")
        value: object = values if setting == "num_latents" else values[0]
        assert memory(grid(**(changes | {setting: value}))).total <= available, name
        twice: object = tuple(2 * one for one in values) if setting == "num_latents" else 2 * values[0]
        assert memory(grid(**(changes | {setting: twice}))).total > available, f"{name} could be larger"


def test_steps_are_whole_and_the_command_says_what_that_makes(mxd: Command, tiny: TinyRun, tmp_path: Path) -> None:
    ended = mxd(*training(tiny, tmp_path / "run", "--dry-run", tokens=1100))
    assert "3 steps, 1,100 tokens, which whole steps of 512 make 1,536 (" in ended.err
    ended = mxd(*training(tiny, tmp_path / "run", "--dry-run", tokens=1024))
    assert "2 steps, 1,024 tokens (" in ended.err
    assert "tiny.jsonl: 300 documents, 30 held out.\n" in ended.err
