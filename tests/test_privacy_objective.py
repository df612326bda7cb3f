"""The privacy objective: what each term is, that batches do not change it, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.privacy.objective import (
    ObjectiveConfig,
    Uniformity,
    accuracy_loss,
    accuracy_losses,
    half_squared_norm,
    objective,
    uniformity_loss,
    uniformity_losses,
)

KINDS: tuple[Uniformity, ...] = ("kl-u-p", "kl-p-u", "square")


def naive_uniformity(row: list[float], kind: Uniformity) -> float:
    peak = max(row)
    total = sum(math.exp(z - peak) for z in row)
    p = [math.exp(z - peak) / total for z in row]
    u = 1 / len(row)
    if kind == "kl-u-p":
        return sum(u * math.log(u / c) for c in p)
    if kind == "kl-p-u":
        return sum(c * math.log(c / u) for c in p)
    return 0.5 * sum((c - u) ** 2 for c in p)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_each_distance_is_its_definition_written_out(kind: Uniformity, rows: list[list[float]]) -> None:
    found = uniformity_losses(torch.tensor(rows, dtype=torch.float64), kind)
    expected = torch.tensor([naive_uniformity(row, kind) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (found >= -1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_are_at_distance_zero_with_no_gradient(kind: Uniformity) -> None:
    logits = torch.full((2, 7), 3.0, dtype=torch.float64, requires_grad=True)
    loss = uniformity_loss(logits, kind)
    loss.backward()
    assert logits.grad is not None
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: Uniformity) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return uniformity_loss(z, kind)

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_unequal_batches_give_the_mean_over_all(kind: Uniformity) -> None:
    logits = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(11) % 4
    parts = [slice(0, 1), slice(1, 8), slice(8, 11)]
    uniform = torch.stack([uniformity_losses(logits[part], kind).sum() for part in parts]).sum() / 11
    accurate = torch.stack([accuracy_losses(logits[part], labels[part]).sum() for part in parts]).sum() / 11
    torch.testing.assert_close(uniform, uniformity_loss(logits, kind))
    torch.testing.assert_close(accurate, accuracy_loss(logits, labels))


def test_the_objective_counts_weight_decay_once() -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    protected, retained = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (2, 5))
    labels = torch.tensor([0, 1, 2, 3, 0])

    def value(weight_decay: float) -> torch.Tensor:
        config = ObjectiveConfig(theta=0.3, weight_decay=weight_decay, uniformity="kl-u-p")
        return objective(
            config,
            protected_logits=protected @ w,
            retained_logits=retained @ w,
            retained_labels=labels,
            parameters=[w],
        )

    bare = 0.3 * uniformity_loss(protected @ w, "kl-u-p") + 0.7 * accuracy_loss(retained @ w, labels)
    torch.testing.assert_close(value(0.0), bare)
    (with_decay,) = torch.autograd.grad(value(0.25), w)
    (without,) = torch.autograd.grad(value(0.0), w)
    torch.testing.assert_close(with_decay - without, 0.25 * w.detach())


def test_half_precision_logits_are_raised() -> None:
    logits = torch.randn(2, 3).bfloat16()
    assert uniformity_losses(logits, "kl-p-u").dtype == torch.float32
    assert accuracy_losses(logits, torch.tensor([0, 1])).dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"theta": 0.0}, "theta must lie strictly between 0 and 1; got 0.0"),
        ({"theta": 1.0}, "theta must lie strictly between 0 and 1; got 1.0"),
        ({"theta": float("nan")}, "theta must lie strictly between 0 and 1; got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be a number of at least 0; got -1.0"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ObjectiveConfig(theta=wrong.get("theta", 0.5), weight_decay=wrong.get("weight_decay", 0.0))


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one parameter must be trained"):
        half_squared_norm([])
