from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.layers import (
    LAYERS,
    Encoder,
    MixtureOfDecodersConfig,
    SkipTranscoderConfig,
    SparseLayer,
    TopKAutoencoderConfig,
    TranscoderConfig,
)
from mxd.layers.sizing import (
    flops_per_token,
    matched_num_latents,
    num_parameters,
    paper_num_experts,
    transcoder_budget,
)

sizes = st.integers(1, 12)
kinds = st.sampled_from(sorted(LAYERS))
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


def build(kind: str, num_latents: int, d_in: int, d_out: int, d_hidden: int, encoder: Encoder) -> SparseLayer:
    configs = {
        "mxd": MixtureOfDecodersConfig(
            d_in=d_in, d_out=d_out, d_hidden=d_hidden, num_experts=num_latents, k=1, encoder=encoder
        ),
        "transcoder": TranscoderConfig(d_in=d_in, d_out=d_out, num_latents=num_latents, k=1),
        "skip-transcoder": SkipTranscoderConfig(d_in=d_in, d_out=d_out, num_latents=num_latents, k=1),
        "topk-sae": TopKAutoencoderConfig(d_in=d_in, num_latents=num_latents, k=1),
    }
    return cast(Callable[[object], SparseLayer], LAYERS[kind].layer)(configs[kind])


@settings(deadline=None, max_examples=80)
@given(kind=kinds, num_latents=sizes, d_in=sizes, d_out=sizes, d_hidden=sizes, encoder=encoders)
def test_num_parameters_counts_those_of_the_built_layer(
    kind: str, num_latents: int, d_in: int, d_out: int, d_hidden: int, encoder: Encoder
) -> None:
    d_out = d_in if kind == "topk-sae" else d_out
    layer = build(kind, num_latents, d_in, d_out, d_hidden, encoder)
    counted = sum(parameter.numel() for parameter in layer.parameters())
    assert num_parameters(kind, num_latents, d_in, d_out, d_hidden, encoder) == counted


@settings(deadline=None)
@given(kind=kinds, surplus=st.integers(0, 10**7), d_in=sizes, d_out=sizes, d_hidden=sizes, encoder=encoders)
def test_matched_counts_come_within_half_a_latent(
    kind: str, surplus: int, d_in: int, d_out: int, d_hidden: int, encoder: Encoder
) -> None:
    budget = num_parameters(kind, 1, d_in, d_out, d_hidden, encoder) + surplus
    num_latents = matched_num_latents(kind, budget, d_in, d_out, d_hidden, encoder)
    assert num_latents >= 1
    size = num_parameters(kind, num_latents, d_in, d_out, d_hidden, encoder)
    assert abs(size - budget) <= (d_in + d_out + 1) / 2


def test_a_transcoder_matches_itself() -> None:
    assert matched_num_latents("transcoder", transcoder_budget(768, 512), 768, 512) == 32 * 768
    assert matched_num_latents("transcoder", transcoder_budget(768, 512, expansion=4), 768, 512) == 4 * 768


def test_flops_of_gpt2() -> None:
    assert flops_per_token("mxd", 21_490, 32, 768, 768, 3072) / 1e6 == pytest.approx(42.5, abs=0.05)
    original = 2 * 2 * 768 * 3072
    assert original / 1e6 == pytest.approx(9.4, abs=0.05)


@settings(deadline=None)
@given(k=sizes, num_latents=sizes, d_in=sizes, d_out=sizes, d_hidden=sizes)
def test_flops_are_two_per_weight_that_is_used(k: int, num_latents: int, d_in: int, d_out: int, d_hidden: int) -> None:
    shape = (num_latents, k, d_in, d_out)
    scores, rows = 2 * num_latents * d_in, 2 * k * d_out
    assert flops_per_token("transcoder", *shape) == flops_per_token("topk-sae", *shape) == scores + rows
    assert flops_per_token("skip-transcoder", *shape) == scores + rows + 2 * d_in * d_out
    branch, decoder = 2 * d_in * d_hidden, 2 * d_hidden * d_out
    assert flops_per_token("mxd", *shape, d_hidden) == scores + rows + branch + decoder
    assert flops_per_token("mxd", *shape, d_hidden, "glu") == scores + rows + 2 * branch + decoder


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
    sentence = "kind must be one of mxd, transcoder, skip-transcoder, topk-sae; got 'moe'"
    with pytest.raises(ValueError, match=sentence):
        num_parameters("moe", 1, 1, 1)
    with pytest.raises(ValueError, match=sentence):
        matched_num_latents("moe", 100, 1, 1)
    with pytest.raises(ValueError, match=sentence):
        flops_per_token("moe", 1, 1, 1, 1)
