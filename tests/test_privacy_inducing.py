"""Pareto fine-tuning: its gradients, its choice of a model, its resuming, its refusals."""

import copy
import json
import math
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mxd.privacy import Examples, InduceConfig, ObjectiveConfig, induce_uncertainty
from mxd.privacy.examples import Prediction
from mxd.privacy.fitting import warmup_and_cosine
from mxd.privacy.gradients import dot, mean_gradient, project_onto_ball_, symmetric_surgery
from mxd.privacy.measures import measure_set
from mxd.privacy.tuning import Order, Sets, Tuning, lr_factor
from mxd.runs.faults import TrainingFault, TrainingInterrupted
from tests.privacy_examples import CLASSES, blobs, network, trained

CONFIG = InduceConfig(
    objective=ObjectiveConfig(theta=0.5, weight_decay=0.0),
    steps=60,
    optimizer="adam",
    lr=0.02,
    check_every=10,
    max_accuracy_drop=0.2,
)


def cross_entropies(found: Prediction) -> Tensor:
    return functional.cross_entropy(found.logits, found.labels, reduction="none")


@pytest.fixture(scope="module")
def sets() -> tuple[Examples, Examples]:
    whole = blobs(90, seed=1)
    return whole.take(slice(0, 6)), whole.take(slice(6, 90))


