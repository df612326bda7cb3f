"""A steered model writes what the equation says, through Hugging Face's own `generate`."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mxd.edits import Ablate, Add, Edit, Scale, Set, Span, edit_code, with_edits
from mxd.layers import SparseLayer, TopKAutoencoder, TopKAutoencoderConfig
from mxd.models import find_mlp, replace_mlp
from mxd.steering.steer import positions_of, steer
from tests.test_generation import D_MODEL, LENGTHS, Make, Written, generate, mxd, prompts, require_same, transcoder
from tests.test_models import build, forwards, logits


def autoencoder(seed: int = 0, num_latents: int = 24) -> SparseLayer:
    config = TopKAutoencoderConfig(d_in=D_MODEL, num_latents=num_latents, k=4)
    return TopKAutoencoder(config, torch.Generator().manual_seed(seed)).requires_grad_(False)


EDITS = (
    Edit(latents=(3, 7), operation=Add(amount=1.5)),
    Edit(latents=(5,), operation=Set(amount=2.0), positions=(0, 4, 7)),
    Edit(latents=(3,), operation=Scale(factor=-1.0), positions=Span(start=6)),
    Edit(latents=tuple(range(8, 24)), operation=Ablate(), positions=Span(stop=8)),
)
FAMILIES = ("llama", "opt", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [mxd, transcoder, autoencoder])
def test_a_steered_model_generates_the_same_with_cache_and_padding_as_the_equation_says(
    family: str, make: Make
) -> None:
    model = build(family).double()
    before, (ids, mask) = logits(model), prompts(LENGTHS)
    layer = make().double()
    with replace_mlp(model, {1: layer}):
        plain = generate(model, ids, mask)
    with steer(model, {1: layer}, {1: EDITS}):
        cached = generate(model, ids, mask)
        require_same(cached, generate(model, ids, mask, use_cache=False))
    assert not torch.allclose(cached.logits, plain.logits, rtol=0.05)
    expected = [_by_the_equation(model, layer, ids[[n], -length:]) for n, length in enumerate(LENGTHS)]
    require_same(cached, Written(*map(torch.cat, zip(*expected, strict=True))))
    assert torch.equal(logits(model), before)


def _by_the_equation(model: nn.Module, layer: SparseLayer, ids: Tensor) -> Written:
    """Generate without a cache, from one prompt without padding: positions are then 0, 1, 2, …"""
    own = find_mlp(model, 1)

    def replaced(x: Tensor) -> Tensor:
        x = x if layer.reads == "input" else own(x)
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        return layer.decode(x, edit_code(layer.encode(x), EDITS, layer.config.num_latents, positions))

    with replace_mlp(model, {1: replaced}):
        return generate(model, ids, torch.ones_like(ids), use_cache=False)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "repetition_penalty": 1.3, "cache_implementation": "static"},
        {"do_sample": False, "prefill_chunk_size": 2},
    ],
    ids=["sampling", "beams", "static", "chunks"],
)
def test_every_way_of_generating_meets_the_same_positions(options: dict[str, object]) -> None:
    model, (ids, mask) = build("llama").double(), prompts((5, 5, 5) if "prefill_chunk_size" in options else LENGTHS)
    with steer(model, {1: mxd().double()}, {1: EDITS}):
        expected = _tokens(model, ids, mask, {**_without_cache(options), "use_cache": False})
        assert torch.equal(_tokens(model, ids, mask, options), expected)
    assert not torch.equal(_tokens(model, ids, mask, options), expected)


def _without_cache(options: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in options.items() if key not in ("cache_implementation", "prefill_chunk_size")}


def _tokens(model: nn.Module, ids: Tensor, mask: Tensor, options: dict[str, object]) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cast(Any, model).generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, **options)


def test_edits_that_a_layer_has_come_first() -> None:
    model, layer = build("llama").double(), mxd().double()
    kept = [Edit(latents=(3,), operation=Set(amount=2.0))]
    with steer(model, {1: with_edits(layer, kept)}, {1: [Edit(latents=(3,), operation=Scale(factor=2.0))]}):
        both = logits(model)
    with replace_mlp(model, {1: with_edits(layer, [Edit(latents=(3,), operation=Set(amount=4.0))])}):
        torch.testing.assert_close(logits(model), both, rtol=1e-12, atol=1e-12)


def test_positions_need_the_tokens_and_edits_a_layer() -> None:
    model, layer = build("llama"), mxd()
    with (
        pytest.raises(ValueError, match=r"layers that are given, \[1\]; got some for \[2\]"),
        steer(model, {1: layer}, {2: EDITS}),
    ):
        pass
    with steer(model, {1: layer}, {1: EDITS}), pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        model()
    assert forwards(model) == []


def test_positions_without_a_mask_are_counted_from_the_cache() -> None:
    model, ids = build("gpt2"), torch.arange(3, 13).reshape(2, 5)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert positions_of(2, 3, {}).tolist() == [[0, 1, 2]] * 2
    assert positions_of(2, 1, {"past_key_values": cache}).tolist() == [[5]] * 2
    assert positions_of(2, 1, {"past_key_values": cache, "position_ids": torch.tensor([[3]])}).tolist() == [[3]] * 2
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions_of(2, 4, {"attention_mask": mask}).tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert positions_of(2, 1, {"attention_mask": mask, "past_key_values": cache}).tolist() == [[1], [3]]
