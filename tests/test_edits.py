"""Edits of codes, against a naive restatement on dense codes in float64."""

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.edits import Ablate, Add, Clamp, CodeEditor, Edit, Operation, Scale, Set, Span, edit_code, edits_of, with_edits
from mxd.layers import SparseCode
from tests.test_conformance import EXAMPLES, build

NUM_LATENTS = 9
amounts = st.floats(-4, 4, allow_nan=False, width=32)
operations = st.one_of(
    amounts.map(lambda amount: {"name": "set", "amount": amount}),
    amounts.map(lambda amount: {"name": "add", "amount": amount}),
    amounts.map(lambda factor: {"name": "scale", "factor": factor}),
    st.tuples(amounts, amounts).map(lambda bounds: {"name": "clamp", "low": min(bounds), "high": max(bounds)}),
    amounts.map(lambda high: {"name": "clamp", "low": None, "high": high}),
    st.just({"name": "ablate"}),
)
places = st.one_of(
    st.none(),
    st.lists(st.integers(0, 8), min_size=1, max_size=3),
    st.integers(0, 5).map(lambda start: {"start": start, "stop": None}),
    st.integers(0, 5).map(lambda start: {"start": start, "stop": start + 2}),
)
# Described and made in the test: beartype draws from `random`, which hypothesis forbids while it draws.
descriptions = st.lists(
    st.fixed_dictionaries(
        {
            "latents": st.lists(st.integers(0, NUM_LATENTS - 1), min_size=1, max_size=4, unique=True),
            "operation": operations,
            "positions": places,
        }
    ),
    max_size=4,
)
rows = st.lists(
    st.tuples(
        st.lists(st.integers(0, NUM_LATENTS - 1), min_size=3, max_size=3, unique=True),
        st.lists(st.floats(0.125, 3, width=32), min_size=3, max_size=3),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


def code_of(drawn: list[tuple[list[int], list[float], bool]]) -> SparseCode:
    """Return rows of three slots, some of them not in use and naming a latent that another slot holds too."""
    values = torch.tensor([row[1] for row in drawn], dtype=torch.float64)
    indices = torch.tensor([row[0] for row in drawn])
    unused = torch.tensor([row[2] for row in drawn])
    indices[unused, 2] = indices[unused, 0]
    values[unused, 2] = 0
    return SparseCode(values, indices)


def naive(dense: Tensor, edits: Sequence[Edit], positions: Tensor) -> Tensor:
    """Return the vector of all latents, edited one entry at a time."""
    dense = dense.clone()
    for edit in edits:
        for row, position in enumerate(positions.tolist()):
            if isinstance(edit.positions, Span):
                start, stop = edit.positions.start, edit.positions.stop
                inside = position >= start and (stop is None or position < stop)
            else:
                inside = edit.positions is None or position in edit.positions
            for latent in edit.latents if inside else ():
                dense[row, latent] = changed(float(dense[row, latent]), edit.operation)
    return dense


def changed(value: float, operation: Operation) -> float:
    match operation:
        case Set(amount=amount):
            return amount
        case Add(amount=amount):
            return value + amount
        case Scale(factor=factor):
            return value * factor
        case Clamp(low=low, high=high):
            return min(max(value, -torch.inf if low is None else low), torch.inf if high is None else high)
        case Ablate():
            return 0.0


@settings(max_examples=150, deadline=None)
@given(drawn=rows, descriptions=descriptions, first=st.integers(-1, 6))
def test_an_edited_code_is_the_edited_vector(
    drawn: list[tuple[list[int], list[float], bool]], descriptions: list[object], first: int
) -> None:
    code, edits = code_of(drawn), [Edit.from_json(description) for description in descriptions]
    positions = torch.arange(first, first + len(code.values))
    edited = edit_code(code, edits, NUM_LATENTS, positions)
    expected = naive(code.dense(NUM_LATENTS), edits, positions)
    torch.testing.assert_close(edited.dense(NUM_LATENTS), expected, rtol=1e-12, atol=1e-12)
    woken = {latent for edit in edits if edit.wakes for latent in edit.latents}
    assert edited.values.shape[-1] == 3 + len(woken)
    for values, indices in zip(edited.values, edited.indices, strict=True):
        used = indices[values != 0].tolist()
        assert len(used) == len(set(used))


def test_where_no_edit_applies_the_slots_stay_as_they_are() -> None:
    code = SparseCode(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([[7, 3], [7, 3]]))
    edited = edit_code(code, [Edit(latents=(3,), operation=Add(amount=1.0), positions=(0,))], 8, torch.tensor([0, 1]))
    assert edited.values.tolist() == [[2, 0, 2], [2, 1, 0]]
    assert edited.indices.tolist() == [[7, 3, 3], [7, 3, 3]]


def test_ablating_every_latent_of_a_large_code_leaves_its_width() -> None:
    code = SparseCode(torch.ones(5, 4), torch.arange(20).reshape(5, 4) * 4999)
    edited = CodeEditor([Edit(latents=tuple(range(100_000)), operation=Ablate())], 100_000)(code)
    assert edited.values.shape == (5, 4)
    assert not edited.values.any()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if build(name).config.num_latents > 6])
