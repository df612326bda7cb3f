"""Measures, attacks and baselines of test-time privacy, against their definitions written out."""

import copy
import math
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mxd.privacy.attacks import (
    AttackConfig,
    attack,
    fgsm,
    gaussian_attack,
    last_linear,
    pgd,
    probe,
    relearn,
)
from mxd.privacy.baselines import (
    BaselineConfig,
    gaussian_uniform,
    label_private,
    points_in_ball,
    private_labels,
    random_labels_around,
    retrain,
)
from mxd.privacy.classifiers import PixelNormalization
from mxd.privacy.examples import Examples, Prediction, fitting_batch, join
from mxd.privacy.fitting import FitConfig, fit_classifier
from mxd.privacy.measures import (
    calibration_gaps,
    confidence_distances,
    measure_predictions,
    measure_privacy,
    measure_set,
    nearest_rows,
)
from mxd.privacy.pareto_front import FrontPoint, pareto_optimal
from mxd.privacy.tuning import InduceConfig, Sets, Tuning
from tests.privacy_examples import CLASSES, blobs, network, trained

FIT = FitConfig(epochs=2, batch=16, lr=0.02)


def prediction(logits: Tensor, labels: list[int]) -> Prediction:
    return Prediction(logits, torch.tensor(labels), torch.arange(len(labels)))


def test_measures_are_their_definitions_written_out() -> None:
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    labels = [row % 5 for row in range(40)]
    whole = prediction(logits, labels)
    found = measure_predictions(Prediction(*(part[rows] for part in whole)) for rows in (slice(0, 7), slice(7, 40)))
    p = [numpy.exp(row) / numpy.exp(row).sum() for row in logits.double().numpy()]
    right = [int(row.argmax()) == label for row, label in zip(p, labels, strict=True)]
    assert found.accuracy == pytest.approx(sum(right) / 40)
    assert found.confidence_distance == pytest.approx(sum(max(0.0, max(row) - 0.2) for row in p) / 40, rel=1e-5)
    assert found.largest_confidence_distance == pytest.approx(max(max(row) for row in p) - 0.2, rel=1e-5)
    assert found.cross_entropy == pytest.approx(
        -sum(math.log(row[label]) for row, label in zip(p, labels, strict=True)) / 40, rel=1e-5
    )
    brier = sum(sum((row[c] - (c == label)) ** 2 for c in range(5)) for row, label in zip(p, labels, strict=True))
    assert found.brier == pytest.approx(brier / 40, rel=1e-5)
    gap = 0.0
    for low in range(15):
        inside = [at for at, row in enumerate(p) if low / 15 < max(row) <= (low + 1) / 15]
        gap += abs(sum(right[at] for at in inside) - sum(max(p[at]) for at in inside)) / 40
    assert found.calibration_error == pytest.approx(gap, rel=1e-4)


def test_slices_of_a_batch_are_measured_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = blobs(40, seed=1)
    model = trained(whole)
    expected = asdict(measure_set(model, whole, 25))
    monkeypatch.setattr("mxd.privacy.measures.PROBABILITIES_AT_ONCE", 4 * CLASSES)
    assert asdict(measure_set(model, whole, 25)) == pytest.approx(expected, rel=1e-6)


