import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.losses import dead_latent_loss, distillation_loss
from mxd.metrics import ErrorSums, error_sums, kl_divergence, loss_recovered, next_token_losses
from tests.tensors import normal


def test_distillation_loss_is_the_mean_of_squared_errors_over_lengths() -> None:
    prediction, target = normal(5, 3).requires_grad_(), normal(5, 3, seed=1)
    total, gradient = 0.0, torch.zeros(5, 3, dtype=torch.float64)
    for b in range(5):
        length = math.sqrt(sum(float(t) ** 2 for t in target[b]))
        for o in range(3):
            error = prediction[b, o].item() - target[b, o].item()
            total += error**2 / length
            gradient[b, o] = 2 * error / length / 15
    loss = distillation_loss(prediction, target)
    assert loss.item() == pytest.approx(total / 15, rel=1e-12)
    (found,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_distillation_loss_does_not_see_leading_dimensions() -> None:
    prediction, target = normal(6, 3), normal(6, 3, seed=1)
    expected = distillation_loss(prediction, target)
    assert distillation_loss(prediction.view(2, 3, 3), target.view(2, 3, 3)).item() == pytest.approx(expected.item())
    assert distillation_loss(prediction[0], target[0]).isfinite()


def test_distillation_loss_of_a_target_of_zeros_is_zero_where_the_prediction_is() -> None:
    prediction, target = torch.zeros(2, 3, requires_grad=True), torch.stack([torch.zeros(3), torch.ones(3)])
    loss = distillation_loss(prediction, target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.item() == pytest.approx(1 / 3**0.5 / 2)
    assert not gradient[0].any()
    assert gradient.isfinite().all()


def test_distillation_loss_grows_with_the_units_of_the_output() -> None:
    prediction, target = normal(5, 3), normal(5, 3, seed=1)
    doubled = distillation_loss(2 * prediction, 2 * target).item()
    assert doubled == pytest.approx(2 * distillation_loss(prediction, target).item())


def test_dead_latent_loss_is_the_share_of_the_residual_that_is_left() -> None:
    residual, prediction = normal(5, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    left = sum((residual[b, o] - prediction[b, o]).item() ** 2 for b in range(5) for o in range(3))
    whole = sum(residual[b, o].item() ** 2 for b in range(5) for o in range(3))
    loss = dead_latent_loss(residual, prediction)
    assert loss.item() == pytest.approx(left / whole, rel=1e-12)
    loss.backward()
    assert residual.grad is None
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad, -2 * (residual - prediction).detach() / whole)
    assert dead_latent_loss(residual, residual).item() == 0
    assert dead_latent_loss(residual, torch.zeros_like(residual)).item() == pytest.approx(1)
    assert dead_latent_loss(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0


def test_error_sums_are_the_definitions() -> None:
    prediction, target = normal(50, 4).requires_grad_(), normal(50, 4, seed=1) + 3
    sums = error_sums(prediction, target)
    squared = (prediction.detach() - target).square().sum()
    assert sums.tokens == 50
    assert sums.nmse == pytest.approx(float(squared / target.square().sum()), rel=1e-12)
    assert sums.fvu == pytest.approx(float(squared / (target - target.mean(0)).square().sum()), rel=1e-12)
    assert error_sums(target.mean(0).expand(50, 4), target).fvu == pytest.approx(1)
    assert error_sums(torch.zeros(50, 4), target).nmse == 1
    assert error_sums(target, target).fvu == 0


@pytest.mark.parametrize("tokens", [10, 1000, 4099, 100_003])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_targets_that_do_not_vary_have_no_fraction_of_variance(tokens: int, scale: float) -> None:
    for seed in range(3):
        target = (scale * normal(16, seed=seed)).expand(tokens, 16)
        whole = error_sums(target + 1e-3 * scale, target)
        parts = [error_sums(part + 1e-3 * scale, part) for part in target.split(999)]
        for sums in (whole, sum(parts[1:], start=parts[0])):
            assert math.isnan(sums.fvu)
            assert sums.variation == 0


def test_little_variation_about_a_large_mean_is_variation() -> None:
    noise = normal(4000, 8)
    noise -= noise.mean(0)
    for mean in (0.0, 1e2, 1e4):
        sums = error_sums(noise + mean + 1, noise + mean)
        assert sums.fvu == pytest.approx(4000 * 8 / float(noise.square().sum()), rel=1e-4)


@settings(deadline=None, max_examples=30)
@given(first=st.integers(0, 20), rest=st.integers(1, 20), width=st.integers(1, 5))
def test_error_sums_add_up(first: int, rest: int, width: int) -> None:
    prediction, target = normal(first + rest, width).float(), normal(first + rest, width, seed=1).float()
    whole = error_sums(prediction, target)
    parts = error_sums(prediction[:first], target[:first]) + error_sums(prediction[first:], target[first:])
    assert isinstance(parts, ErrorSums)
    assert parts.tokens == whole.tokens
    assert (parts.error, parts.square) == pytest.approx((whole.error, whole.square), rel=1e-12)
    torch.testing.assert_close(parts.target, whole.target, rtol=1e-12, atol=1e-12)
    assert parts.target.dtype == torch.float64


def test_error_sums_of_float32_batches_do_not_stall() -> None:
    target = torch.full((1000, 1), 1e-4)
    large = error_sums(torch.zeros(1, 1), torch.full((1, 1), 1e4))
    total = large + error_sums(torch.zeros_like(target), target)
    assert total.square - large.square == pytest.approx(1e-5, rel=1e-2)


def test_next_token_losses_are_those_of_the_following_tokens() -> None:
    logits, tokens = normal(2, 5, 7), torch.randint(7, (2, 5))
    losses = next_token_losses(logits, tokens)
    assert losses.shape == (2, 4)
    for b in range(2):
        for s in range(4):
            expected = -logits[b, s].log_softmax(-1)[tokens[b, s + 1]]
            assert losses[b, s].item() == pytest.approx(float(expected), rel=1e-5)


def test_kl_divergence_is_torchs_and_never_negative() -> None:
    reference, logits = normal(2, 5, 7), normal(2, 5, 7, seed=1)
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(reference, logits).double(), expected, rtol=1e-5, atol=1e-6)
    nearby = reference + 1e-7 * logits
    for other in (logits, nearby, reference, reference + 3):
        assert (kl_divergence(reference, other) >= 0).all()
    assert kl_divergence(reference, reference + 3).max() < 1e-6


def test_loss_recovered_is_one_without_damage_and_zero_for_ablation() -> None:
    assert loss_recovered(ce=3.0, ce_base=3.0, ce_zero=5.0) == 1
    assert loss_recovered(ce=5.0, ce_base=3.0, ce_zero=5.0) == 0
    assert loss_recovered(ce=3.5, ce_base=3.0, ce_zero=5.0) == 0.75
    assert loss_recovered(ce=6.0, ce_base=3.0, ce_zero=5.0) == -0.5
