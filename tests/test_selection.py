"""Selections of active latents, and training with them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.checkpoint import load_layer, save_layer
from mxd.kernels import routing
from mxd.layers import (
    L1,
    LAYERS,
    BatchTopK,
    LayerRequest,
    LinearTransformMixture,
    Selection,
    SelectionName,
    SparseLayer,
    TopK,
    Transcoder,
    TranscoderConfig,
)
from mxd.layers.selection import MOST_LATENTS, THRESHOLD_RATE, make_selection
from mxd.losses import distillation_loss, l1_penalty
from mxd.training.student import Student, StudentConfig, drawn_k, random_ks

every_kind = pytest.mark.parametrize("kind", LAYERS)
every_selection = pytest.mark.parametrize("selection", ["topk", "batch-topk", "l1"])


def layer_of(kind: str, selection: SelectionName = "topk", *, k: int = 3, num_latents: int = 12) -> SparseLayer:
    """A small layer whose weights are all random."""
    request = LayerRequest(
        d_in=5, d_out=5, d_hidden=7, activation="gelu", rank=3, num_latents=num_latents, k=k, selection=selection
    )
    construct = cast(Callable[[object], SparseLayer], LAYERS[kind].layer)
    layer = construct(LAYERS[kind].configure(request))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def selected(selection: Selection, scores: Tensor, k: int) -> Tensor:
    """Return the dense code that a selection makes of these scores, after a look at the code's form."""
    code = selection(scores, torch.eye(scores.shape[1], dtype=scores.dtype), scores.new_zeros(scores.shape[1]), k)
    assert code.values.shape == code.indices.shape
    active = (code.values > 0).sum(-1)
    if not isinstance(selection, TopK):
        assert code.values.shape[-1] == max(1, int(active.max())), "a code is padded to its fullest row"
    for values, indices in zip(code.values, code.indices, strict=True):
        used = indices[values > 0]
        assert len(used.unique()) == len(used)
    assert bool((code.values >= 0).all())
    return code.dense(scores.shape[1])


