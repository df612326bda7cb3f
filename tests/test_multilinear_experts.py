"""Use, specialisation and editing of experts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mxd.multilinear import CPMixture, CPMixtureConfig, MultilinearMLP, MultilinearMLPConfig
from mxd.multilinear.editing import ExpertEdit, edited_gate
from mxd.multilinear.specialisation import counterfactual_specialisation, expert_load, polysemanticity
from mxd.pretraining.responses import gate_coefficients, token_use

CONFIG = CPMixtureConfig(d_in=4, d_out=6, num_experts=(5,), rank=3)


def layer_of(config: CPMixtureConfig = CONFIG) -> CPMixture:
    layer = CPMixture(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer.eval()


def inputs(count: int = 40) -> Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_load_counts_strong_coefficients() -> None:
    coefficients = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.49, 0.3, 0.21]])
    assert expert_load(coefficients).tolist() == [2, 1, 0]
    assert expert_load(coefficients, 0.2).tolist() == [3, 2, 1]


def test_polysemanticity_is_0_for_one_class_and_largest_for_all_alike() -> None:
    drops = torch.tensor([[0.0, 0.3, 0.0, -0.2], [0.1, 0.1, 0.1, 0.1], [0.3, 0.1, 0.0, 0.0], [0.0, -0.1, 0.0, 0.0]])
    found = polysemanticity(drops)
    assert found[0] == 0
    assert found[1].item() == pytest.approx(math.sqrt(1 - 1 / 4))
    assert found[2].item() == pytest.approx(math.hypot(0.25, 0.25))
    assert math.isnan(found[3])


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.floats(0.1, 10), st.integers(0, 1000))
def test_polysemanticity_has_its_bounds_and_no_scale(classes: int, scale: float, seed: int) -> None:
    drops = torch.randn(6, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = polysemanticity(drops)
    torch.testing.assert_close(polysemanticity(scale * drops), found, equal_nan=True)
    valid = found[~found.isnan()]
    assert ((valid >= 0) & (valid <= math.sqrt(1 - 1 / classes) + 1e-9)).all()
    assert torch.equal(found.isnan(), (drops <= 0).all(1))


def test_removing_an_expert_is_measured_as_by_hand() -> None:
    layer, x = layer_of(), inputs()
    (coefficients,) = layer.gate(x)
    labels = torch.arange(len(x)) % 6
    labels[12:] = layer(x).argmax(1)[12:]
    seen: list[int] = []

    def predict(rows: Tensor, given_coefficients: Tensor) -> Tensor:
        seen.append(len(rows))
        return layer(rows, [given_coefficients])

    found = counterfactual_specialisation(predict, x, coefficients, labels, 6)
    truth = labels[:, None]

    def judge(logits: Tensor) -> tuple[Tensor, Tensor]:
        return (logits.argmax(1) == labels).double(), logits.softmax(1).gather(1, truth)[:, 0]

    before = judge(layer(x))
    for n in range(5):
        without = coefficients.clone()
        without[:, n] = 0
        after = judge(layer(x, [without]))
        for c in range(6):
            own = labels == c
            assert own.any()
            for measure, old, new in zip(found, before, after, strict=True):
                assert measure.drops[n, c].item() == pytest.approx((old - new)[own].mean().item(), abs=1e-12)
    for measure in found:
        assert measure.drops.abs().sum() > 0
        assert torch.equal(measure.matters, (measure.drops > 0).any(1))
        assert measure.mean == pytest.approx(polysemanticity(measure.drops)[measure.matters].mean().item())
    # Inputs that do not use the expert are not computed anew.
    assert seen[1:] == [int((coefficients[:, n] > 0).sum()) for n in range(5)]


def test_an_edit_scales_one_coefficient_where_it_is_above_the_threshold() -> None:
    coefficients = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])

    def edited(**changes: float | bool) -> list[list[float]]:
        rows = ExpertEdit(expert=0, **changes).apply(coefficients)  # pyright: ignore[reportArgumentType]
        return [[round(value, 6) for value in row] for row in rows.tolist()]

    assert edited() == [[0, 0.4, 0], [0, 0.5, 0.3], [0, 0, 0]]
    assert edited(factor=0.5) == [[0.3, 0.4, 0], [0.1, 0.5, 0.3], [0.5, 0, 0]]
    assert edited(threshold=0.3) == [[0, 0.4, 0], [0.2, 0.5, 0.3], [0, 0, 0]]
    assert edited(renormalize=True) == [[0, 1, 0], [0, 0.625, 0.375], [1, 0, 0]]
    assert edited(renormalize=True, factor=0.5) == [[0.3, 0.7, 0], [0.1, 0.5625, 0.3375], [1, 0, 0]]
    among = torch.tensor([False, True, True])
    assert ExpertEdit(expert=1).apply(coefficients, among)[:, 1].tolist() == pytest.approx([0.4, 0, 0])
    assert coefficients[0].tolist() == pytest.approx([0.6, 0.4, 0.0])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 4), st.floats(0, 1), st.floats(0, 0.9), st.integers(0, 100))
def test_renormalised_edits_keep_the_sum(expert: int, factor: float, threshold: float, seed: int) -> None:
    coefficients = torch.rand(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    coefficients /= coefficients.sum(1, keepdim=True)
    edit = ExpertEdit(expert=expert, factor=factor, threshold=threshold, renormalize=True)
    found = edit.apply(coefficients)
    torch.testing.assert_close(found.sum(1), torch.ones(9, dtype=torch.float64))
    untouched = coefficients[:, expert] <= threshold
    torch.testing.assert_close(found[untouched], coefficients[untouched])
    changed = ~untouched
    torch.testing.assert_close(found[changed, expert], factor * coefficients[changed, expert])


def test_an_edited_gate_changes_layer_and_block_and_then_is_as_before() -> None:
    layer, x = layer_of(), inputs()
    before, edit = layer(x), ExpertEdit(expert=2)
    (coefficients,) = layer.gate(x)
    with edited_gate(layer, edit):
        assert torch.equal(layer(x), layer.experts(x, [edit.apply(coefficients)]))
        assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)
    among = torch.arange(len(x)) < 7
    with edited_gate(layer, edit, among):
        assert torch.equal(layer(x)[7:], before[7:])
    block = MultilinearMLP(
        MultilinearMLPConfig(kind="cp", d_in=4, d_hidden=7, d_out=6, num_experts=(5, 2), ranks=(3,))
    ).double()
    with torch.no_grad(), edited_gate(block, ExpertEdit(expert=1, level=1, factor=0.0)):
        first, second = block.gate(x)
        assert not second[:, 1].any()
        assert torch.allclose(first.sum(1), torch.ones(len(x), dtype=torch.float64))
        hidden = nn.functional.gelu(block.first(x, (first, second)))
        torch.testing.assert_close(block(x), block.second(hidden, (first, second)))


def test_edits_that_do_not_fit_are_refused() -> None:
    layer, x = layer_of(), inputs()
    with (
        pytest.raises(ValueError, match=r"expert must lie in \[0, 4\]; got 5"),
        edited_gate(layer, ExpertEdit(expert=5)),
    ):
        layer(x)
    with (
        pytest.raises(ValueError, match=r"level must lie in \[0, 0\]; got 1"),
        edited_gate(layer, ExpertEdit(expert=0, level=1)),
    ):
        pass
    with pytest.raises(ValueError, match="Linear has none"), edited_gate(nn.Linear(2, 2), ExpertEdit(expert=0)):
        pass
    with pytest.raises(ValueError, match="threshold must be at least 0"):
        ExpertEdit(expert=0, threshold=-1.0)


def test_the_coefficients_of_every_gate_are_what_it_gave() -> None:
    config = MultilinearMLPConfig(kind="cp", d_in=4, d_hidden=7, d_out=4, num_experts=(5, 2), ranks=(3,))
    model = nn.Sequential(MultilinearMLP(config), MultilinearMLP(config)).double().train()
    x = inputs(6).view(3, 2, 4)
    found = gate_coefficients(model, x.split(2), level=1)
    assert list(found) == ["0", "1"]
    first = model[0]
    assert isinstance(first, MultilinearMLP)
    torch.testing.assert_close(found["0"], first.gate(x)[1].float())
    assert found["1"].shape == (3, 2, 2)
    assert model.training
    assert not first.gate._forward_hooks
    with pytest.raises(ValueError, match="it has none"):
        gate_coefficients(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="level must be one that every gate has; got 2"):
        gate_coefficients(model, [], level=2)


def test_tokens_of_an_expert_are_counted() -> None:
    coefficients = torch.tensor([[[0.6, 0.4], [0.5, 0.5], [0.0, 1.0]], [[0.1, 0.9], [0.0, 1.0], [1.0, 0.0]]])
    ids = torch.tensor([[7, 8, 9], [9, 8, 7]])
    second, first = token_use(coefficients, ids, most=2)
    assert (second.expert, second.tokens, second.most_frequent) == (1, 4, ((8, 2), (9, 2)))
    assert (first.expert, first.tokens, first.most_frequent) == (0, 3, ((7, 2), (8, 1)))