def test_an_edited_layer_predicts_base_and_edited_values_times_atoms(name: str) -> None:
    layer = build(name)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    layer = layer.double().eval().requires_grad_(False)
    x = torch.randn(2, 3, layer.config.d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edits = (
        Edit(latents=(0, 4), operation=Add(amount=2.0)),
        Edit(latents=(4, 5), operation=Scale(factor=-3.0)),
        Edit(latents=(6,), operation=Set(amount=0.5)),
    )
    edited = with_edits(layer, edits)
    prediction, code = edited(x)
    everything = torch.arange(layer.config.num_latents).expand(2, 3, -1)
    dense = naive(layer.encode(x).dense(layer.config.num_latents).flatten(0, 1), edits, torch.zeros(6)).view(2, 3, -1)
    expected = layer.base(x) + (dense[..., None] * layer.atoms(x, everything)).sum(-2)
    torch.testing.assert_close(prediction, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(code.dense(layer.config.num_latents), dense, rtol=1e-12, atol=1e-12)
    assert edits_of(edited) == edits
    assert edits_of(layer) == ()
    assert not torch.allclose(layer(x).prediction, prediction)
    assert torch.equal(with_edits(edited, ())(x).prediction, layer(x).prediction)


def test_gradients_pass_through_an_edit() -> None:
    values = torch.tensor([[0.5, 0.25]], dtype=torch.float64, requires_grad=True)
    edits = [Edit(latents=(1, 3), operation=Add(amount=1.0)), Edit(latents=(0,), operation=Scale(factor=2.0))]

    def dense(values: Tensor) -> Tensor:
        return edit_code(SparseCode(values, torch.tensor([[0, 1]])), edits, 4).dense(4)

    assert torch.autograd.gradcheck(dense, (values,))


@given(descriptions=descriptions)
def test_an_edit_survives_json(descriptions: list[object]) -> None:
    edits = [Edit.from_json(description) for description in descriptions]
    assert [json.loads(json.dumps(edit.to_json())) for edit in edits] == descriptions


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        {},
        {"latents": [1], "operation": {"name": "burn"}, "positions": None},
        {"latents": [1], "operation": {"name": "add"}, "positions": None},
        {"latents": [1], "operation": {"name": "add", "amount": "2"}, "positions": None},
        {"latents": [1.5], "operation": {"name": "ablate"}, "positions": None},
        {"latents": [True], "operation": {"name": "ablate"}, "positions": None},
        {"latents": [1], "operation": {"name": "ablate"}, "positions": {"from": 1}},
        {"latents": [1], "operation": {"name": "ablate"}, "positions": None, "more": 1},
        {"latents": [1], "operation": {"name": "add", "amount": float("nan")}, "positions": None},
    ],
)
def test_what_is_no_edit_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        Edit.from_json(value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Edit(latents=(), operation=Ablate()), "must name latents"),
        (lambda: Edit(latents=(1, 1), operation=Ablate()), "each once"),
        (lambda: Edit(latents=(-1,), operation=Ablate()), "from 0 on"),
        (lambda: Edit(latents=(1,), operation=Ablate(), positions=()), "positions must be at least one"),
        (lambda: Span(start=3, stop=3), "start < stop"),
        (lambda: Clamp(), "must have a bound"),
        (lambda: Clamp(low=2.0, high=1.0), "low at most high"),
        (lambda: Set(amount=float("inf")), "finite"),
        (lambda: CodeEditor([Edit(latents=(8,), operation=Ablate())], 8), r"must lie in \[0, 7\]; got 8"),
        (
            lambda: edit_code(
                SparseCode(torch.ones(2), torch.arange(2)), [Edit(latents=(1,), operation=Ablate(), positions=(1,))], 8
            ),
            "needs the position of each row",
        ),
        (
            lambda: with_edits(build("mxd"), [Edit(latents=(1,), operation=Ablate(), positions=(1,))]),
            "must be for all positions",
        ),
    ],
)
def test_bad_edits_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