class Continuing(nn.Module):
    """A language model of so many classes that notes how many texts it reads at a time."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.read: list[int] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.read.append(len(input_ids))
        return self.table(input_ids)


def test_fewer_texts_are_read_at_a_time_where_classes_are_a_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(30, (8, 10), generator=torch.Generator().manual_seed(0))
    texts = Examples(inputs={"input_ids": ids}, labels=ids, labels_of="next-token")
    model = Continuing(30)
    expected = measure_set(model, texts, 8)
    monkeypatch.setattr("mxd.privacy.examples.LOGITS_AT_ONCE", 3 * 10 * 30 + 5)
    assert fitting_batch(model, texts, 8) == 3
    assert fitting_batch(model, texts, 2) == 2
    assert fitting_batch(network(), blobs(8, seed=1), 8) == 8
    model.read.clear()
    assert asdict(measure_set(model, texts, 8)) == pytest.approx(asdict(expected), rel=1e-6)
    assert model.read == [1, 3, 3, 2]
    model.read.clear()
    tuning = Tuning(model, Sets(texts, texts, texts), InduceConfig(steps=1, check_every=1, min_accuracy=0.0))
    tuning.step()
    assert isinstance(tuning.model, Continuing)
    assert max(tuning.model.read) == 3
    monkeypatch.setattr("mxd.privacy.examples.LOGITS_AT_ONCE", 1)
    assert fitting_batch(model, texts, 8) == 1


def test_a_uniform_prediction_is_at_distance_zero_and_a_certain_one_at_most() -> None:
    distances = confidence_distances(torch.tensor([[1.0, 1.0, 1.0, 1.0], [100.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(distances, torch.tensor([0.0, 0.75]))
    assert calibration_gaps(
        torch.full((4,), 0.5).double(), torch.tensor([1, 1, 0, 0]).double()
    ).abs().sum() == pytest.approx(0.0)


def test_neighbours_are_the_nearest_rows_however_they_are_cut() -> None:
    queries, rows = (torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(n)) for n in (5, 23))
    expected = [min(range(23), key=lambda r, q=query: float((rows[r] - q).norm())) for query in queries]
    for block in (4, 100):
        assert nearest_rows(queries, rows, block).tolist() == expected


def test_neighbours_accuracy_is_that_of_the_nearest_test_rows() -> None:
    train, test = blobs(60, seed=1), blobs(30, seed=2)
    model = trained(train)
    protected = train.take(slice(0, 4))
    found = measure_privacy(model, protected=protected, retained=train.take(slice(4, 60)), test=test)
    assert isinstance(protected.inputs, Tensor)
    assert isinstance(test.inputs, Tensor)
    near = test.take(nearest_rows(protected.inputs, test.inputs))
    assert isinstance(near.inputs, Tensor)
    assert found.neighbours is not None
    assert found.neighbours.accuracy == float((model(near.inputs).argmax(-1) == near.labels).double().mean())
    assert found.to_json()["num_classes"] == CLASSES


@pytest.fixture(scope="module")
def images() -> tuple[nn.Sequential, Examples]:
    """A network that normalises its pixels, and pixels from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(12, 1, 4, 4, generator=generator)
    pixels[0] = 0.0
    pixels[1] = 1.0
    model = nn.Sequential(PixelNormalization((0.5,), (0.1,)), nn.Flatten(), *network(features=16).children())
    return model.eval(), Examples(inputs=pixels, labels=torch.arange(12) % CLASSES)


def test_attacks_stay_among_images_and_near_the_input(images: tuple[nn.Sequential, Examples]) -> None:
    model, examples = images
    assert isinstance(examples.inputs, Tensor)
    config = AttackConfig(epsilon=0.05, step_size=0.01, steps=20, micro_batch=5)
    attacked = [
        fgsm(model, examples.inputs, config),
        pgd(model, examples.inputs, config),
        gaussian_attack(examples.inputs, config),
    ]
    for one in attacked:
        assert one.min() >= 0
        assert one.max() <= 1
        assert not torch.equal(one, examples.inputs)
    for one in attacked[:2]:
        assert (one - examples.inputs).abs().max() <= 0.05 + 1e-6
    unbounded = AttackConfig(epsilon=0.05, low=None, high=None)
    assert gaussian_attack(examples.inputs, unbounded).min() < 0


def test_gradient_attacks_raise_what_they_are_after(images: tuple[nn.Sequential, Examples]) -> None:
    model, examples = images
    assert isinstance(examples.inputs, Tensor)
    config = AttackConfig(epsilon=0.02, step_size=0.004, steps=20)

    def reached(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return logits.logsumexp(-1), logits.softmax(-1).amax(-1)

    before = reached(examples.inputs)
    assert (reached(pgd(model, examples.inputs, config))[0] > before[0]).all()
    confident = pgd(model, examples.inputs, config, goal="confidence")
    assert (reached(confident)[1] >= before[1]).all()
    single = AttackConfig(epsilon=1e-3)
    x = examples.inputs[2:3].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).logsumexp(-1).sum(), x)
    expected = (examples.inputs[2:3] + 1e-3 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(model, examples.inputs[2:3], single), expected)


def test_a_probe_recovers_labels_that_the_last_layer_alone_hides() -> None:
    whole = blobs(120, seed=3)
    model = trained(whole)
    hidden = copy.deepcopy(model)
    with torch.no_grad():
        last = hidden[2]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()
    protected, public = whole.take(slice(0, 30)), whole.take(slice(30, 120))
    config = AttackConfig(relearn_steps=40, relearn_lr=0.05, low=None, high=None)
    with pytest.raises(ValueError, match=r"must lie in \[0\.0, 1\.0\], to which they are clamped; got -"):
        attack(hidden, protected, public)
    report = attack(hidden, protected, public, config)
    assert report.clean.confidence_distance == pytest.approx(0.0, abs=1e-6)
    assert report.probe is not None
    assert report.probe.accuracy > 0.7
    assert report.relearned.accuracy > 0.6
    assert report.to_json()["pgd"] is not None
    for parameter in last.parameters():
        assert not parameter.any()
    assert last_linear(hidden, protected, CLASSES) is last
    assert last_linear(nn.Sequential(*model, nn.Linear(CLASSES, 4)), protected, CLASSES) is None


