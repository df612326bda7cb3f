import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn

from mxd.checkpoint import load_checkpoint, load_layer, save_edits
from mxd.data.activations import ActivationBatch, ActivationStream
from mxd.edits import Edit, Set
from mxd.kernels.backends import backend
from mxd.layers import MixtureOfDecodersConfig, SparseLayerOutput
from mxd.layers.sizing import transcoder_budget
from mxd.models import mlp_pairs
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import read_configuration
from mxd.training import decompose as decomposing
from mxd.training.config import TrainConfig
from mxd.training.decompose import activation_stream, decompose, make_plan
from mxd.training.grid import learning_rate
from mxd.training.optimizer import Schedule
from mxd.training.student import Student, StudentConfig
from mxd.training.train import TrainingFault, train
from tests.test_optimizer import CONFIGS, D, every_kind, layer_of
from tests.tiny_model import D_HIDDEN, D_MODEL

KINDS = tuple(CONFIGS)


@pytest.fixture
def config(llama: Path, text: Path) -> TrainConfig:
    return TrainConfig(
        model=str(llama),
        text=(str(text),),
        layer=(0, 1),
        tokens=50 * 64,
        kind=KINDS,
        k=(4,),
        num_latents=24,
        batch_tokens=64,
        context=32,
        buffer_tokens=512,
        warmup_tokens=0,
        lr=1e-2,
        dead_tokens=256,
        threads=1,
        device="cpu",
    )


def run_of(config: TrainConfig, out: Path) -> Path:
    decompose(make_plan(config), out)
    return out


def weights(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("layers/*/*/model.safetensors")}


def students_of(run: Path, metric: str, line: int) -> dict[str, float]:
    students = cast("dict[str, dict[str, float]]", read_metrics(run / "metrics.jsonl")[line]["students"])
    return {name: values[metric] for name, values in students.items()}


def test_every_layer_kind_k_and_seed_is_trained_on_one_stream_and_learns(config: TrainConfig, tmp_path: Path) -> None:
    kinds = ("mxd", "topk-sae")
    run = run_of(replace(config, tokens=40 * 64, kind=kinds, k=(2, 4), seeds=2), tmp_path / "run")
    ids = {f"{layer}/{kind}-k{k}-seed{s}" for layer in (0, 1) for kind in kinds for k in (2, 4) for s in (0, 1)}
    assert {path.removeprefix("layers/").removesuffix("/model.safetensors") for path in weights(run)} == ids
    first, last = students_of(run, "loss", 0), students_of(run, "loss", -1)
    assert first.keys() == last.keys() == ids
    assert all(last[name] < 0.9 * first[name] for name in ids)
    checkpoint = load_checkpoint(run / "layers/1/mxd-k2-seed1")
    assert (checkpoint.provenance.layer, checkpoint.provenance.seed) == (1, 1)
    assert checkpoint.provenance.tokens_trained == 40 * 64
    assert len(set(weights(run).values())) == len(ids)


def test_a_student_depends_on_no_sibling_and_the_same_seed_gives_the_same_bytes(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, tokens=20 * 64)
    together = weights(run_of(config, tmp_path / "together"))
    assert weights(run_of(config, tmp_path / "again")) == together
    alone = weights(run_of(replace(config, layer=(1,), kind=("mxd",)), tmp_path / "alone"))
    assert alone.items() <= together.items()
    assert weights(run_of(replace(config, seed=1), tmp_path / "other"))["layers/1/mxd-k4/model.safetensors"] not in (
        together.values()
    )


def inputs_of(network: nn.Module) -> list[Tensor]:
    """What the network is given at each call, filled in as it runs."""
    seen: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Tensor]) -> None:
        seen.append(arguments[0])

    network.register_forward_pre_hook(note)
    return seen


@every_kind
def test_a_topk_sae_reads_the_target_and_every_other_kind_the_input(kind: str) -> None:
    student = Student("s", 0, layer_of(kind), StudentConfig(lr=1e-3))
    seen = inputs_of(student.network)
    x, target = torch.randn(8, D), torch.randn(8, D)
    student.step(0, x, target, torch.ones(8, dtype=torch.bool), lr_factor=1.0, autocast=None)
    assert torch.equal(seen[0], target if kind == "topk-sae" else x)