@pytest.fixture(scope="module")
def model(sets: tuple[Examples, Examples]) -> nn.Sequential:
    return trained(blobs(90, seed=1))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_accumulated_gradient_is_that_of_the_mean_over_all(size: int) -> None:
    examples, model = blobs(25, seed=2), network().double()
    assert isinstance(examples.inputs, Tensor)
    double = examples.with_inputs(examples.inputs.double())
    parameters = list(model.parameters())
    found = mean_gradient(model, parameters, double, cross_entropies, size)
    assert isinstance(double.inputs, Tensor)
    loss = functional.cross_entropy(model(double.inputs), double.labels)
    for accumulated, expected in zip(found.gradient, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(accumulated, expected)
    assert found.loss == pytest.approx(loss.item())


vectors = st.lists(st.floats(-10, 10), min_size=3, max_size=3)


@given(first=vectors, second=vectors)
@settings(max_examples=60, deadline=None)
def test_surgery_is_the_formula_and_harms_neither_loss(first: list[float], second: list[float]) -> None:
    u, c = (torch.tensor(values, dtype=torch.float64) for values in (first, second))
    found = symmetric_surgery([u[:1], u[1:]], [c[:1], c[1:]])
    after_u, after_c = torch.cat(found.uniform), torch.cat(found.accurate)
    product = float(u @ c)
    if product >= 0 or min(float(u @ u), float(c @ c)) < sys.float_info.min:
        assert torch.equal(after_u, u)
        assert torch.equal(after_c, c)
        return
    torch.testing.assert_close(after_u, u - product / (c @ c) * c)
    torch.testing.assert_close(after_c, c - product / (u @ u) * u)
    step = after_u + after_c
    tolerance = 1e-9 * (1 + float(u @ u + c @ c))
    assert float(step @ u) >= -tolerance
    assert float(step @ c) >= -tolerance
    swapped = symmetric_surgery([c], [u])
    torch.testing.assert_close(swapped.uniform[0], after_c)


def test_projection_shrinks_all_weights_by_one_factor_and_only_if_they_are_too_long() -> None:
    weights = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    project_onto_ball_(weights, 10.0)
    assert dot(weights, weights) == 25.0
    project_onto_ball_(weights, 2.5)
    torch.testing.assert_close(weights, [torch.tensor([1.5, 0.0]), torch.tensor([[2.0]])])


def test_a_full_batch_step_is_algorithm_one_written_out(sets: tuple[Examples, Examples], model: nn.Sequential) -> None:
    config = InduceConfig(
        objective=ObjectiveConfig(theta=0.3, weight_decay=0.01, uniformity="kl-u-p"), lr=0.1, momentum=0.0, steps=1
    )
    protected, retained = sets
    tuning = Tuning(model, Sets(protected, retained, retained), config)
    tuning.step()
    ours = copy.deepcopy(model)
    parameters = list(ours.parameters())
    assert isinstance(protected.inputs, Tensor)
    assert isinstance(retained.inputs, Tensor)
    log_p = functional.log_softmax(ours(protected.inputs), -1)
    uniform = 0.3 * (-math.log(CLASSES) - log_p.mean(-1)).mean()
    accurate = 0.7 * functional.cross_entropy(ours(retained.inputs), retained.labels)
    g_u, g_c = (torch.autograd.grad(loss, parameters) for loss in (uniform, accurate))
    product = dot(g_u, g_c)
    shares = (product / dot(g_c, g_c), product / dot(g_u, g_u)) if product < 0 else (0.0, 0.0)
    for parameter, u, c, moved in zip(parameters, g_u, g_c, tuning.model.parameters(), strict=True):
        step = (u - shares[0] * c) + (c - shares[1] * u) + 0.01 * parameter
        torch.testing.assert_close(moved, parameter - 0.1 * step, rtol=1e-4, atol=1e-6)


def test_protected_examples_become_uncertain_and_the_model_given_stays(
    sets: tuple[Examples, Examples], model: nn.Sequential
) -> None:
    protected, retained = sets
    before = copy.deepcopy(model.state_dict())
    found = induce_uncertainty(model, protected, retained, replace(CONFIG, steps=150))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert measure_set(found.model, protected).confidence_distance < 0.6 * found.checks[0].confidence_distance
    assert found.chosen.validation_accuracy >= found.least_accuracy
    feasible = [check for check in found.checks if check.validation_accuracy >= found.least_accuracy]
    assert found.chosen.confidence_distance == min(check.confidence_distance for check in feasible)
    assert measure_set(found.model, protected).confidence_distance == pytest.approx(found.chosen.confidence_distance)


def test_labels_of_protected_examples_change_nothing(sets: tuple[Examples, Examples], model: nn.Sequential) -> None:
    protected, retained = sets
    config = replace(CONFIG, steps=5)
    turned = protected.with_labels((protected.labels + 1) % CLASSES)
    first, second = (induce_uncertainty(model, one, retained, config).model for one in (protected, turned))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_micro_batches_change_rounding_alone(sets: tuple[Examples, Examples], model: nn.Sequential) -> None:
    few, many = (induce_uncertainty(model, *sets, replace(CONFIG, steps=3, micro_batch=size)) for size in (5, 256))
    for one, other in zip(few.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_model_whose_accuracy_cannot_be_kept_stays_as_it_was(
    sets: tuple[Examples, Examples], model: nn.Sequential, caplog: pytest.LogCaptureFixture
) -> None:
    harsh = replace(CONFIG, objective=ObjectiveConfig(theta=0.999, weight_decay=0.0), lr=1.0, max_accuracy_drop=0.0)
    found = induce_uncertainty(model, *sets, replace(harsh, surgery=False))
    if found.chosen.step == 0:
        assert "the model is as it was" in caplog.text
        for one, other in zip(found.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)
    assert found.chosen.validation_accuracy >= found.checks[0].validation_accuracy


def test_early_stopping_and_target(sets: tuple[Examples, Examples], model: nn.Sequential) -> None:
    patient = induce_uncertainty(model, *sets, replace(CONFIG, steps=500, patience=2, lr=1e-9))
    assert patient.checks[-1].step == 20
    quick = induce_uncertainty(model, *sets, replace(CONFIG, steps=500, target_distance=0.5, check_every=1))
    assert quick.chosen.step == quick.checks[-1].step < 500
    assert quick.chosen.confidence_distance <= 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(
    sets: tuple[Examples, Examples],
    model: nn.Sequential,
    optimizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = cast(Any, optimizer)
    config = replace(
        CONFIG, steps=12, optimizer=chosen, retained_batch=16, protected_batch=4, check_every=3, schedule="cosine"
    )
    whole = induce_uncertainty(model, *sets, config, run=tmp_path / "whole")
    plain = Tuning.step

    def stopping(tuning: Tuning) -> dict[str, float]:
        if tuning.done == 7:
            raise TrainingInterrupted("stopped")
        return plain(tuning)

    monkeypatch.setattr(Tuning, "step", stopping)
    with pytest.raises(TrainingInterrupted):
        induce_uncertainty(model, *sets, config, run=tmp_path / "cut", snapshot_every=0.0)
    monkeypatch.setattr(Tuning, "step", plain)
    with pytest.raises(ValueError, match="exists; pass --resume"):
        induce_uncertainty(model, *sets, config, run=tmp_path / "cut")
    with pytest.raises(ValueError, match=r"config\.lr"):
        induce_uncertainty(model, *sets, replace(config, lr=0.5), run=tmp_path / "cut", resume=True)
    resumed = induce_uncertainty(model, *sets, config, run=tmp_path / "cut", resume=True)
    assert resumed.checks == whole.checks
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert [record["objective"] for record in logs[0]] == [record["objective"] for record in logs[1]]
    again = induce_uncertainty(model, *sets, config, run=tmp_path / "cut", resume=True)
    assert again.chosen == whole.chosen


def test_a_run_that_was_begun_before_commands_were_named_goes_on_and_no_other_does(
    sets: tuple[Examples, Examples], model: nn.Sequential, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=2, check_every=2, min_accuracy=0.0)
    found = induce_uncertainty(model, *sets, config, run=tmp_path)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored.pop("command") == "induce"
    (tmp_path / "finished.json").unlink()
    (tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="must be a run of mxd privacy induce to be continued"):
        induce_uncertainty(model, *sets, config, run=tmp_path, resume=True)
    (tmp_path / "run.json").write_text(json.dumps({"task": "induce uncertainty", **stored}))
    assert induce_uncertainty(model, *sets, config, run=tmp_path, resume=True).checks == found.checks


def test_steps_are_repeatable_on_the_models_device(
    sets: tuple[Examples, Examples], model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    @contextmanager
    def noted(device: object) -> Generator[None, None, None]:
        asked.append((device, "opened"))
        yield
        asked.append((device, "closed"))

    plain = Tuning.step

    def step(tuning: Tuning) -> dict[str, float]:
        asked.append("step")
        return plain(tuning)

    monkeypatch.setattr("mxd.privacy.inducing.deterministic", noted)
    monkeypatch.setattr(Tuning, "step", step)
    induce_uncertainty(model, *sets, replace(CONFIG, steps=1, min_accuracy=0.0))
    cpu = torch.device("cpu")
    assert asked == [(cpu, "opened"), "step", (cpu, "closed")]


def test_a_pass_takes_every_example_once_in_nearly_equal_parts() -> None:
    order = Order(10, seed=3)
    first = [order.rows(step, 4) for step in range(3)]
    assert sorted(torch.cat(first).tolist()) == list(range(10))
    assert sorted(map(len, first)) == [3, 3, 4]
    again = Order(10, seed=3)
    assert torch.equal(again.rows(4, 4), order.rows(4, 4))
    assert not torch.equal(torch.cat([order.rows(step, 4) for step in range(3, 6)]), torch.cat(first))


def test_schedules() -> None:
    constant, step, cosine = (InduceConfig(steps=100, schedule=name) for name in ("constant", "step", "cosine"))
    assert [lr_factor(constant, at) for at in (0, 99)] == [1.0, 1.0]
    assert [lr_factor(step, at) for at in (29, 30)] == [1.0, 0.2]
    assert [lr_factor(cosine, at) for at in (0, 9, 55)] == pytest.approx([0.1, 1.0, 0.5])
    assert warmup_and_cosine(100, 100) == pytest.approx(0.0)


def test_dropout_and_batch_statistics_are_as_in_use(sets: tuple[Examples, Examples]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).train()
    found = induce_uncertainty(noisy, *sets, replace(CONFIG, steps=4, check_every=2, min_accuracy=0.0))
    norm = found.model[1]  # pyright: ignore[reportIndexIssue]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert torch.equal(norm.running_mean, torch.zeros(8))
    again = induce_uncertainty(noisy, *sets, replace(CONFIG, steps=4, check_every=2, min_accuracy=0.0))
    assert again.checks == found.checks


def shifted(examples: Examples, value: float) -> Examples:
    assert isinstance(examples.inputs, Tensor)
    inputs = examples.inputs.clone()
    inputs[1, 2] = value
    return examples.with_inputs(inputs)


def test_wrong_requests_are_refused_in_a_sentence_and_leave_the_weights(
    sets: tuple[Examples, Examples], model: nn.Sequential
) -> None:
    protected, retained = sets
    assert isinstance(protected.inputs, Tensor)
    before = copy.deepcopy(model.state_dict())
    narrow = protected.with_inputs(protected.inputs[:, :3])
    overlapping = retained.with_inputs(torch.cat([protected.inputs[:2], cast(Tensor, retained.inputs)[2:]]))
    wrong_labels = retained.with_labels(torch.full((len(retained),), CLASSES))
    cases: list[tuple[nn.Module, Examples, Examples, str]] = [
        (model, protected.take(slice(0, 0)), retained, "the protected set must hold at least one"),
        (model, protected, retained.take(slice(0, 0)), "the retained set must hold at least one"),
        (model, protected, overlapping, "no row in common; 2 retained rows are also protected"),
        (model, shifted(protected, math.nan), retained, "1 of its 6 examples hold NaN or infinity"),
        (model, narrow, retained, r"must have one shape; got \(3,\) and \(4,\)"),
        (model, protected, wrong_labels, r"must lie in \[0, 2\], the model's classes; got 3 to 3"),
        (nn.Sequential(model, nn.Softmax(-1)), protected, retained, "it returns probabilities"),
        (nn.Sequential(model, nn.Linear(CLASSES, 1)), protected, retained, "at least two classes; got 1"),
        (copy.deepcopy(model).requires_grad_(False), protected, retained, "none does; call requires_grad_"),
        (model, protected, retained.take(slice(0, 2)), "leave 0 for validation"),
        (nn.Sequential(model, nn.Unflatten(1, (1, 3))), protected, retained, "must return logits of shape"),
    ]
    for wrong_model, wrong_protected, wrong_retained, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            induce_uncertainty(wrong_model, wrong_protected, wrong_retained, CONFIG)
        assert "\n" not in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_validation_set_must_not_hold_protected_rows(sets: tuple[Examples, Examples], model: nn.Sequential) -> None:
    protected, retained = sets
    with pytest.raises(ValueError, match="protected and validation sets must have no row in common; 6"):
        induce_uncertainty(model, protected, retained, CONFIG, validation=protected)


def test_a_loss_that_is_not_finite_stops_the_run(sets: tuple[Examples, Examples], model: nn.Sequential) -> None:
    with pytest.raises(TrainingFault, match="the objective must stay finite"):
        induce_uncertainty(model, *sets, replace(CONFIG, optimizer="sgd", lr=1e30, check_every=60))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"lr": 0.0}, "lr must be a number above 0; got 0.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1.0"),
        ({"validation_fraction": 1.0}, "validation-fraction must lie between 0 and 1"),
        ({"min_accuracy": 87.0}, r"min-accuracy must lie in \[0, 1\]; got 87.0"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InduceConfig(**wrong)
