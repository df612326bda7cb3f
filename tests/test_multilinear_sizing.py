from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.multilinear import (
    CPMixtureConfig,
    ExpertsKind,
    MultilinearMLP,
    MultilinearMLPConfig,
    TRMixtureConfig,
    fractional_block_rank,
    matched_block_rank,
    matched_rank,
    ranks_of,
)

GPT2 = MultilinearMLPConfig(kind="cp", d_in=768, d_hidden=3072, d_out=768, num_experts=(256,), ranks=(1,))
TOKENS = replace(GPT2, d_in=196, d_hidden=256, d_out=196, num_experts=(64,))
CHANNELS = replace(GPT2, d_in=512, d_hidden=2048, d_out=512, num_experts=(64,))


def as_tr(config: MultilinearMLPConfig) -> MultilinearMLPConfig:
    return replace(config, kind="tr", ranks=(4, 4, 1, 4))


def test_ranks_of_the_clip_head_are_the_papers() -> None:
    cp = [matched_rank("cp", 768, 1000, (n,)).rank for n in (32, 64, 128, 256, 512)]
    tr = [matched_rank("tr", 768, 1000, (n,)).rank for n in (64, 128, 256, 512)]
    assert cp == [414, 393, 354, 283, 165]
    assert tr == [102, 95, 81, 52]
    for n, rank in zip((32, 64, 128, 256, 512), cp, strict=True):
        assert rank == -(-(769_000 - 768 * n) // (1769 + n))


def test_the_papers_blocks_take_a_fraction_of_the_width_and_are_a_little_larger_than_what_they_replace() -> None:
    chosen = fractional_block_rank(GPT2, 0.725), fractional_block_rank(as_tr(GPT2), 0.195)
    assert [match.rank for match in chosen] == [556, 149]
    assert [match.parameters for match in chosen] == [4_752_472, 4_783_272]
    assert [match.budget for match in chosen] == [4_722_432] * 2
    assert [round(match.excess, 4) for match in chosen] == [0.0064, 0.0129]
    # Sixty-four experts are given other fractions.
    few = replace(GPT2, num_experts=(64,))
    assert fractional_block_rank(few, 0.78).rank == 599
    assert fractional_block_rank(as_tr(few), 0.2).rank == 153
    mixer = [fractional_block_rank(block, 0.75).rank for block in (TOKENS, CHANNELS)]
    assert mixer == [147, 384]
    assert [fractional_block_rank(as_tr(block), 0.19).rank for block in (TOKENS, CHANNELS)] == [37, 97]
    assert [matched_block_rank(block).rank for block in (GPT2, as_tr(GPT2))] == [553, 148]


def test_a_blocks_parameters_are_those_of_the_module() -> None:
    small = replace(GPT2, d_in=12, d_hidden=20, d_out=9, num_experts=(3, 2), normalize_input=True)
    for config in (small, replace(small, kind="tr", ranks=(4, 4, 4, 2, 4))):
        match = matched_block_rank(config, budget=5000)
        sized = replace(config, ranks=ranks_of(config.kind, match.rank, 2))
        assert match.parameters == sum(parameter.numel() for parameter in MultilinearMLP(sized).parameters())


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["cp", "tr"]),
    st.integers(20, 200),
    st.integers(20, 200),
    st.lists(st.integers(1, 6), min_size=1, max_size=2),
)
def test_the_matched_rank_is_the_smallest_that_is_large_enough(
    kind: ExpertsKind, d_in: int, d_out: int, num_experts: list[int]
) -> None:
    experts = tuple(num_experts)
    match = matched_rank(kind, d_in, d_out, experts, ring=2)

    def size(rank: int) -> int:
        if kind == "cp":
            return CPMixtureConfig(d_in=d_in, d_out=d_out, num_experts=experts, rank=rank).num_parameters
        ranks = ranks_of("tr", rank, len(experts), 2)
        return TRMixtureConfig(d_in=d_in, d_out=d_out, num_experts=experts, ranks=ranks).num_parameters

    assert match.budget == (d_in + 1) * d_out
    assert size(match.rank) == match.parameters >= match.budget
    assert match.rank == 1 or size(match.rank - 1) < match.budget


def test_budgets_that_the_gate_eats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"98,304 parameters for 128 experts; got 7,690\. Ask for fewer experts\."):
        matched_rank("cp", 768, 10, (128,))
    with pytest.raises(ValueError, match=r"the rank must be at least 1; 0\.001 of 768 is 0"):
        fractional_block_rank(GPT2, 0.001)
    with pytest.raises(ValueError, match="num_experts must name at least one expert"):
        matched_rank("cp", 768, 10, ())