class Recorded:
    """A student's loss that keeps what every step showed."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor, SparseLayerOutput]] = []

    def __call__(self, output: SparseLayerOutput, target: Tensor) -> Tensor:
        loss = (output.prediction - target).square().mean()
        kept = SparseLayerOutput(output.prediction.detach(), output.code)
        self.steps.append((loss.detach(), target, kept))
        return loss


def test_weights_that_are_not_finite_are_a_fault_although_every_loss_was_finite(
    config: TrainConfig, tmp_path: Path
) -> None:
    def loss(output: SparseLayerOutput, target: Tensor) -> Tensor:
        value = (output.prediction - target).square().mean()
        losses.append(float(value.detach()))
        # The root's gradient at zero is infinite, and its product with zero is not a number.
        return value + (output.prediction * 0).sum().square().sqrt() if len(losses) == 5 else value

    for snapshot_every in (0.0, 600.0):
        losses: list[float] = []
        plan = make_plan(replace(config, layer=(0,), kind=("mxd",)))
        student = Student("s", 0, plan.students[0].build(), StudentConfig(lr=1e-2), loss=loss)
        run = tmp_path / str(snapshot_every)
        run.mkdir()
        stream, schedule = activation_stream(plan), Schedule(steps=5, warmup_steps=0)
        stream.num_batches = 5
        with pytest.raises(TrainingFault, match=r"0/s must have.* a weight or its gradient was .* at step 5\."):
            train([student], stream, run, batch_tokens=64, schedule=schedule, snapshot_every=snapshot_every)
        assert torch.isfinite(torch.tensor(losses)).all()
        kept = [tensor for path in run.glob("snapshots/*/*.safetensors") for tensor in load_file(path).values()]
        assert bool(kept) == (snapshot_every == 0)
        assert all(torch.isfinite(tensor).all() for tensor in kept)


class Sink:
    """Keeps the steps that it is given."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self.steps: list[object] = []
        self.is_closed = False

    def log(self, record: Mapping[str, object]) -> None:
        self.steps.append(record["step"])

    def close(self) -> None:
        self.is_closed = True


def test_sinks_are_opened_with_the_first_step_that_they_will_get(config: TrainConfig, tmp_path: Path) -> None:
    sinks: list[Sink] = []

    def opener(first_step: int) -> Sink:
        sinks.append(Sink(first_step))
        return sinks[-1]

    config = replace(config, layer=(0,), kind=("mxd",))
    decompose(make_plan(config), tmp_path / "run", snapshot_every=0.0, sinks=[opener])
    (tmp_path / "run/finished.json").unlink()
    shutil.rmtree(tmp_path / "run/snapshots/0000000050")
    for _ in range(2):
        decompose(make_plan(config), tmp_path / "run", resume=True, sinks=[opener])
    assert [(sink.first_step, sink.steps, sink.is_closed) for sink in sinks] == [
        (1, [20, 40, 50], True),
        (50, [50], True),
    ]