def test_fine_tuning_by_an_adversary_leaves_the_model_alone() -> None:
    whole = blobs(30, seed=4)
    model = network().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    tuned = relearn(model, whole, AttackConfig(relearn_steps=3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert not torch.equal(value, tuned.state_dict()[name])


def test_one_class_cannot_be_probed() -> None:
    whole = blobs(30, seed=4)
    same = whole.take((whole.labels == 0).nonzero()[:, 0])
    assert probe(network(), same, whole, AttackConfig()) is None


@given(epsilon=st.floats(0.5, 4.0), sharp=st.floats(0.0, 3.0))
@settings(max_examples=8, deadline=None)
def test_private_labels_have_the_probabilities_of_their_definition(epsilon: float, sharp: float) -> None:
    prior = (sharp * torch.tensor([2.0, 1.0, 0.5, 0.0])).softmax(-1)
    draws = 20_000
    shares: list[list[float]] = []
    for label in range(4):
        drawn = private_labels(
            torch.full((draws,), label), prior.expand(draws, 4), epsilon, torch.Generator().manual_seed(label)
        )
        shares.append([float((drawn == c).double().mean()) for c in range(4)])
    worth = [math.exp(epsilon) / (math.exp(epsilon) + k - 1) * float(prior[:k].sum()) for k in range(1, 5)]
    k = 1 + max(range(4), key=lambda place: worth[place])
    for label in range(4):
        for c in range(4):
            if c >= k:
                expected = 0.0
            elif label >= k:
                expected = 1 / k
            else:
                expected = (math.exp(epsilon) if c == label else 1.0) / (math.exp(epsilon) + k - 1)
            assert shares[label][c] == pytest.approx(expected, abs=0.02)


def test_points_in_a_ball_fill_it_evenly() -> None:
    points = points_in_ball(torch.zeros(4000, 2), 0.5, torch.Generator().manual_seed(0))
    lengths = points.norm(dim=1)
    assert lengths.max() <= 0.5 + 1e-6
    # Half of a disc lies within radius / √2.
    assert float((lengths < 0.5 / math.sqrt(2)).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert points.mean(0).abs().max() < 0.02


def test_every_baseline_trains_a_new_model() -> None:
    whole = blobs(60, seed=5)
    protected, retained = whole.take(slice(0, 6)), whole.take(slice(6, 60))
    config = BaselineConfig(fit=FIT, num_classes=CLASSES, copies=3)
    built: list[nn.Module] = []

    def fresh() -> nn.Module:
        built.append(network(seed=1))
        return built[-1]

    models = [
        retrain(fresh, retained, config),
        random_labels_around(fresh, protected, retained, config),
        gaussian_uniform(fresh, protected, retained, config),
        label_private(fresh, whole, config),
    ]
    # Label privacy trains a teacher first.
    assert len(built) == 5
    weights = [torch.cat([parameter.flatten() for parameter in model.parameters()]) for model in models]
    assert all(not torch.equal(first, second) for first, second in pairwise(weights))
    text = Examples(inputs={"input_ids": torch.zeros(2, 3).long()}, labels=torch.zeros(2).long())
    with pytest.raises(ValueError, match="this baseline blurs numbers"):
        random_labels_around(fresh, text, retained, config)


def test_ordinary_training_learns_with_and_without_mixup() -> None:
    whole = blobs(120, seed=6)
    for changes in ({}, {"mixup": 0.5}, {"optimizer": "sgd"}):
        model = network(seed=2)
        config: dict[str, Any] = {"epochs": 8, "batch": 16, "lr": 0.02, **changes}
        seen: list[int] = []
        fit_classifier(
            model, whole, FitConfig(**config), after_step=lambda done, total, loss, seen=seen: seen.append(done)
        )
        assert measure_privacy(model, protected=whole, retained=whole).retained.accuracy > 0.7
        assert seen == list(range(1, 65))
    with pytest.raises(ValueError, match="keep a finite loss"):
        fit_classifier(network(), join(whole, whole), FitConfig(optimizer="sgd", lr=1e20))


def test_the_front_holds_what_nothing_beats() -> None:
    points = [
        FrontPoint(None, 0.9, 0.99),
        FrontPoint(0.1, 0.5, 0.98),
        FrontPoint(0.5, 0.6, 0.97),
        FrontPoint(0.9, 0.1, 0.9),
    ]
    assert pareto_optimal(points) == [True, True, False, True]
    assert pareto_optimal([points[0], points[0]]) == [True, True]
