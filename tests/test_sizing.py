from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.layers import LAYERS, Encoder, LayerRequest, SparseLayer, require_kind
from mxd.layers.sizing import (
    flops_per_token,
    matched_num_latents,
    num_parameters,
    paper_num_experts,
    transcoder_budget,
)

sizes = st.integers(1, 12)
kinds = st.sampled_from(sorted(LAYERS))
ranks = st.none() | sizes
encoders = st.sampled_from(cast(tuple[Encoder, ...], ("mlp", "glu")))


@pytest.mark.parametrize(
    ("d_model", "d_hidden", "encoder", "num_experts"),
    [(768, 3072, "mlp", 21_490), (1024, 4096, "mlp", 28_658), (2048, 8192, "mlp", 57_330), (3072, 8192, "glu", 86_015)],
)
def test_the_papers_expert_counts(d_model: int, d_hidden: int, encoder: Encoder, num_experts: int) -> None:
    assert paper_num_experts(d_model, d_hidden, encoder) == num_experts


@pytest.mark.parametrize(("d", "millions"), [(768, 37.77), (1024, 67.14), (2048, 268.5), (3072, 604.1)])
def test_the_papers_budgets(d: int, millions: float) -> None:
    assert transcoder_budget(d, d) / 1e6 == pytest.approx(millions, abs=0.05)
    assert transcoder_budget(d, d) == 2 * 32 * d * d + 32 * d + d


@pytest.mark.parametrize(
    ("d", "hidden", "encoder"), [(768, 3072, "mlp"), (1024, 4096, "mlp"), (2048, 8192, "mlp"), (3072, 8192, "glu")]
)
def test_the_papers_counts_match_to_a_tenth_of_a_per_cent(d: int, hidden: int, encoder: Encoder) -> None:
    budget = transcoder_budget(d, d)
    size = num_parameters("mxd", paper_num_experts(d, hidden, encoder), d, d, hidden, encoder)
    assert size == pytest.approx(budget, rel=1e-3)
    matched = matched_num_latents("mxd", budget, d, d, hidden, encoder)
    assert abs(num_parameters("mxd", matched, d, d, hidden, encoder) - budget) <= abs(size - budget)


@settings(deadline=None, max_examples=80)
@given(kind=kinds, num_latents=sizes, d_in=sizes, d_out=sizes, d_hidden=sizes, encoder=encoders, rank=ranks)
def test_num_parameters_counts_those_of_the_built_layer(
    kind: str, num_latents: int, d_in: int, d_out: int, d_hidden: int, encoder: Encoder, rank: int | None
) -> None:
    request = LayerRequest(
        d_in=d_in,
        d_out=d_out,
        num_latents=num_latents,
        d_hidden=d_hidden,
        activation="relu",
        encoder=encoder,
        rank=rank,
    )
    config = require_kind(kind).configure(request)
    layer = cast(Callable[[object], SparseLayer], LAYERS[kind].layer)(config)
    counted = sum(parameter.numel() for parameter in layer.parameters())
    assert num_parameters(kind, num_latents, d_in, d_out, d_hidden, encoder, rank) == counted
    assert (config.num_parameters, config.num_latents, config.k) == (counted, num_latents, 1)
    assert (config.d_in, config.d_out) == (d_out if kind == "topk-sae" else d_in, d_out)


def affine_count(kind: str, d_in: int, d_out: int, d_hidden: int, encoder: Encoder, rank: int) -> tuple[int, int]:
    """Return the parameters of each further latent, and what a layer has whatever its number of latents."""
    branches = (2 if encoder == "glu" else 1) * d_hidden * (d_in + 1)
    return {
        "mxd": (d_in + 1 + d_out, branches + d_hidden * d_out + d_out),
        "transcoder": (d_in + 1 + d_out, d_out),
        "skip-transcoder": (d_in + 1 + d_out, d_in * d_out + d_out),
        "shared-transcoder": (d_in + 1 + d_out, branches + d_hidden * d_out + d_out),
        "topk-sae": (d_out + 1 + d_out, d_out),
        "low-rank": (d_in + 1 + rank, branches + rank * (d_hidden + d_out) + d_out),
    }[kind]


@settings(deadline=None)
@given(
    kind=st.sampled_from(sorted(LAYERS.keys() - {"molt"})),
    surplus=st.integers(0, 10**7),
    d_in=sizes,
    d_out=sizes,
    d_hidden=sizes,
    encoder=encoders,
    rank=sizes,
)
def test_matched_counts_are_the_rounded_quotient(
    kind: str, surplus: int, d_in: int, d_out: int, d_hidden: int, encoder: Encoder, rank: int
) -> None:
    per_latent, fixed = affine_count(kind, d_in, d_out, d_hidden, encoder, rank)
    budget = fixed + per_latent + surplus
    assert num_parameters(kind, 1, d_in, d_out, d_hidden, encoder, rank) == fixed + per_latent
    num_latents = matched_num_latents(kind, budget, d_in, d_out, d_hidden, encoder, rank)
    assert num_latents == round((budget - fixed) / per_latent)


