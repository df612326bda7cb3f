import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from torch import nn

from mxd.evaluation.intervals import resampled_sums
from mxd.probing import text_probes
from mxd.probing.collecting import Probed
from mxd.probing.examples import Example, Parts, SpanSet, TextSet
from mxd.probing.features import Features, TextFeatures
from mxd.probing.files import read_labelled_file
from mxd.probing.hub_sets import load_surnames
from mxd.probing.statistics import Verdict, judge, small_sample_tail
from mxd.probing.text_probes import probe_texts, split
from mxd.probing.token_codes import _Labelled, _labels, _part_of_each
from tests.jsonl import write_rows

NOBODY = Probed(nn.Identity(), cast("Any", None), [], 8)
"""A model that is not asked."""


def families(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the surname of each of 600 texts, and a class that is a matter of chance but one for all of a surname."""
    random = np.random.default_rng(seed)
    surnames = random.integers(0, 90, 600)
    return surnames, np.where(random.random(90) < 0.5, "actor", "singer")[surnames]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 25), st.sampled_from("abc")), min_size=60, max_size=120))
def test_a_group_is_in_one_part(rows: list[tuple[int, str]]) -> None:
    groups, labels = np.array([group for group, _ in rows]), np.array([label for _, label in rows])
    kept = np.flatnonzero(labels != "c")
    parts = split(labels, kept, groups)
    assert sorted(np.concatenate(parts).tolist()) == kept.tolist()
    own = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, own)) == len(set.union(*own))


def test_parts_of_groups_have_about_their_shares_of_each_class() -> None:
    surnames, labels = families()
    for label in ("actor", "singer"):
        shares = [
            (labels[part] == label).sum() / (labels == label).sum() for part in split(labels, np.arange(600), surnames)
        ]
        assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.02)


def test_latents_that_know_names_tell_nothing_of_persons_that_they_have_not_met(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    surnames, labels = families()
    code = sparse.csr_array((np.ones(600), (np.arange(600), surnames)), shape=(600, 90))

    def collect(*_: object) -> TextFeatures:
        return TextFeatures(labels.tolist(), surnames, [Features("3/mxd-k1", code)], 0, 0)

    monkeypatch.setattr(text_probes, "collect_text_features", collect)
    examples = [Example("", str(label)) for label in labels]
    result = probe_texts(NOBODY, TextSet(name="people", examples=examples))
    best = {row.k: row.quality for row in result.rows if row.features == "3/mxd-k1" and row.concept == "actor"}
    # With a surname in several parts, a hundred of them tell all: an AUC of 1.
    assert best[100].roc_auc == 0.5
    assert result.test_groups["actor"] == pytest.approx(len(set(surnames[labels == "actor"])) / 5, abs=3)


def test_texts_about_one_surname_are_a_group_and_so_are_rows_that_say_so(tmp_path: Path) -> None:
    names = ["Ann Lee", "Bob van Lee", "Cid Lee Jr.", "Dan O. Smith", "Eve SMITH"]
    rows = [
        {"text": f"text {number} of {name}", "name": name, "class": "xy"[number % 2]}
        for number in range(30)
        for name in names
    ]
    found = load_surnames(str(write_rows(tmp_path / "people.jsonl", rows)))
    assert {example.group for example in found.examples} == {"lee", "smith"}
    assert all(example.text.casefold().count(str(example.group)) == 1 for example in found.examples)

    own = [{"text": f"text {number}", "label": "xy"[number % 2], "group": number % 40} for number in range(80)]
    own += [{"text": f"alone {number}", "label": "x"} for number in range(3)]
    found = read_labelled_file(write_rows(tmp_path / "own.jsonl", own))
    assert isinstance(found, TextSet)
    assert {example.group for example in found.examples} == {*map(str, range(40)), None}
    spans = [{"text": "ab cd", "spans": [[0, 2, "x"]], "group": "one"}, {"text": "none", "spans": []}]
    documents = read_labelled_file(write_rows(tmp_path / "spans.jsonl", spans))
    assert isinstance(documents, SpanSet)
    assert documents.groups == ["one", None]
    with pytest.raises(ValueError, match="A group must be a text or a number"):
        read_labelled_file(write_rows(tmp_path / "odd.jsonl", [own[0] | {"group": [1]}]))


def document(size: int, group: object, **bearing: int) -> _Labelled:
    """Return a document whose first tokens, so many, bear a label."""
    labels = {label: np.arange(count) for label, count in bearing.items()}
    return _Labelled(np.zeros(size, dtype=np.int64), labels, group, for_test=False)


def test_documents_of_a_group_are_in_one_part_and_the_test_has_its_own() -> None:
    data = SpanSet(name="made", texts=[], spans_of=lambda _: [])
    documents = [document(10 + number, number % 7) for number in range(40)]
    groups = np.arange(40) % 7
    parts = _part_of_each(documents, groups, data)
    assert set(parts.tolist()) == {0, 1, 2}
    assert all(len(set(parts[groups == group].tolist())) == 1 for group in range(7))
    with pytest.raises(ValueError, match="2 can be used, documents of a group counted once"):
        _part_of_each(documents, np.arange(40) % 2, data)
    held = SpanSet(name="made", texts=[], spans_of=lambda _: [], for_test=frozenset({99}))
    # Documents that were seen in training must not stand in for those that are for the test.
    with pytest.raises(ValueError, match="Some of the documents that are for the test must be used"):
        _part_of_each(documents, groups, held)


def test_concepts_have_five_tokens_in_each_part_or_are_skipped() -> None:
    documents = [document(20, 0, x=6), document(20, 1, x=6, y=20), document(20, 2, x=6)]
    parts = Parts(np.arange(20), np.arange(20, 40), np.arange(40, 60))
    concepts, labels, skipped = _labels(documents, parts)
    assert concepts == ["x"]
    assert labels[:, 0].tolist() == ([True] * 6 + [False] * 14) * 3
    assert [(skip.label, skip.found, skip.needed) for skip in skipped] == [("y", 20, 15)]


def some_verdict(documents: int, holding: int, seed: int = 0, wrong: float = 0.3) -> tuple[Verdict, np.ndarray]:
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(documents), 40)
    positive = (random.random(len(groups)) < 0.3) & (groups < holding)
    said = positive ^ (random.random(len(groups)) < wrong)
    return Verdict(positive, said, said.astype(float)), groups


@pytest.mark.parametrize(("holding", "there"), [(1, False), (4, False), (5, True), (12, True)])
def test_a_class_in_fewer_than_five_documents_has_no_interval(holding: int, there: bool) -> None:
    verdict, groups = some_verdict(12, holding)
    [quality] = judge([verdict], groups)
    assert (quality.f1_interval is not None) == there
    if there:
        assert quality.f1_interval is not None
        assert quality.f1_interval[0] < quality.f1 < quality.f1_interval[1]
    else:
        assert quality.balanced_accuracy_interval is None


def test_what_is_never_wrong_has_no_interval_of_no_width() -> None:
    verdict, groups = some_verdict(12, 12, wrong=0)
    # Resamples of the second without any positive have no say: their F1 is 0 whatever the probe.
    rare, documents = some_verdict(12, 5, wrong=0)
    for found in (judge([verdict], groups), judge([verdict]), judge([rare], documents)):
        assert found[0].f1 == 1
        assert found[0].f1_interval is None
        assert found[0].balanced_accuracy_interval is None


def test_the_ends_of_an_interval_are_the_quantiles_of_few_documents() -> None:
    for count in (5, 8, 40, 1000):
        wider = math.sqrt(count / (count - 1)) * float(stats.t.ppf(0.975, count - 1))
        assert small_sample_tail(count) == pytest.approx(float(stats.norm.cdf(-wider)))
    verdict, groups = some_verdict(8, 8)
    yes, said = verdict.positive, verdict.predicted
    cells = [[(cell[groups == g]).sum() for cell in (yes & said, ~yes & said, yes & ~said)] for g in range(8)]
    drawn = resampled_sums(torch.tensor(np.array(cells, dtype=np.float64))).numpy()
    f1 = 2 * drawn[:, 0] / (2 * drawn[:, 0] + drawn[:, 1] + drawn[:, 2])
    tail = small_sample_tail(8)
    assert judge([verdict], groups)[0].f1_interval == pytest.approx(np.quantile(f1, [tail, 1 - tail]))


def test_intervals_of_few_documents_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of five documents that differ in how well they are told; with plain quantiles 51 of 60 intervals do."""

    def draw(documents: int, random: np.random.Generator) -> tuple[Verdict, np.ndarray]:
        groups = np.repeat(np.arange(documents), 30)
        positive = random.random(len(groups)) < 0.4
        right = random.beta(3, 2, documents)[groups]
        said = np.where(random.random(len(groups)) < right, positive, ~positive)
        return Verdict(positive, said, said.astype(float)), groups

    [large] = judge([draw(3000, np.random.default_rng(99))[0]])
    covered = 0
    for seed in range(60):
        verdict, groups = draw(5, np.random.default_rng(seed))
        interval = judge([verdict], groups)[0].f1_interval
        assert interval is not None
        covered += interval[0] <= large.f1 <= interval[1]
    assert covered >= 54
