"""`mxd pretrain`: recipes, resuming, refusals."""

import json
import os
import signal
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mxd.pretraining import loop
from mxd.pretraining.artifact import load_model
from mxd.pretraining.config import LanguageConfig, Optimization
from mxd.pretraining.loop import _seed_of
from mxd.pretraining.recipes import find_recipe
from mxd.pretraining.run import make_plan
from mxd.pretraining.surgery import MlpChoice, parameter_groups
from mxd.pretraining.tasks import Batch, LanguageTask
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import locked
from tests.tiny_run import Command, Ended, assert_refused, command, tree

STEPS = 12


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return command(capsys)


def language_words(text: Path, model: Path, out: Path, *more: object, device: str = "cpu") -> list[object]:
    sizes = ["--d-model", 16, "--num-layers", 2, "--num-heads", 2, "--context", 16, "--batch-tokens", 64]
    sizes += ["--tokens", 64 * STEPS, "--eval-tokens", 160, "--eval-every", 5, "--num-experts", 4, "--threads", 1]
    place = ["--text", text, "--tokenizer", model, "--out", out, "--precision", "float32", "--device", device]
    return ["pretrain", "--recipe", "stdlib-cp", *sizes, *place, *more]


def image_words(images: Path, out: Path, *more: object) -> list[object]:
    sizes = ["--image-size", 8, "--patch-size", 2, "--num-blocks", 2, "--d-model", 8, "--d-token", 10, "--threads", 1]
    sizes += ["--d-channel", 16, "--num-classes", 4, "--batch-images", 20, "--epochs", 2, "--num-experts", 3]
    place = ["--images", images, "--out", out, "--mixup", 0.5, "--stochastic-depth", 0.2, "--precision", "float32"]
    place += ["--device", "cpu"]
    return ["pretrain", "--recipe", "mnist-tr", "--ring", 2, *sizes, *place, *more]


def content(out: Path) -> Mapping[str, object]:
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(out / "metrics.jsonl")]
    model = {path.name: path.read_bytes() for path in sorted((out / "model").iterdir())}
    return {"records": records, "model": model, "result": (out / "pretraining.json").read_bytes()}


def stopped_after(steps: int, number: signal.Signals, patch: pytest.MonkeyPatch) -> None:
    """Have a signal arrive in the middle of a step."""
    backward, seen = loop._backward, [0]

    def counted(*arguments: object) -> Tensor:
        seen[0] += 1
        if seen[0] == steps:
            os.kill(os.getpid(), number)
        return backward(*arguments)  # pyright: ignore[reportArgumentType]

    patch.setattr(loop, "_backward", counted)


