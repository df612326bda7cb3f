import math
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.explorer import code_store, profiles
from mxd.explorer.code_store import CodeStore
from mxd.explorer.profiles import (
    CONTEXTS_A_QUARTER,
    HISTOGRAM_BINS,
    POSITION_BINS,
    QUANTILES,
    Profiles,
    Ranked,
    TextTokens,
    profile,
    token_specialisation,
)
from mxd.layers.selection import SparseCode

NUM_LATENTS, CONTEXT, VOCABULARY = 6, 8, 4


class Case(NamedTuple):
    """Codes by token: what each active latent is worth; None for tokens that do not count."""

    tokens: list[int]
    active: list[dict[int, float] | None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    length = CONTEXT * draw(st.integers(1, 4))
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])
    code = st.none() | st.dictionaries(st.integers(0, NUM_LATENTS - 1), values, max_size=3)
    return Case(
        draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=length, max_size=length)),
        draw(st.lists(code, min_size=length, max_size=length)),
    )


def stored(folder: Path, case: Case, batch: int = CONTEXT) -> CodeStore:
    store = CodeStore(folder, "codes", num_places=len(case.tokens), num_latents=NUM_LATENTS)
    for first in range(0, len(case.tokens), batch):
        part = case.active[first : first + batch]
        rows = [active for active in part if active is not None]
        values, indices = torch.zeros(len(rows), 3), torch.zeros(len(rows), 3, dtype=torch.int64)
        for row, active in enumerate(rows):
            for slot, (latent, value) in enumerate(active.items()):
                values[row, slot], indices[row, slot] = value, latent
        content = torch.tensor([active is not None for active in part])
        store.add(SparseCode(values, indices), content, first)
    store.finish()
    return store


def firings(case: Case) -> dict[int, list[tuple[int, float]]]:
    found: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for place, active in enumerate(case.active):
        for latent, value in (active or {}).items():
            if value > 0:
                found[latent].append((place, value))
    return found


def listed(ranked: Ranked, owner: int) -> list[tuple[int, float, float]]:
    mine = ranked.owners == owner
    return list(
        zip(ranked.items[mine].tolist(), ranked.counts[mine].tolist(), ranked.scores[mine].tolist(), strict=True)
    )


def whole(store: CodeStore, case: Case) -> Profiles:
    """The profiles of all latents, which stand in one block."""
    counted = [token for token, active in zip(case.tokens, case.active, strict=True) if active is not None]
    text = TextTokens(np.array(case.tokens), CONTEXT, np.bincount(counted, minlength=VOCABULARY))
    blocks = list(store.by_latent(NUM_LATENTS))
    assert len(blocks) == 1
    return profile(blocks[0], store, text)


