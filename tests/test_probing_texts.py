import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from mxd.probing.examples import Parts
from mxd.probing.features import Features
from mxd.probing.fitting import Scale, fit_probe
from mxd.probing.text_probes import ranked_features, split

TEXTS, LATENTS = 200, 30


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray, Parts]:
    """Codes in which latent 7 tells the class everywhere, and latent 3 does on the test part only."""
    random = np.random.default_rng(seed)
    labels = np.where(random.random(TEXTS) < 0.4, "yes", "no")
    parts = split(labels, np.arange(TEXTS))
    values = random.random((TEXTS, LATENTS)) * (random.random((TEXTS, LATENTS)) < 0.3)
    values[:, 7] = (labels == "yes") * 1.5 + 0.7 * random.random(TEXTS)
    values[parts.test, 3] = 5.0 * (labels[parts.test] == "yes")
    return values.astype(np.float32), labels, parts


def code(values: np.ndarray) -> Features:
    return Features("3/mxd-k4", sparse.csr_array(values))


def test_parts_are_disjoint_and_have_all_classes_in_their_shares() -> None:
    labels = np.array(["a"] * 50 + ["b"] * 150 + ["left out"] * 10)
    parts = split(labels, np.arange(200))
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    assert [len(part) for part in parts] == [120, 40, 40]
    assert [int((labels[part] == "a").sum()) for part in parts] == [30, 10, 10]


def test_the_latent_that_tells_the_class_is_ranked_first_and_the_test_part_has_no_say() -> None:
    values, labels, parts = planted()
    ranked = ranked_features(code(values), labels == "yes", parts)
    assert ranked[0] == 7
    assert ranked[0] != 3
    other = values.copy()
    other[parts.test] = np.random.default_rng(5).random((len(parts.test), LATENTS))
    flipped = labels.copy()
    flipped[parts.test] = flipped[parts.test][::-1]
    assert ranked_features(code(other), flipped == "yes", parts) == ranked


def test_latents_must_fire_more_within_the_class_and_dense_units_either_way() -> None:
    values, labels, parts = planted()
    against = values.copy()
    against[:, 7] = values[:, 7].max() - values[:, 7]
    assert 7 not in ranked_features(code(against), labels == "yes", parts)
    assert ranked_features(Features("3/dense hidden", against), labels == "yes", parts)[0] == 7


def test_candidates_are_those_whose_means_differ_most() -> None:
    random = np.random.default_rng(2)
    values = random.random((400, 300)).astype(np.float32)
    labels = np.array(["a", "b"] * 200)
    parts = split(labels, np.arange(400))
    ranked = ranked_features(code(values), labels == "a", parts)
    train, positive = values[parts.train], labels[parts.train] == "a"
    difference = train[positive].mean(0) - train[~positive].mean(0)
    expected = [latent for latent in np.argsort(-difference)[:100] if difference[latent] > 0]
    assert set(ranked) == set(expected)


def test_a_probe_is_a_balanced_logistic_regression_of_scaled_features() -> None:
    random = np.random.default_rng(3)
    x = random.normal(3, 5, (300, 4))
    positive = x[:, 1] + random.normal(0, 3, 300) > 6
    scaled = Scale(x)(x)
    assert scaled.mean(0) == pytest.approx(np.zeros(4), abs=1e-9)
    assert scaled.std(0) == pytest.approx(np.ones(4))
    expected = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=2000).fit(scaled, positive)
    assert fit_probe(scaled, positive).coef_ == pytest.approx(expected.coef_, rel=1e-3)


def test_scores_do_not_depend_on_a_codes_unit() -> None:
    values, labels, parts = planted(4)
    ranked = ranked_features(code(values), labels == "yes", parts)
    assert ranked_features(code(1000 * values), labels == "yes", parts) == ranked


def test_a_constant_feature_is_no_error() -> None:
    x = np.ones((40, 2))
    positive = np.arange(40) < 20
    said = fit_probe(Scale(x)(x), positive).predict(Scale(x)(x))
    assert 0 <= f1_score(positive, said) <= 1
