from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from mxd.probing.dense_units import best_units
from mxd.probing.examples import Parts
from mxd.probing.fitting import Scale, fit_probe
from mxd.probing.statistics import Verdict, judge
from mxd.probing.thresholds import SortedEntries, average_precisions, best_thresholds, count
from mxd.probing.token_probes import _regress, _sample

TOKENS, LATENTS = 12, 4
NOTHING: Any = 0.0
"""F1 where nothing is said to be positive."""
# Few values, so that many are equal; most are 0.
codes = arrays(np.float32, (TOKENS, LATENTS), elements=st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 2.0]))
marks = arrays(np.bool_, (TOKENS, 3))


def entries(dense: np.ndarray) -> SortedEntries:
    tokens, latents = np.nonzero(dense)
    return SortedEntries.of(latents, dense[tokens, latents], tokens, *dense.shape)


def naive_best(values: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    tried = [
        (f1_score(positive, values >= cut, zero_division=NOTHING), cut) for cut in set(values[values > 0].tolist())
    ]
    return max(tried, default=(0.0, np.inf))


@settings(max_examples=60)
@given(codes, marks)
def test_the_best_threshold_is_the_best_of_all_that_can_be_tried(dense: np.ndarray, labels: np.ndarray) -> None:
    found = best_thresholds(entries(dense), labels[:, 0])
    for latent in range(LATENTS):
        f1, threshold = naive_best(dense[:, latent], labels[:, 0])
        assert found.f1[latent] == pytest.approx(f1)
        assert found.values[latent] == threshold


@settings(max_examples=60)
@given(codes, marks, st.lists(st.integers(0, 2), min_size=LATENTS, max_size=LATENTS))
def test_counts_and_average_precisions_are_scikit_learns(
    dense: np.ndarray, labels: np.ndarray, concepts: list[int]
) -> None:
    sorted_entries, of = entries(dense), np.array(concepts)
    thresholds = np.array([0.5, 1.0, 1.2, np.inf], dtype=np.float32)
    counts = count(sorted_entries, labels, of, thresholds)
    precisions = average_precisions(sorted_entries, labels, of)
    for latent in range(LATENTS):
        positive = labels[:, concepts[latent]]
        said = dense[:, latent] >= thresholds[latent]
        assert counts.f1[latent] == pytest.approx(f1_score(positive, said, zero_division=NOTHING))
        if positive.any():
            assert precisions[latent] == pytest.approx(average_precision_score(positive, dense[:, latent]))
        else:
            assert np.isnan(precisions[latent])


def test_codes_without_any_entry_name_nothing() -> None:
    nothing = entries(np.zeros((TOKENS, LATENTS), dtype=np.float32))
    labels = np.eye(TOKENS, 3, dtype=bool)
    found = best_thresholds(nothing, labels[:, 0])
    assert np.isinf(found.values).all()
    assert not found.f1.any()
    assert average_precisions(nothing, labels, np.zeros(LATENTS, dtype=np.int64)).tolist() == [1 / TOKENS] * LATENTS


def test_the_best_dense_unit_is_found_with_its_sign_and_threshold() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(300, 70)).astype(np.float32)
    labels = random.random((300, 2)) < 0.3
    # One unit is high for the first concept, another low for the second.
    values[:, 66] += 6 * labels[:, 0]
    values[:, 3] -= 6 * labels[:, 1]
    values = values.round(1)
    parts = Parts(np.arange(0, 150), np.arange(150, 220), np.arange(220, 300))
    units = best_units(values, labels, parts)
    assert [(unit.number, unit.sign) for unit in units] == [(66, 1), (3, -1)]
    for column, unit in enumerate(units):
        scores = unit.sign * values[:, unit.number]
        tried = {
            float(cut): f1_score(labels[parts.train, column], scores[parts.train] >= cut)
            for cut in np.unique(scores[parts.train])
        }
        assert tried[unit.threshold] == max(tried.values())


def test_a_units_choice_and_threshold_never_see_the_test_part() -> None:
    random = np.random.default_rng(1)
    values, labels = random.normal(size=(90, 5)), random.random((90, 1)) < 0.5
    parts = Parts(np.arange(30), np.arange(30, 60), np.arange(60, 90))
    before = best_units(values, labels, parts)
    values[60:], labels[60:] = 7, ~labels[60:]
    assert best_units(values, labels, parts) == before


@settings(max_examples=15)
@given(arrays(np.bool_, 15), arrays(np.bool_, 15), arrays(np.float64, 15, elements=st.sampled_from([0.0, 1.0, 2.0])))
def test_quality_is_scikit_learns(positive: np.ndarray, said: np.ndarray, scores: np.ndarray) -> None:
    positive[:2] = [True, False]
    [quality] = judge([Verdict(positive, said, scores)])
    assert quality.f1 == pytest.approx(f1_score(positive, said, zero_division=NOTHING))
    assert quality.balanced_accuracy == pytest.approx(balanced_accuracy_score(positive, said))
    assert quality.roc_auc == pytest.approx(roc_auc_score(positive, scores))
    assert quality.average_precision == pytest.approx(average_precision_score(positive, scores))


def test_tokens_of_a_document_are_drawn_together() -> None:
    random = np.random.default_rng(0)
    # Documents in which the probe is either always right or always wrong.
    documents = np.repeat(np.arange(10), 100)
    positive = random.random(1000) < 0.5
    said = positive ^ (documents % 2 == 0)
    verdict = Verdict(positive, said, said.astype(float))
    [together], [alone] = judge([verdict], documents), judge([verdict])
    assert together.f1 == alone.f1
    assert together.f1_interval is not None
    assert alone.f1_interval is not None
    low, high = together.f1_interval
    assert low < 0.35
    assert high > 0.65
    assert alone.f1_interval[1] - alone.f1_interval[0] < 0.2 * (high - low) * 2
    assert alone.f1_interval[0] < alone.f1 < alone.f1_interval[1]


def test_the_interval_covers_what_the_probe_is_worth() -> None:
    worth = 2 * 0.8 * 0.5 / (0.5 + 0.8 * 0.5 + 0.2 * 0.5)
    covered = 0
    for seed in range(25):
        random = np.random.default_rng(seed)
        positive = random.random(300) < 0.5
        said = positive ^ (random.random(300) < 0.2)
        [quality] = judge([Verdict(positive, said, said.astype(float))])
        assert quality.f1_interval is not None
        covered += quality.f1_interval[0] <= worth <= quality.f1_interval[1]
    assert 21 <= covered <= 25


@pytest.mark.parametrize("seed", range(12))
def test_tokens_that_share_a_score_are_on_the_side_that_validation_chose(seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = random.integers(0, 12, 600)
    columns = (ids[:, None] == np.arange(5)).astype(float)
    positive = (ids < 2) & (random.random(600) < 0.9)
    parts = Parts(np.arange(200), np.arange(200, 400), np.arange(400, 600))
    verdict = _regress(columns, parts, positive)
    # The best cut between levels that the same scores allow on the validation part, tried one by one.
    scale = Scale(columns[_sample(parts.train, positive[parts.train])])
    probe = fit_probe(
        scale(columns[_sample(parts.train, positive[parts.train])]),
        positive[_sample(parts.train, positive[parts.train])],
    )
    scores = probe.decision_function(scale(columns[parts.validation]))
    best = max(f1_score(positive[parts.validation], scores >= level) for level in np.unique(scores))
    said = scores >= min(verdict.scores[verdict.predicted])
    assert f1_score(positive[parts.validation], said) == pytest.approx(best)