@settings(deadline=None)
@given(kind=kinds, surplus=st.integers(0, 10**7), d_in=sizes, d_out=sizes, d_hidden=sizes, rank=ranks)
def test_no_neighbour_of_a_matched_count_comes_nearer(
    kind: str, surplus: int, d_in: int, d_out: int, d_hidden: int, rank: int | None
) -> None:
    def size(num_latents: int) -> int:
        return num_parameters(kind, num_latents, d_in, d_out, d_hidden, rank=rank)

    budget = size(1) + surplus
    num_latents = matched_num_latents(kind, budget, d_in, d_out, d_hidden, rank=rank)
    assert num_latents >= 1
    for neighbour in (max(1, num_latents - 1), num_latents + 1):
        assert abs(size(num_latents) - budget) <= abs(size(neighbour) - budget)
    steps = [size(num_latents + 1) - size(num_latents), size(num_latents) - size(max(1, num_latents - 1))]
    assert abs(size(num_latents) - budget) <= max(steps) / 2


def test_a_transcoder_matches_itself() -> None:
    assert matched_num_latents("transcoder", transcoder_budget(768, 512), 768, 512) == 32 * 768
    assert matched_num_latents("transcoder", transcoder_budget(768, 512, expansion=4), 768, 512) == 4 * 768


def test_flops_of_gpt2() -> None:
    assert flops_per_token("mxd", 21_490, 32, 768, 768, 3072) / 1e6 == pytest.approx(42.5, abs=0.05)
    original = 2 * 2 * 768 * 3072
    assert original / 1e6 == pytest.approx(9.4, abs=0.05)


@settings(deadline=None)
@given(k=sizes, more=sizes, d_in=sizes, d_out=sizes, d_hidden=sizes, rank=sizes)
def test_flops_are_two_per_weight_that_is_used(
    k: int, more: int, d_in: int, d_out: int, d_hidden: int, rank: int
) -> None:
    num_latents = k + more
    shape = (num_latents, k, d_in, d_out)
    scores, rows = 2 * num_latents * d_in, 2 * k * d_out
    assert flops_per_token("transcoder", *shape) == scores + rows
    assert flops_per_token("topk-sae", *shape) == 2 * num_latents * d_out + rows
    assert flops_per_token("skip-transcoder", *shape) == scores + rows + 2 * d_in * d_out
    branch, decoder = 2 * d_in * d_hidden, 2 * d_hidden * d_out
    assert flops_per_token("mxd", *shape, d_hidden) == scores + rows + branch + decoder
    assert flops_per_token("mxd", *shape, d_hidden, "glu") == scores + rows + 2 * branch + decoder
    decoder = 2 * rank * (k + d_hidden + d_out)
    assert flops_per_token("low-rank", *shape, d_hidden, "mlp", rank) == scores + branch + decoder
    assert flops_per_token("low-rank", *shape, d_hidden, "glu", rank) == scores + 2 * branch + decoder


def test_flops_of_transforms_are_those_of_k_of_mean_rank() -> None:
    # 31 transforms of ranks 16, 2 x 8, 4 x 4, 8 x 2 and 16 x 1: 80 in all.
    assert flops_per_token("molt", 62, 31, 5, 7, rank=16) == 2 * (62 * 5 + 80 * (5 + 7))


@pytest.mark.parametrize("kind", ["low-rank", "molt"])
def test_the_rank_is_a_quarter_of_the_output_where_none_is_asked_for(kind: str) -> None:
    for d_out, rank in ((12, 3), (15, 3), (2, 1)):
        assert num_parameters(kind, 40, 9, d_out, 7) == num_parameters(kind, 40, 9, d_out, 7, rank=rank)
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        num_parameters(kind, 40, 9, 12, 7, rank=0)


@pytest.mark.parametrize("kind", ["mxd", "low-rank"])
def test_a_mixture_without_an_activation_is_refused(kind: str) -> None:
    request = LayerRequest(d_in=4, d_out=4, d_hidden=8, site="the MLP at h.3.mlp")
    with pytest.raises(ValueError, match=r"activation must be given for the MLP at h\.3\.mlp, .*--activation"):
        require_kind(kind).configure(request)
    assert require_kind("molt").configure(request).d_in == 4


def test_a_budget_for_less_than_one_latent_is_refused() -> None:
    smallest = num_parameters("mxd", 1, 4, 3, 5)
    assert matched_num_latents("mxd", smallest, 4, 3, 5) == 1
    sentence = (
        f"the budget must pay for at least one latent of 'mxd', {smallest} parameters; got {smallest - 1}. "
        "Raise the expansion, or set the number of latents or a smaller hidden width."
    )
    with pytest.raises(ValueError, match=sentence):
        matched_num_latents("mxd", smallest - 1, 4, 3, 5)


@pytest.mark.parametrize("name", ["d_in", "d_out", "expansion"])
def test_a_size_that_is_not_positive_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        transcoder_budget(**{"d_in": 4, "d_out": 4, "expansion": 4, name: 0})


def test_an_unknown_kind_is_refused() -> None:
    sentence = f"kind must be one of {', '.join(LAYERS)}; got 'moe'"
    with pytest.raises(ValueError, match=sentence):
        num_parameters("moe", 1, 1, 1)
    with pytest.raises(ValueError, match=sentence):
        matched_num_latents("moe", 100, 1, 1)
    with pytest.raises(ValueError, match=sentence):
        flops_per_token("moe", 1, 1, 1, 1)
