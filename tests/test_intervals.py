import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.evaluation.intervals import percentile_interval, resampled_sums, seed_interval

numbers = st.floats(-10, 10, allow_nan=False, width=32)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9), st.integers(0, 5))
def test_resamples_are_sums_over_documents_drawn_with_replacement(sums: list[tuple[float, float]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected: list[list[float]] = []
    for _ in range(6):
        drawn = [sums[n] for n in torch.randint(len(sums), (len(sums),), generator=generator).tolist()]
        expected.append([math.fsum(column) for column in zip(*drawn, strict=True)])
    found = resampled_sums(torch.tensor(sums, dtype=torch.float64), resamples=6, seed=seed)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_percentile_interval_is_the_middle_95_percent() -> None:
    assert percentile_interval(torch.arange(1001.0).flip(0)) == (25, 975)
    assert percentile_interval(torch.tensor([1.0, math.nan])) is None
    assert percentile_interval(torch.tensor([1.0, math.inf])) is None


def test_the_bootstrap_covers_the_truth_and_pairing_makes_it_narrow() -> None:
    # Documents of very different difficulty, on each of which the replaced model loses about the same.
    generator = torch.Generator().manual_seed(0)
    covered, widths = 0, []
    for trial in range(60):
        tokens = torch.randint(20, 200, (80,), generator=generator).double()
        base = tokens * (3 + torch.randn(80, generator=generator, dtype=torch.float64))
        replaced = base + tokens * (0.1 + 0.05 * torch.randn(80, generator=generator, dtype=torch.float64))
        drawn = resampled_sums(torch.stack([tokens, base, replaced], 1), resamples=200, seed=trial)
        interval = percentile_interval((drawn[:, 2] - drawn[:, 1]) / drawn[:, 0])
        alone = percentile_interval(drawn[:, 2] / drawn[:, 0])
        assert interval is not None
        assert alone is not None
        covered += interval[0] <= 0.1 <= interval[1]
        widths.append((interval[1] - interval[0]) / (alone[1] - alone[0]))
    assert 51 <= covered <= 60
    assert max(widths) < 0.15


# Student's t, from any table: 97.5 % quantiles.
@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (11, 2.228)])
def test_the_interval_over_seeds_is_students(seeds: int, quantile: float) -> None:
    values = [0.1 * n**2 for n in range(seeds)]
    half = quantile * stdev(values) / seeds**0.5
    assert seed_interval(values) == pytest.approx((fmean(values) - half, fmean(values) + half), rel=1e-3)


def test_one_seed_or_a_diverged_one_has_no_interval_and_many_are_not_made_too_narrow() -> None:
    assert seed_interval([0.1]) is None
    assert seed_interval([0.1, math.nan]) is None
    values = [math.sin(n) for n in range(1000)]
    interval = seed_interval(values)
    assert interval is not None
    assert 1.96 < (interval[1] - interval[0]) / 2 / (stdev(values) / 1000**0.5) < 1.07 * 1.96