@settings(max_examples=40, deadline=None)
@given(case=cases(), batch=st.integers(1, 20), most=st.integers(1, 6), at_once=st.integers(1, 9))
def test_codes_come_back_by_latent_however_they_are_cut(case: Case, batch: int, most: int, at_once: int) -> None:
    expected = firings(case)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_store, "ENTRIES_AT_ONCE", at_once)
        store = stored(Path(folder), case, batch)
        found: dict[int, list[tuple[int, float]]] = {}
        for entries in store.by_latent(most):
            assert len(entries.starts) - 1 <= most
            assert len(entries.places) <= at_once or len(entries.starts) == 2
            for owner in range(len(entries.starts) - 1):
                part = slice(int(entries.starts[owner]), int(entries.starts[owner + 1]))
                pairs = zip(entries.places[part].tolist(), entries.values[part].tolist(), strict=True)
                found[entries.first + owner] = list(pairs)
        places = np.arange(len(case.tokens))
        latents, which = store.active_at(places)
    assert found == {latent: expected.get(latent, []) for latent in range(NUM_LATENTS)}
    by_token = sorted((place, latent) for latent, pairs in expected.items() for place, _ in pairs)
    assert sorted(zip(which.tolist(), latents.tolist(), strict=True)) == by_token


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_profiles_agree_with_a_naive_restatement(case: Case) -> None:
    expected = firings(case)
    with TemporaryDirectory() as folder:
        found = whole(stored(Path(folder), case), case)
    for latent in range(NUM_LATENTS):
        mine = expected[latent]
        values = sorted(value for _, value in mine)
        histogram, positions = [0] * HISTOGRAM_BINS, [0] * POSITION_BINS
        for place, value in mine:
            histogram[min(int(value / values[-1] * HISTOGRAM_BINS), HISTOGRAM_BINS - 1)] += 1
            positions[place % CONTEXT * POSITION_BINS // CONTEXT] += 1
        assert found.histograms[latent].tolist() == histogram
        assert found.positions[latent].tolist() == positions
        quantiles = [values[math.floor(q * (len(values) - 1))] if values else 0.0 for q in QUANTILES]
        assert found.quantiles[latent].tolist() == quantiles
        counts = Counter(case.tokens[place] for place, _ in mine)
        occurrences = Counter(t for t, active in zip(case.tokens, case.active, strict=True) if active is not None)
        ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        assert listed(found.tokens, latent) == [(t, n, n / occurrences[t]) for t, n in ranked]
        together = {
            other: len({place for place, _ in mine} & {place for place, _ in expected[other]})
            for other in range(NUM_LATENTS)
            if other != latent
        }
        jaccard = {o: n / (len(mine) + len(expected[o]) - n) for o, n in together.items() if n}
        company = sorted(jaccard, key=lambda other: (-jaccard[other], other))
        assert [item for item, _, _ in listed(found.company, latent)] == company
        for other, share, score in listed(found.company, latent):
            assert share == pytest.approx(together[other] / len(mine))
            assert score == pytest.approx(jaccard[other])


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_examples_of_each_quarter_are_from_that_quarter(case: Case) -> None:
    expected = firings(case)
    with TemporaryDirectory() as folder:
        quarters = whole(stored(Path(folder), case), case).quarters
    for latent in range(NUM_LATENTS):
        mine = quarters.owners == latent
        shown = list(zip(quarters.places[mine], quarters.values[mine], quarters.quarters[mine], strict=True))
        assert bool(shown) == bool(expected[latent])
        assert len({int(place) // CONTEXT for place, _, _ in shown}) == len(shown)
        values = sorted(value for _, value in expected[latent])
        for place, value, quarter in shown:
            assert (int(place), float(value)) in expected[latent]
            # Equal values may stand in several quarters, and of few values one may reach from one into the next.
            ranks, count = [rank for rank, other in enumerate(values) if other == value], len(values)
            assert any(4 * rank < (quarter + 1) * count and 4 * (rank + 1) > quarter * count for rank in ranks)
        assert all(sum(q == quarter for _, _, q in shown) <= CONTEXTS_A_QUARTER for quarter in range(4))


@settings(max_examples=30, deadline=None)
@given(tokens=st.lists(st.integers(0, 5), min_size=2, max_size=40), distinct=st.integers(2, 9))
def test_specialisation_is_one_minus_the_relative_entropy_of_the_tokens(tokens: list[int], distinct: int) -> None:
    distinct = max(distinct, len(set(tokens)))
    counts = Counter(tokens)
    entropy = -math.fsum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())
    expected = 1 - entropy / math.log(min(len(tokens), distinct))
    owners = np.zeros(len(counts), dtype=np.int64)
    found = token_specialisation(owners, np.array(list(counts.values())), np.array([len(tokens), 1, 0]), distinct)
    assert found[0] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found[1:]).all()


def test_the_company_of_a_latent_that_fires_often_is_estimated_from_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "SAMPLED_FIRINGS", 10)
    # Latent 0 fires on all tokens, latent 1 on every second one, in runs that a stride of 4 sees evenly.
    case = Case([0] * 40, [{0: 1.0} | ({1: 1.0} if place % 8 < 4 else {}) for place in range(40)])
    found = whole(stored(tmp_path, case), case)
    assert listed(found.company, 0) == [(1, 0.5, 0.5)]
    assert listed(found.company, 1) == [(0, 1.0, 0.5)]


def test_a_text_on_which_nothing_fires(tmp_path: Path) -> None:
    case = Case([0] * CONTEXT, [{} for _ in range(CONTEXT)])
    found = whole(stored(tmp_path, case), case)
    assert found.histograms.sum() == 0
    assert len(found.quarters.owners) == len(found.tokens.owners) == len(found.company.owners) == 0
