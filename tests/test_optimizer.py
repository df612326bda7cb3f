from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mxd.layers import LAYERS, SparseLayer, SparseLayerOutput, TopKAutoencoderConfig, Transcoder, TranscoderConfig
from mxd.layers.initialization import uniform_by_column
from mxd.layers.mixture_of_decoders import MixtureOfDecodersConfig
from mxd.layers.shared_transcoder import SharedTranscoderConfig
from mxd.layers.skip_transcoder import SkipTranscoderConfig
from mxd.runs.snapshots import load_newest_snapshot, save_snapshot
from mxd.training.optimizer import (
    Schedule,
    adamw,
    optimizer_tensors,
    project_gradients_,
    renormalize_,
    restore_optimizer_,
)
from mxd.training.student import Student, StudentConfig

D, N, K, TOKENS = 6, 20, 3, 32
CONFIGS = {
    "mxd": MixtureOfDecodersConfig(d_in=D, d_hidden=8, d_out=D, num_experts=N, k=K),
    "transcoder": TranscoderConfig(d_in=D, d_out=D, num_latents=N, k=K),
    "skip-transcoder": SkipTranscoderConfig(d_in=D, d_out=D, num_latents=N, k=K),
    "topk-sae": TopKAutoencoderConfig(d_in=D, num_latents=N, k=K),
    "shared-transcoder": SharedTranscoderConfig(d_in=D, d_hidden=8, d_out=D, num_latents=N, k=K),
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)
CONTENT = torch.ones(TOKENS, dtype=torch.bool)


def layer_of(kind: str, seed: int = 0) -> SparseLayer:
    generator = torch.Generator().manual_seed(seed)
    return LAYERS[kind].layer(CONFIGS[kind], generator)  # pyright: ignore[reportCallIssue, reportArgumentType]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(seed))
    return x, x.roll(1, dims=1) * x.sigmoid() + 0.3


def take_steps(student: Student, steps: range, autocast: torch.dtype | None = None, factor: float = 1.0) -> None:
    for step in steps:
        student.step(step, *batch(step), CONTENT, lr_factor=factor, autocast=autocast)


def test_projection_leaves_only_the_part_of_a_gradient_that_turns_the_row() -> None:
    table = nn.Parameter(torch.nn.functional.normalize(torch.randn(5, 4), dim=1))
    untouched = nn.Parameter(torch.randn(5, 4))
    table.grad = torch.randn(5, 4)
    expected = table.grad - (table.grad * table.detach()).sum(1, keepdim=True) * table.detach()
    project_gradients_([table, untouched])
    torch.testing.assert_close(table.grad, expected)
    torch.testing.assert_close((table.grad * table.detach()).sum(1), torch.zeros(5), atol=1e-6, rtol=0)
    assert untouched.grad is None


def test_renormalisation_divides_each_row_by_its_length_and_leaves_rows_of_zeros() -> None:
    table = nn.Parameter(torch.randn(5, 4) * 10)
    table.data[2] = 0
    expected = torch.stack([row if row.norm() == 0 else row / row.norm() for row in table.detach()])
    renormalize_([table])
    torch.testing.assert_close(table.detach(), expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(steps=4, warmup_steps=0), [1, 1, 1, 1]),
        (Schedule(steps=4, warmup_steps=2), [1 / 2, 1, 1, 1]),
        (Schedule(steps=3, warmup_steps=6), [1 / 6, 2 / 6, 3 / 6]),
        (Schedule(steps=4, warmup_steps=0, shape="linear"), [1, 3 / 4, 2 / 4, 1 / 4]),
        (Schedule(steps=5, warmup_steps=2, shape="linear"), [1 / 2, 1, 1, 2 / 3, 1 / 3]),
        (Schedule(steps=3, warmup_steps=6, shape="linear"), [1 / 6, 2 / 6, 3 / 6]),
    ],
)
def test_a_schedule_warms_up_and_then_stays_or_falls(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule.factor(step) for step in range(schedule.steps)] == pytest.approx(expected)