@st.composite
def score_tables(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Draw a few rows of scores, no two alike and none zero, and a k."""
    rows, n = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    order = torch.randperm(rows * n, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**20))))
    shift = draw(st.sampled_from([0, rows * n // 2, rows * n]))
    return (order.double() - shift + 0.5).view(rows, n), draw(st.integers(1, n))


@settings(deadline=None)
@given(score_tables())
def test_each_selection_is_its_naive_restatement(table: tuple[Tensor, int]) -> None:
    scores, k = table
    rows = cast("list[list[float]]", scores.tolist())
    everything = sorted((score for row in rows for score in row if score > 0), reverse=True)

    def restated(keep: Callable[[float, list[float]], bool]) -> Tensor:
        kept = [[score if score > 0 and keep(score, row) else 0.0 for score in row] for row in rows]
        return torch.tensor(kept, dtype=torch.float64)

    assert torch.equal(selected(TopK(), scores, k), restated(lambda score, row: score in sorted(row)[-k:]))
    assert torch.equal(selected(L1(), scores, k), restated(lambda score, row: True))
    batch = BatchTopK().double()
    largest = everything[: k * len(rows)]
    assert torch.equal(selected(batch, scores, k), restated(lambda score, row: score in largest))
    assert float(batch.threshold) == (min(largest) if largest else 0.0)
    threshold = float(batch.threshold)
    assert torch.equal(selected(batch.eval(), scores, k), restated(lambda score, row: score > threshold))
    assert float(batch.threshold) == threshold, "nothing is learnt in evaluation mode"


def test_the_threshold_is_the_running_mean_of_the_smallest_scores_that_batches_kept() -> None:
    selection = BatchTopK().double()
    expected = 0.0
    for smallest in (3.0, 5.0, 1.0, 0.5):
        scores = torch.tensor([[smallest, 9.0, -1.0], [0.25, 8.0, 7.0]], dtype=torch.float64)
        selected(selection, scores, 2)
        expected = smallest if expected == 0 else expected + THRESHOLD_RATE * (smallest - expected)
        assert float(selection.threshold) == pytest.approx(expected, rel=1e-12)
    selected(selection, -torch.ones(2, 3, dtype=torch.float64), 2)
    assert float(selection.threshold) == pytest.approx(expected, rel=1e-12), "a batch that keeps nothing tells nothing"


@pytest.mark.parametrize("name", ["batch-topk", "l1"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_gradients_are_those_of_a_dense_restatement(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 4), (4, 9), (9,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    selection = make_selection(name).double()
    factors = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    scores = x @ weight + bias
    mask = copy.deepcopy(selection).kept(scores.detach(), 2)
    wanted = torch.autograd.grad((scores.relu() * mask * factors).sum(), leaves)
    code = selection(x, weight, bias, 2)
    found = torch.autograd.grad((code.values * factors.gather(1, code.indices)).sum(), leaves)
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@every_kind
@every_selection
def test_a_code_does_not_depend_on_what_stands_beside_its_input(
    kind: str, selection: SelectionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(kind, selection).double(), torch.randn(10, 5, dtype=torch.float64)
    # On others than those below: a score that is the threshold itself is on either side of it by rounding.
    layer.train()(torch.randn(10, 5, dtype=torch.float64))
    layer.eval()
    together = layer.encode(x).dense(12)
    assert together.any()
    for row in range(len(x)):
        alone = layer.encode(x[row]).dense(12)
        torch.testing.assert_close(alone, together[row], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.encode(x.view(2, 5, 5)).dense(12).view(10, 12), together)
    monkeypatch.setattr(routing, "BLOCK_BYTES", {"cpu": 3 * 12 * 8})
    torch.testing.assert_close(layer.encode(x).dense(12), together, msg="blocks of rows change nothing")
    assert layer(x[:0]).prediction.shape == (0, 5)


@every_kind
@every_selection
def test_saving_and_loading_is_the_identity_with_what_was_learnt(
    kind: str, selection: SelectionName, tmp_path: Path
) -> None:
    layer = layer_of(kind, selection)
    layer.train()(torch.randn(20, 5))
    save_layer(layer, tmp_path)
    loaded, state = load_layer(tmp_path), layer.state_dict()
    assert loaded.config == layer.config
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert ("selection.threshold" in state) == (selection == "batch-topk")
    assert not loaded.training
    x = torch.randn(6, 5)
    torch.testing.assert_close(loaded(x).prediction, layer.eval()(x).prediction)


def test_a_layer_saved_before_there_were_selections_is_a_topk_layer(tmp_path: Path) -> None:
    layer = layer_of("transcoder")
    save_layer(layer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer"]["selection"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_layer(tmp_path).config == layer.config


def test_what_a_selection_does_not_serve_is_refused_in_a_sentence() -> None:
    TranscoderConfig(d_in=2, d_out=2, num_latents=MOST_LATENTS + 1, k=2)
    for selection in ("batch-topk", "l1"):
        with pytest.raises(ValueError, match=rf"at most 8,192 with selection {selection}.* got 8,193.*selection topk"):
            TranscoderConfig(d_in=2, d_out=2, num_latents=MOST_LATENTS + 1, k=2, selection=selection)
    with pytest.raises(ValueError, match="selection must be one of topk, batch-topk, l1; got 'topp'"):
        make_selection("topp")


@pytest.mark.parametrize("kind", ["mxd", "low-rank", "transcoder", "skip-transcoder", "topk-sae", "molt"])
def test_the_length_of_a_latent_is_that_of_its_row_or_the_norm_of_its_map(kind: str) -> None:
    layer = layer_of(kind).double()
    table = getattr(layer, "W_expert", getattr(layer, "W_dec", None))
    wanted = torch.linalg.vector_norm(cast(Tensor, table), dim=1) if kind != "molt" else torch.zeros(0)
    if isinstance(layer, LinearTransformMixture):
        wanted = torch.stack([torch.linalg.matrix_norm(layer.expert_weight(n)) for n in range(12)])
    torch.testing.assert_close(layer.latent_lengths(), wanted)
    with torch.no_grad():
        layer.get_parameter("W_dec").zero_()
    gradients = torch.autograd.grad(layer.latent_lengths().sum(), tuple(layer.parameters()), allow_unused=True)
    assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)


def step_of(layer: SparseLayer, config: StudentConfig, x: Tensor, target: Tensor) -> Student:
    student = Student("s", 0, layer, config)
    student.step(0, x, target, torch.ones(len(x), dtype=torch.bool), lr_factor=1.0, autocast=None)
    return student


def test_a_student_with_l1_pays_for_its_values_times_their_lengths() -> None:
    layer, x, target = layer_of("transcoder", "l1"), torch.randn(16, 5), torch.randn(16, 5)
    with torch.no_grad():
        output = layer(x)
        dense, lengths = output.code.dense(12), layer.get_parameter("W_dec").norm(dim=1)
    expected = distillation_loss(output.prediction, target) + 0.1 * (dense * lengths).sum() / 16
    assert float(l1_penalty(output.code.values, lengths[output.code.indices])) == pytest.approx(
        float((dense @ lengths).mean()), rel=1e-5
    )
    whole = step_of(copy.deepcopy(layer), StudentConfig(lr=1e-2, l1_coefficient=0.1), x, target)
    parts = StudentConfig(lr=1e-2, l1_coefficient=0.1, micro_batch_tokens=5)
    in_parts = step_of(copy.deepcopy(layer), parts, x, target)
    for student in (whole, in_parts):
        assert student.read_metrics(16)["loss"] == pytest.approx(float(expected), rel=1e-5)
    for name, tensor in whole.network.state_dict().items():
        torch.testing.assert_close(in_parts.network.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_random_k_is_uniform_and_a_pure_function_of_seed_and_step() -> None:
    assert list(random_ks(16)) == list(range(8, 25))
    assert list(random_ks(5)) == [3, 4, 5, 6, 7]
    assert list(random_ks(1)) == [1]
    drawn = [drawn_k(16, 0, step) for step in range(3400)]
    counts = torch.bincount(torch.tensor(drawn), minlength=25)
    assert int(counts[:8].sum()) == 0
    # 200 are expected of each; a deviation of 70 has less than 1 in 10,000 for all of them.
    assert int(counts[8:].min()) > 130
    assert int(counts[8:].max()) < 270
    assert drawn == [drawn_k(16, 0, step) for step in range(3400)]
    assert drawn != [drawn_k(16, 1, step) for step in range(3400)]


def test_a_student_with_random_k_activates_as_many_latents_as_the_step_draws() -> None:
    widths: list[int] = []

    class Watched(Transcoder):
        def decode(self, x: Tensor, code: object) -> Tensor:
            widths.append(code.values.shape[1])  # pyright: ignore
            return super().decode(x, code)  # pyright: ignore

    layer = Watched(TranscoderConfig(d_in=5, d_out=5, num_latents=12, k=6))
    student = Student("s", 0, layer, StudentConfig(lr=1e-3, random_k_seed=3))
    for step in range(12):
        x, target = torch.randn(4, 5), torch.randn(4, 5)
        student.step(step, x, target, torch.ones(4, dtype=torch.bool), lr_factor=1.0, autocast=None)
    assert widths == [drawn_k(6, 3, step) for step in range(12)]
    assert student.network.config.k == 6