def test_metrics_equal_a_direct_computation_over_the_content_of_the_same_batches(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(replace(config, layer=(0,)))
    recorded = [Recorded() for _ in plan.students]
    settings = StudentConfig(lr=1e-2, dead_tokens=256)
    students = [Student(p.id, 0, p.build(), settings, loss=r) for p, r in zip(plan.students, recorded, strict=True)]
    batches: list[ActivationBatch] = []
    plain = ActivationStream.__next__

    def noting(stream: ActivationStream) -> ActivationBatch:
        batches.append(plain(stream))
        return batches[-1]

    monkeypatch.setattr(ActivationStream, "__next__", noting)
    stream = activation_stream(plan)
    schedule = Schedule(steps=50, warmup_steps=0)
    train(students, stream, tmp_path, batch_tokens=64, schedule=schedule)
    content = torch.stack([batch.is_content for batch in batches])
    assert not content.all()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [20, 40, 50]
    assert [record["tokens"] for record in records] == [20 * 64, 40 * 64, 50 * 64]
    for student, steps in zip(students, (r.steps for r in recorded), strict=True):
        for start, stop, record in zip((0, 20, 40), (20, 40, 50), records, strict=True):
            found = cast("dict[str, dict[str, float]]", record["students"])[student.name]
            rows = content[start:stop].flatten()
            target = torch.cat([t for _, t, _ in steps[start:stop]])[rows].double()
            error = torch.cat([o.prediction for _, _, o in steps[start:stop]])[rows].double() - target
            active = torch.cat([(o.code.values > 0).sum(1) for _, _, o in steps[start:stop]])[rows]
            variance = (target - target.mean(0)).square().sum()
            assert found["fvu"] == pytest.approx(float(error.square().sum() / variance), rel=1e-4)
            assert found["l0"] == pytest.approx(float(active.double().mean()), rel=1e-5)
            assert found["l0"] <= student.network.config.k
            assert found["loss"] == pytest.approx(float(torch.stack([x for x, _, _ in steps[start:stop]]).mean()))
            fired = {int(i) for _, _, o in steps[stop - 4 : stop] for i in o.code.indices[o.code.values > 0]}
            assert found["dead_fraction"] == pytest.approx(1 - len(fired) / student.network.config.num_latents)


def mean_target(config: TrainConfig, layer: int) -> Tensor:
    plan = make_plan(config)
    contexts = plan.tokens.take(config.buffer_tokens // config.context)
    return mlp_pairs(cast(nn.Module, plan.language_model.model), contexts, [layer])[layer].target.mean((0, 1))


def first_students(
    config: TrainConfig, out: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Sequence[Student]], None]
) -> None:
    """Run `act` on a run's students in place of training, then save them."""

    def stop(students: Sequence[Student], *arguments: Any, **keywords: Any) -> None:
        act(students)

    monkeypatch.setattr(decomposing, "train", stop)
    run_of(config, out)
    monkeypatch.undo()


def test_output_bias_can_begin_at_the_mean_target_of_the_first_block(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bias in ("zeros", "mean"):
        wanted = mean_target(config, 1) if bias == "mean" else torch.zeros(D_MODEL)

        def check(students: Sequence[Student], wanted: Tensor = wanted) -> None:
            for student in students[len(students) // 2 :]:
                torch.testing.assert_close(student.network.get_parameter("b_dec").detach(), wanted)

        first_students(replace(config, output_bias=bias), tmp_path / bias, monkeypatch, check)


def test_a_shared_expert_begins_as_the_mlp_on_normalised_inputs_too(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, kind=("shared-transcoder",), normalize_input=True)
    sites = make_plan(config).sites
    x = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0))

    def check(students: Sequence[Student]) -> None:
        for student in students:
            assert student.normalization is not None
            base = student.network.base(student.normalization(x)).detach()
            torch.testing.assert_close(base, sites[student.layer](x).detach(), rtol=1e-3, atol=1e-3)

    first_students(config, tmp_path / "run", monkeypatch, check)


def test_a_run_on_normalised_inputs_saves_layers_for_plain_ones(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, kind=("mxd", "skip-transcoder"), layer=(1,), normalize_input=True)
    run = run_of(config, tmp_path / "run")
    plan = make_plan(config)
    pair = mlp_pairs(cast(nn.Module, plan.language_model.model), plan.tokens.take(50), [1])[1]
    target = pair.target[:, 1:].flatten(0, 1)
    for kind in config.kind:
        prediction = load_layer(run / f"layers/1/{kind}-k4")(pair.x[:, 1:].flatten(0, 1)).prediction.detach()
        fvu = (prediction - target).square().sum() / (target - target.mean(0)).square().sum()
        assert float(fvu) < 1.2 * students_of(run, "fvu", -1)[f"1/{kind}-k4"]