@given(steps=st.integers(1, 50), warmup_steps=st.integers(0, 80), shape=st.sampled_from(["constant", "linear"]))
def test_a_schedule_rises_once_falls_once_and_never_stands_still(steps: int, warmup_steps: int, shape: Any) -> None:
    schedule = Schedule(steps=steps, warmup_steps=warmup_steps, shape=shape)
    factors = [schedule.factor(step) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors == sorted(factors[:top]) + sorted(factors[top:], reverse=True)


def column_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [uniform_by_column(7, 5, 1.0, generator), nn.Parameter(torch.randn(5, generator=generator))]


def drift(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()


def test_an_optimizer_goes_on_bit_for_bit_and_in_the_same_memory_layout(tmp_path: Path) -> None:
    parameters = column_parameters()
    optimizer = adamw(parameters, 1e-2, 0.1)
    drift(parameters, optimizer, range(3))
    save_snapshot(tmp_path, 3, optimizer_tensors(optimizer), {})
    snapshot = load_newest_snapshot(tmp_path)
    assert snapshot is not None

    resumed = [nn.Parameter(torch.empty_like(parameter).copy_(parameter.detach())) for parameter in parameters]
    continued = adamw(resumed, 1e-2, 0.1)
    restore_optimizer_(continued, dict(snapshot.tensors))
    assert not parameters[0].is_contiguous()
    for state in (optimizer.state, continued.state):
        assert all(
            moments["exp_avg"].is_contiguous() and moments["exp_avg_sq"].is_contiguous() for moments in state.values()
        )
    drift(parameters, optimizer, range(3, 6))
    drift(resumed, continued, range(3, 6))
    assert all(torch.equal(old, new) for old, new in zip(parameters, resumed, strict=True))
    before, after = optimizer_tensors(optimizer), optimizer_tensors(continued)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_in_memory_order_are_adamw_s_own() -> None:
    ours, plain = column_parameters(), column_parameters()
    optimizers = (adamw(ours, 1e-2, 0.1), torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.1))
    for parameters, optimizer in zip((ours, plain), optimizers, strict=True):
        drift(parameters, optimizer, range(4))
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def test_a_weight_without_a_gradient_stays() -> None:
    parameters = column_parameters()
    before, optimizer = parameters[0].detach().clone(), adamw(parameters, 1e-2, 0.1)
    drift(parameters, optimizer, range(1))
    after = parameters[0].detach().clone()
    parameters[0].grad, parameters[1].grad = None, torch.ones(5)
    optimizer.step()
    assert not torch.equal(before, after)
    assert torch.equal(parameters[0], after)


def test_an_optimizer_that_took_no_step_has_no_state_and_takes_none() -> None:
    optimizer = adamw(column_parameters(), 1e-2, 0.0)
    assert optimizer_tensors(optimizer) == {}
    restore_optimizer_(optimizer, {})
    assert optimizer_tensors(optimizer) == {}


@every_kind
def test_unit_length_tables_stay_so_after_every_step_and_two_kinds_have_none(kind: str) -> None:
    student = Student("s", 0, layer_of(kind), StudentConfig(lr=0.05))
    assert len(student.network.unit_length_tables()) == (kind not in ("skip-transcoder", "shared-transcoder"))
    for step in range(8):
        take_steps(student, range(step, step + 1))
        for table in student.network.unit_length_tables():
            torch.testing.assert_close(table.norm(dim=1), torch.ones(len(table)), atol=1e-6, rtol=0)
    if kind == "skip-transcoder":
        lengths = student.network.get_parameter("W_dec").norm(dim=1)
        assert lengths.max() > 1.5 * lengths.min()


def gradients_seen_by(optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    """The gradient's norm and the learning rate of each step, filled in as steps are taken."""
    seen: list[tuple[float, float]] = []

    def note(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append((float(torch.cat([g.flatten() for g in gradients]).norm()), optimizer.param_groups[0]["lr"]))

    optimizer.register_step_pre_hook(note)
    return seen


def test_clip_bounds_the_norm_of_the_whole_gradient_and_lr_follows_the_schedule() -> None:
    free = Student("s", 0, layer_of("transcoder"), StudentConfig(lr=0.01))
    clipped = Student("s", 0, layer_of("transcoder"), StudentConfig(lr=0.01, clip=1e-3))
    seen_free, seen_clipped = gradients_seen_by(free.optimizer), gradients_seen_by(clipped.optimizer)
    for student in (free, clipped):
        take_steps(student, range(2), factor=0.25)
    assert all(norm > 1e-2 for norm, _ in seen_free)
    assert [norm for norm, _ in seen_clipped] == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert [lr for _, lr in seen_clipped] == pytest.approx([0.0025, 0.0025])


@every_kind
def test_bfloat16_products_leave_weights_and_moments_in_float32(kind: str) -> None:
    predictions: dict[torch.dtype | None, Tensor] = {}
    for autocast in (None, torch.bfloat16):
        losses: list[float] = []

        def loss(output: SparseLayerOutput, target: Tensor, losses: list[float] = losses) -> Tensor:
            value = (output.prediction.float() - target).square().mean()
            losses.append(float(value.detach()))
            return value

        student = Student("s", 0, layer_of(kind), StudentConfig(lr=0.02), loss=loss)
        take_steps(student, range(40), autocast)
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        floating = [tensor for tensor in student.tensors().values() if tensor.is_floating_point()]
        assert {tensor.dtype for tensor in floating} == {torch.float32}
        predictions[autocast] = student.network(batch(0)[0]).prediction.detach()
    assert not torch.equal(predictions[None], predictions[torch.bfloat16])


@every_kind
@pytest.mark.parametrize("micro_batch_tokens", [1, 5, TOKENS, 10 * TOKENS])
def test_a_batch_in_parts_has_the_gradients_and_metrics_of_the_whole(kind: str, micro_batch_tokens: int) -> None:
    charge = LAYERS[kind].layer.shared_penalty or 0.0
    students = [
        Student("s", 0, layer_of(kind), StudentConfig(lr=0.01, micro_batch_tokens=tokens, shared_penalty=charge))
        for tokens in (None, micro_batch_tokens)
    ]
    seen = [gradients_seen_by(student.optimizer) for student in students]
    for student in students:
        take_steps(student, range(3))
    norms = [[norm for norm, _ in of_one] for of_one in seen]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    whole, parts = (student.read_metrics(3 * TOKENS) for student in students)
    assert whole == pytest.approx(parts, rel=1e-4)


def dying(aux_coefficient: float, aux_k: int = 4) -> Student:
    """A student whose latents from 5 on score far below the others, on every input."""
    layer = layer_of("transcoder")
    layer.get_parameter("b_enc").data[5:] = -8.0
    config = StudentConfig(lr=0.02, aux_coefficient=aux_coefficient, aux_k=aux_k, dead_tokens=3 * TOKENS)
    return Student("s", 0, layer, config)


def dead_fraction(student: Student, steps: int) -> float:
    return student.read_metrics(steps * TOKENS)["dead_fraction"]


def test_the_auxiliary_loss_begins_at_dead_tokens_and_reaches_only_dead_latents_encoders() -> None:
    plain, student = dying(0.0), dying(1 / 32)
    take_steps(plain, range(3))
    take_steps(student, range(3))
    assert torch.equal(student.network.get_parameter("W_enc"), plain.network.get_parameter("W_enc"))
    assert dead_fraction(student, 3) >= 15 / 20
    before = {name: parameter.detach().clone() for name, parameter in student.network.named_parameters()}
    take_steps(student, range(3, 4))
    W_enc, b_enc = student.network.get_parameter("W_enc"), student.network.get_parameter("b_enc")
    assert (W_enc != before["W_enc"])[:, 5:].any()
    assert (b_enc > before["b_enc"])[5:].any()
    assert not (plain.network.get_parameter("b_enc")[5:] > -8).any()


@pytest.mark.parametrize("aux_k", [4, 512])
def test_the_auxiliary_loss_revives_latents_whose_scores_are_all_negative(aux_k: int) -> None:
    plain, student = dying(0.0), dying(1 / 32, aux_k)
    take_steps(plain, range(150))
    take_steps(student, range(150))
    assert not (plain._last_fired[5:] > 0).any()
    assert (student._last_fired[5:] > 0).sum() >= 12
    assert dead_fraction(student, 150) < dead_fraction(plain, 150)


def test_latents_that_fire_are_not_dead() -> None:
    student = Student("s", 0, Transcoder(TranscoderConfig(d_in=D, d_out=D, num_latents=K, k=K)), StudentConfig(lr=1e-3))
    take_steps(student, range(4))
    assert dead_fraction(student, 4) == 0.0