@pytest.mark.parametrize("sort", ["language", "images"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    sort: str, text: Path, gpt2: Path, images: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(name: str, *more: object) -> list[object]:
        if sort == "language":
            return language_words(text, gpt2, tmp_path / name, *more)
        return image_words(images, tmp_path / name, *more)

    whole = run(*words("whole", "--json"))
    assert whole.status == 0, whole.err
    result = json.loads(whole.out)
    assert result == json.loads((tmp_path / "whole" / "pretraining.json").read_text())
    for number, after in ((signal.SIGTERM, 3), (signal.SIGINT, 8)):
        with monkeypatch.context() as patch:
            stopped_after(after, number, patch)
            ended = run(*words("parts", "--resume"))
        assert ended.status == 130
        assert f"stopped by {number.name} after step" in ended.err
        assert "go on with: mxd" in ended.err
    ended = run(*words("parts", "--resume"))
    assert ended.status == 0, ended.err
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    before = tree(tmp_path / "parts")
    ended = run(*words("parts", "--resume"))
    assert (ended.status, "finished already" in ended.err) == (0, True)
    assert tree(tmp_path / "parts") == before
    with monkeypatch.context() as patch:
        # What is finished needs neither data nor model.
        patch.setattr("mxd.pretraining.run.read_language", None)
        patch.setattr("mxd.pretraining.run.read_image_folder", None)
        again = run(*words("parts", "--resume", "--json"))
        assert (again.status, json.loads(again.out)) == (0, result)
        assert tree(tmp_path / "parts") == before
    assert_refused(run(*words("parts")), "pretrain", "exists; pass --resume")
    assert_refused(run(*words("parts", "--resume", "--lr", "0.5")), "pretrain", "config.optimization.lr (")


def test_steps_are_repeatable_on_the_device_in_the_precision(
    text: Path, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    @contextmanager
    def noted(device: str, precision: str) -> Generator[None, None, None]:
        asked.append((device, precision))
        yield
        asked.append("closed")

    backward = loop._backward

    def seen(*arguments: object) -> Tensor:
        asked.append("step")
        return backward(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(loop, "deterministic", noted)
    monkeypatch.setattr(loop, "_backward", seen)
    plan = make_plan(replace(language_config(text, gpt2), tokens=64))
    loop.pretrain(
        plan.task, plan.config.optimization, tmp_path, name="x", device="cpu", precision="float32", eval_every=1
    )
    assert asked == [("cpu", "float32"), "step", "closed"]


def test_a_killed_run_goes_on_from_its_newest_snapshot(
    text: Path, gpt2: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    backward, seen = loop._backward, [0]

    def dying(*arguments: object) -> Tensor:
        seen[0] += 1
        if seen[0] == 8:
            raise Killed
        return backward(*arguments)  # pyright: ignore[reportArgumentType]

    words = ("--snapshot-every", 0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_backward", dying)
        with pytest.raises(Killed):
            run(*language_words(text, gpt2, tmp_path / "killed", *words))
    assert sorted(path.name for path in (tmp_path / "killed" / "snapshots").glob("[0-9]*")) == [
        "0000000006",
        "0000000007",
    ]
    assert run(*language_words(text, gpt2, tmp_path / "killed", *words, "--resume")).status == 0
    assert run(*language_words(text, gpt2, tmp_path / "whole")).status == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_language_model_learns_and_its_model_is_what_was_evaluated(
    text: Path, gpt2: Path, tmp_path: Path, run: Command
) -> None:
    ended = run(*language_words(text, gpt2, tmp_path / "run", "--tokens", 64 * 80, "--lr", 0.01, "--warmup-steps", 2))
    assert ended.status == 0, ended.err
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in record]
    losses = [float(str(record["held_out_loss"])) for record in records]
    assert losses[-1] < losses[0] - 0.3
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(stored["blocks"]) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    plan = make_plan(language_config(text, gpt2))
    assert isinstance(plan.task, LanguageTask)
    plan.task.model = load_model(tmp_path / "run" / "model")
    assert plan.task.evaluate()["held_out_loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()


def language_config(text: Path, model: Path) -> LanguageConfig:
    return LanguageConfig(
        recipe="test",
        text=(str(text),),
        tokenizer=str(model),
        d_model=16,
        num_layers=2,
        num_heads=2,
        context=16,
        tokens=640,
        batch_tokens=64,
        eval_tokens=160,
        mlp=MlpChoice(kind="cp", num_experts=(4,)),
        optimization=Optimization(lr=0.01, threads=1, device="cpu", precision="float32"),
    )


def test_what_is_not_an_mlp_begins_alike_and_the_data_come_in_the_same_order(text: Path, gpt2: Path) -> None:
    configs = [language_config(text, gpt2)]
    configs += [replace(configs[0], mlp=replace(configs[0].mlp, kind=kind, ring=2)) for kind in ("dense", "tr")]
    tasks = [make_plan(config).task for config in configs]
    states = [task.model.state_dict() for task in tasks]
    shared = [name for name in states[0] if ".mlp." not in name]
    assert len(shared) > 10
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in shared)
    batches = [task.next_batch(torch.Generator()).inputs for task in tasks]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])


def test_parts_of_a_batch_add_up_to_its_gradient(text: Path, gpt2: Path) -> None:
    gradients: list[list[Tensor]] = []
    for micro_batch in (None, 3):
        plan = make_plan(language_config(text, gpt2))
        plan.task.model.double()
        optimization = replace(plan.config.optimization, micro_batch=micro_batch)
        loop._backward(plan.task, optimization, torch.Generator(), torch.autocast("cpu", enabled=False))
        gradients.append([parameter.grad for parameter in plan.task.model.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert [len(part.inputs) for part in Batch(torch.zeros(4, 2), torch.zeros(4)).split(3)] == [3, 1]


def test_weights_decay_where_they_are_matrices(text: Path, gpt2: Path) -> None:
    model = make_plan(language_config(text, gpt2)).task.model
    decaying, others = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    counted = [sum(parameter.numel() for parameter in group["params"]) for group in (decaying, others)]  # pyright: ignore
    assert sum(counted) == sum(parameter.numel() for parameter in model.parameters())
    kept = {id(parameter) for parameter in others["params"]}  # pyright: ignore
    spared = {name for name, parameter in model.named_parameters() if id(parameter) in kept}
    assert not [name for name in spared if name.endswith("b_in")]
    assert all(name.endswith("bias") or ".ln_" in name for name in spared)


def test_the_learning_rate_rises_and_falls() -> None:
    cosine = Optimization(lr=1.0, final_lr=0.1, warmup_steps=3)
    rates = [cosine.rate(step, 23) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[13] == pytest.approx(0.55)
    assert rates[23] == pytest.approx(0.1)
    linear = Optimization(lr=1.0, schedule="linear")
    assert [linear.rate(step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert Optimization(lr=1.0, schedule="constant").rate(3, 4) == 1.0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--num-experts", "0"), "num_experts must name at least one expert"),
        (("--num-experts", "4000"), "parameters for 4000 experts"),
        (("--rank-fraction", "-1"), "rank-fraction must be a positive number"),
        (("--ring", "0"), "ring must be at least 1"),
        (("--lr", "0"), "lr must be a positive number"),
        (("--final-lr", "1"), "final-lr must lie in [0, lr]"),
        (("--batch-tokens", "65"), "batch-tokens must be a multiple of context, 16"),
        (("--num-heads", "3"), "d-model must be a multiple of num-heads"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
        (("--snapshot-every", "-1"), "snapshot-every must be"),
    ],
)
def test_what_cannot_be_met_is_one_sentence_and_writes_nothing(
    more: tuple[str, ...], sentence: str, text: Path, gpt2: Path, tmp_path: Path, run: Command
) -> None:
    assert_refused(run(*language_words(text, gpt2, tmp_path / "run", *more)), "pretrain", sentence)
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_are_refused(images: Path, tmp_path: Path, run: Command) -> None:
    def refused(sentence: str, folder: Path = images, *more: object) -> None:
        assert_refused(run(*image_words(folder, tmp_path / "run", *more)), "pretrain", sentence)
        assert not (tmp_path / "run").exists()

    refused("train.npz must be an .npz file", tmp_path)
    refused("labels in", images, "--num-classes", 3)
    refused("must have channels, height and width (3, 8, 8)", images, "--channels", 3)
    refused("patch-size must divide", images, "--patch-size", 3)
    refused("batch-images must be at most the number of training images, 200", images, "--batch-images", 300)
    np.savez(tmp_path / "train.npz", images=np.zeros((3, 8, 8)), labels=np.zeros(3, dtype=int))
    refused("must be uint8", tmp_path)
    np.savez(tmp_path / "train.npz", images=np.array([None, "x"], dtype=object), labels=np.zeros(2, dtype=int))
    refused("allow_pickle=False", tmp_path)
    (tmp_path / "train.npz").write_bytes(b"no archive")
    refused("must be an .npz file", tmp_path)
    assert_refused(run("pretrain", "--recipe", "stdlib-mp"), "pretrain", "recipe must be one of")
    assert_refused(run("pretrain", "--recipe", "mnist-cp"), "pretrain", "out must name the folder")


def test_a_run_of_another_command_is_not_continued(text: Path, gpt2: Path, tmp_path: Path, run: Command) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"config": {}, "resources": {"threads": 1}}')
    ended = run(*language_words(text, gpt2, tmp_path / "run", "--resume"))
    assert_refused(ended, "pretrain", "must be one of mxd pretrain")


def test_a_loss_that_is_not_finite_stops_the_run_without_a_snapshot(
    text: Path, gpt2: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_number(*arguments: object) -> Tensor:
        return torch.tensor(float("nan"))

    monkeypatch.setattr(loop, "_backward", no_number)
    ended: Ended = run(*language_words(text, gpt2, tmp_path / "run"))
    assert ended.status == 3
    assert "one was NaN or infinite by step 5" in ended.err
    assert not (tmp_path / "run" / "snapshots").exists()


def test_what_a_step_draws_depends_on_seed_step_and_purpose_and_any_seed_will_do() -> None:
    drawn = {
        tuple(torch.rand(4, generator=torch.Generator().manual_seed(_seed_of(seed, step, stream))).tolist())
        for seed in (0, 1, 2, 20261121, 2**40)
        for step in (0, 1, 2)
        for stream in ("batch", "model")
    }
    assert len(drawn) == 5 * 3 * 2


def test_a_recipes_fraction_is_not_used_for_another_kind() -> None:
    paper = find_recipe("paper-gpt2-cp")
    with pytest.raises(ValueError, match=r"kind must be cp with recipe paper-gpt2-cp, whose rank-fraction, 0\.725"):
        make_plan(replace(paper, mlp=replace(paper.mlp, kind="tr")))


def test_a_place_where_no_run_can_be_made_is_refused_before_anything_is_read(tmp_path: Path, run: Command) -> None:
    (tmp_path / ".gitkeep").touch()
    words = language_words(tmp_path / "no-text", tmp_path / "no-tokenizer", tmp_path)
    assert_refused(run(*words), "pretrain", "is not empty and holds no run.json", "name another --out")
    assert_refused(run(*words, "--resume"), "pretrain", "is not empty and holds no run.json", "name another --out")


def test_of_two_that_begin_at_once_one_makes_the_run(text: Path, gpt2: Path, tmp_path: Path, run: Command) -> None:
    with locked(tmp_path / "run"):
        ended = run(*language_words(text, gpt2, tmp_path / "run"))
    assert (ended.status, ended.err.splitlines()[-1].partition(": ")[2][:22]) == (2, "another process is tra")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