def test_normalised_inputs_are_refused_for_a_topk_sae_before_anything_is_written(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"cannot be folded into a topk-sae.*without it"):
        make_plan(replace(config, normalize_input=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_students_begin_from_another_runs_layers(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: bool
) -> None:
    config = replace(config, tokens=10 * 64, layer=(0,), kind=("mxd", "skip-transcoder"))
    first = run_of(config, tmp_path / "first")

    def nothing(students: Sequence[Student]) -> None:
        assert all((student.normalization is not None) == normalize for student in students)

    again = replace(config, init_from=str(first), normalize_input=normalize)
    first_students(again, tmp_path / "second", monkeypatch, nothing)
    for kind in config.kind:
        old, new = (load_layer(tmp_path / run / f"layers/0/{kind}-k4").state_dict() for run in ("first", "second"))
        for name in old:
            torch.testing.assert_close(new[name], old[name], rtol=1e-4 if normalize else 0, atol=1e-5 * normalize)


def broken_off(config: TrainConfig, out: Path, step: int, *, resume: bool = False) -> None:
    """Train until the stream breaks off behind this many steps."""
    plain, left = ActivationStream.__next__, step

    def fail(stream: ActivationStream) -> ActivationBatch:
        nonlocal left
        if left == 0:
            raise ConnectionError("the network is gone")
        left -= 1
        return plain(stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationStream, "__next__", fail)
        with pytest.raises((TrainingFault, ConnectionError)):
            decompose(make_plan(config), out, resume=resume)


def continued(config: TrainConfig, run: Path) -> dict[str, bytes]:
    decompose(make_plan(config, stored=read_configuration(run)), run, resume=True)
    return weights(run)


def test_a_run_with_a_snapshot_needs_nothing_of_what_it_began_from(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, tokens=10 * 64, layer=(0,), kind=("mxd", "skip-transcoder"))
    first = run_of(config, tmp_path / "first")
    config = replace(config, init_from=str(first), normalize_input=True)
    expected = weights(run_of(config, tmp_path / "whole"))
    broken_off(config, tmp_path / "run", 4)
    first.rename(tmp_path / "moved")

    def forbidden(*_: object) -> None:
        raise AssertionError("a resumed run begins from its snapshot")

    monkeypatch.setattr(decomposing, "start_from_activations", forbidden)
    assert continued(config, tmp_path / "run") == expected


def test_a_run_without_a_snapshot_begins_from_the_same_weights_or_not_at_all(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, tokens=10 * 64, layer=(0,), kind=("mxd",))
    first = run_of(config, tmp_path / "first")
    config = replace(config, init_from=str(first))
    expected = weights(run_of(config, tmp_path / "whole"))
    broken_off(config, tmp_path / "run", 0)
    known = json.loads((tmp_path / "run/run.json").read_text())["sources"]["0/mxd-k4"]
    assert known == json.loads((first / "layers/0/mxd-k4/config.json").read_text())["weights_sha256"]
    first.rename(tmp_path / "moved")
    run_of(replace(config, init_from=None, seed=1), first)
    with pytest.raises(ValueError, match=rf"must hold the weights that the run was started from, SHA-256 {known}"):
        continued(config, tmp_path / "run")
    shutil.rmtree(first)
    (tmp_path / "moved").rename(first)
    assert continued(config, tmp_path / "run") == expected


def test_a_plan_can_be_trained_twice(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, tokens=10 * 64, layer=(0,), kind=("mxd",))
    plan = make_plan(config)
    for name in ("first", "second"):
        decompose(plan, tmp_path / name)
    assert weights(tmp_path / "first") == weights(tmp_path / "second")


def test_edits_of_the_layers_that_a_run_begins_from_are_left_out_with_a_warning(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, tokens=10 * 64, layer=(0,), kind=("mxd", "transcoder"))
    first = run_of(config, tmp_path / "first")
    again = replace(config, init_from=str(first))
    expected = weights(run_of(again, tmp_path / "plain"))
    assert "edited" not in caplog.text
    save_edits(first / "layers/0/transcoder-k4", [Edit(latents=(3,), operation=Set(amount=100.0))])
    assert weights(run_of(again, tmp_path / "edited")) == expected
    assert caplog.text.count("layers/0/transcoder-k4 is edited; training begins from its weights, without") == 1
    assert not list((tmp_path / "edited").glob("layers/*/*/edits.json"))


def test_layers_that_cannot_be_begun_from_are_named_before_anything_is_written(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, tokens=64, layer=(0,), kind=("mxd",))
    first = str(run_of(config, tmp_path / "first"))
    with pytest.raises(ValueError, match=r"layers/0/mxd-k4 must have.*; num_experts differ.*same sizes"):
        make_plan(replace(config, init_from=first, num_latents=23))
    with pytest.raises(FileNotFoundError, match=r"none/layers/0/mxd-k4"):
        make_plan(replace(config, init_from=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"output-bias must be zeros with init-from"):
        replace(config, init_from=first, output_bias="mean")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_students_have_matched_parameters_and_the_sites_own_dense_encoder(
    config: TrainConfig, request: pytest.FixtureRequest, family: Any
) -> None:
    folder = request.getfixturevalue(family)
    plan = make_plan(replace(config, model=str(folder), num_latents=None, expansion=32))
    budget = transcoder_budget(D_MODEL, D_MODEL, 32)
    for student in plan.students:
        assert abs(student.parameters - budget) <= (2 * D_MODEL + 1) / 2
        assert student.parameters == sum(p.numel() for p in student.build().parameters())
    mxd = plan.students[0].network
    assert isinstance(mxd, MixtureOfDecodersConfig)
    assert mxd.d_hidden == D_HIDDEN[family]
    assert (mxd.encoder, mxd.activation) == (("glu", "silu") if family == "llama" else ("mlp", "gelu_tanh"))
    chosen = make_plan(replace(config, hidden=8, activation="relu", encoder="mlp")).students[0].network
    assert isinstance(chosen, MixtureOfDecodersConfig)
    assert (chosen.d_hidden, chosen.activation, chosen.encoder, chosen.num_experts) == (8, "relu", "mlp", 24)


def parsed(*arguments: str) -> TrainConfig:
    required = ["--model", "m", "--text", "t", "--layer", "0", "--tokens", "1", "--kind", "mxd", "transcoder"]
    return tyro.cli(TrainConfig, args=[*required, *arguments])


def test_learning_rates_are_one_number_or_one_a_kind_or_by_width(config: TrainConfig, tmp_path: Path) -> None:
    kinds = {"mxd": 1e-3, "transcoder": 2e-3, "skip-transcoder": 3e-3, "topk-sae": 4e-3}
    plan = make_plan(replace(config, lr=kinds))
    assert {student.kind: student.lr for student in plan.students} == kinds
    seen: dict[str, float] = {}
    for student in [decomposing._student(plan, planned) for planned in plan.students]:
        seen[student.network.kind] = student.config.lr
    assert seen == kinds
    for kind in KINDS:
        rates = [learning_rate(replace(config, lr="auto"), kind, width) for width in (64, 256, 1024)]
        assert rates == pytest.approx([rates[0], rates[0], rates[0] / 4])
    assert (parsed("--lr", "auto").lr, parsed("--lr", "0.01").lr) == ("auto", 0.01)
    assert parsed("--lr", "mxd", "1e-3", "transcoder", "2e-3").lr == {"mxd": 1e-3, "transcoder": 2e-3}
    with pytest.raises(ValueError, match="topk-sae have none"):
        replace(config, lr=dict.fromkeys(KINDS[:-1], 0.001))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("seed", -1), ("warmup_tokens", -1), ("clip", 0.0), ("lr", 0.0), ("lr", float("nan")), ("k", (0,))),
        *(("layer", ()), ("kind", ("mxd", "mxd")), ("k", (25,)), ("context", 1), ("aux_coefficient", -1.0)),
        *(("seed", 2**63), ("threads", 0), ("batch_tokens", 0), ("activation", "tanh"), ("kind", ("moe",))),
    ],
)
def test_impossible_settings_are_refused_by_name(config: TrainConfig, field: str, value: object) -> None:
    assert field in {known.name for known in fields(config)}
    with pytest.raises(ValueError, match=field.replace("_", "-")):
        replace(config, **{field: value})


def test_the_last_seed_that_pytorch_takes_is_taken(config: TrainConfig) -> None:
    last = replace(config, seed=2**63 - 3, seeds=3, layer=(0,), kind=("mxd",))
    assert [student.seed for student in make_plan(last).students][-1] == 2**63 - 1
    torch.Generator().manual_seed(2**63 - 1)
    with pytest.raises(ValueError, match=r"must lie below 2\*\*63; got 9223372036854775805 and 4 of them"):
        replace(last, seeds=4)


def test_run_json_says_what_was_trained_and_on_what(config: TrainConfig, tmp_path: Path) -> None:
    run = run_of(replace(config, tokens=100), tmp_path / "run")
    stored = json.loads((run / "run.json").read_text())
    assert stored["config"]["model"] == config.model
    assert stored["steps"] == 2
    assert len(stored["students"]) == 8
    assert stored["resources"] == {
        "device": "cpu",
        "precision": "float32",
        "model_precision": "float32",
        "kernels": backend(torch.device("cpu")),
        "threads": 1,
        "prefetch": False,
    }
