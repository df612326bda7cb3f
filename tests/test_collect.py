from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.evaluation.collect import Activation, LatentStatistics, choose_experts
from mxd.layers.selection import SparseCode

NUM_LATENTS = 5
Token = tuple[int, int, dict[int, float]]


def code_of(tokens: list[Token], k: int) -> SparseCode:
    values, indices = torch.zeros(len(tokens), k), torch.zeros(len(tokens), k, dtype=torch.int64)
    for row, (_, _, active) in enumerate(tokens):
        for slot, (latent, value) in enumerate(active.items()):
            values[row, slot], indices[row, slot] = value, latent
    return SparseCode(values, indices)


def update(statistics: LatentStatistics, tokens: list[Token]) -> None:
    contexts, positions = (torch.tensor([token[i] for token in tokens], dtype=torch.int64) for i in (0, 1))
    statistics.update(code_of(tokens, k=NUM_LATENTS), contexts, positions)


def naive_top(tokens: list[Token], latent: int, kept: int) -> list[Activation]:
    best: dict[int, Activation] = {}
    for context, position, active in tokens:
        found = Activation(active.get(latent, 0.0), context, position)
        other = best.get(context)
        if found.value > 0 and (other is None or (-found.value, position) < (-other.value, other.position)):
            best[context] = found
    return sorted(best.values(), key=lambda entry: (-entry.value, entry.context))[:kept]


@st.composite
def streams(draw: st.DrawFn) -> list[Token]:
    places = st.tuples(st.integers(0, 4), st.integers(0, 6))
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])
    active = st.dictionaries(st.integers(0, NUM_LATENTS - 1), values, max_size=NUM_LATENTS)
    return [(*place, draw(active)) for place in draw(st.lists(places, min_size=1, max_size=30, unique=True))]


@settings(max_examples=60, deadline=None)
@given(tokens=streams(), kept=st.integers(1, 4), batch=st.integers(1, 30))
def test_agrees_with_a_naive_restatement_however_the_stream_is_cut(tokens: list[Token], kept: int, batch: int) -> None:
    statistics = LatentStatistics(NUM_LATENTS, contexts_kept=kept)
    for start in range(0, len(tokens), batch):
        update(statistics, tokens[start : start + batch])
    values: dict[int, list[float]] = defaultdict(list)
    for _, _, active in tokens:
        for latent, value in active.items():
            if value > 0:
                values[latent].append(value)
    assert statistics.num_tokens == len(tokens)
    for latent in range(NUM_LATENTS):
        assert statistics.firings[latent] == len(values[latent])
        assert statistics.sums[latent] == sum(values[latent])
        assert statistics.maxima[latent] == max(values[latent], default=0)
        assert statistics.firing_rates[latent] == len(values[latent]) / len(tokens)
        assert statistics.top_contexts(latent) == naive_top(tokens, latent, kept)
        assert statistics.num_contexts[latent] == len(naive_top(tokens, latent, kept))
    assert statistics.dead_fraction == sum(not values[latent] for latent in range(NUM_LATENTS)) / NUM_LATENTS
    assert statistics.l0 == sum(len(found) for found in values.values()) / len(tokens)


def test_counts_batches_of_real_size() -> None:
    num_latents, tokens, k = 100_000, 4096, 64
    torch.manual_seed(0)
    statistics = LatentStatistics(num_latents)
    for batch in range(2):
        code = SparseCode(torch.rand(tokens, k), torch.randint(num_latents, (tokens, k)))
        places = torch.arange(tokens) + batch * tokens
        statistics.update(code, places // 128, places % 128)
    assert statistics.firings.sum() == 2 * tokens * k


def test_says_what_is_wrong_with_a_code() -> None:
    statistics = LatentStatistics(3)
    one, two = (torch.zeros(n, dtype=torch.int64) for n in (1, 2))
    with pytest.raises(ValueError, match="indices must lie in"):
        statistics.update(SparseCode(torch.ones(1, 1), torch.tensor([[3]])), one, one)
    with pytest.raises(ValueError, match="2 rows"):
        statistics.update(SparseCode(torch.ones(1, 1), torch.tensor([[0]])), two, two)
    with pytest.raises(ValueError, match="at least 1"):
        LatentStatistics(0)


def test_the_chosen_experts_are_spread_over_the_firing_rates() -> None:
    statistics = LatentStatistics(NUM_LATENTS, contexts_kept=1)
    # Latent i fires on i tokens, so latent 0 is not eligible.
    update(statistics, [(context, 0, dict.fromkeys(range(context + 1, NUM_LATENTS), 1.0)) for context in range(4)])
    assert choose_experts(statistics, count=2) == [3, 1]
    assert choose_experts(statistics, count=10) == [4, 3, 2, 1]
    assert choose_experts(LatentStatistics(3)) == []
