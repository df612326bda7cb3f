"""Codes of texts in Python, against the model run on one text at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mxd
from mxd.evaluation.collect import LatentStatistics
from mxd.layers import SelectionName, SparseCode, SparseLayer
from tests.tiny_model import BOS, D_MODEL

TEXTS = ["the cat sees a bird", "", "é 🎉\n\t one", "a" * 150, "x", "river and tree " * 9]


@pytest.fixture(scope="module")
def lm(llama: Path) -> mxd.LanguageModel:
    return mxd.load_language_model(str(llama))


def transcoder(selection: SelectionName = "topk") -> SparseLayer:
    config = mxd.TranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, num_latents=40, k=3, selection=selection)
    layer = mxd.Transcoder(config, torch.Generator().manual_seed(0)).eval()
    layer.provenance = mxd.Provenance(layer=1)
    for buffer in layer.selection.buffers():
        buffer.fill_(0.2)
    return layer


def autoencoder() -> SparseLayer:
    return mxd.TopKAutoencoder(mxd.TopKAutoencoderConfig(d_in=D_MODEL, num_latents=40, k=3)).eval()


def expected(lm: mxd.LanguageModel, layer: SparseLayer, text: str, context: int, block: int = 1) -> Tensor:
    """Return the dense code of a text, context by context."""
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    body = context - 1
    rows: list[Tensor] = [torch.zeros(0, layer.num_latents)]
    for first in range(0, len(ids), body):
        begun = torch.tensor([[lm.tokenizer.bos_token_id, *ids[first : first + body]]])
        x = layer.given(*mxd.mlp_pairs(lm.module, begun, [block])[block])[0, 1:]
        rows.append(layer.encode(x).dense(layer.num_latents))
    return torch.cat(rows).detach()


def dense(code: SparseCode, num_latents: int = 40) -> Tensor:
    return code.dense(num_latents)


@pytest.mark.parametrize("selection", ["topk", "batch-topk", "l1"])
def test_codes_are_those_of_each_text_by_itself(lm: mxd.LanguageModel, selection: SelectionName) -> None:
    layer = transcoder(selection)
    found = mxd.codes(lm, layer, TEXTS, batch_tokens=200)
    assert len(found) == len(TEXTS)
    for text, one in zip(TEXTS, found, strict=True):
        assert one.code.values.shape == one.code.indices.shape
        assert selection != "topk" or one.code.values.shape == (len(one.ids), 3)
        torch.testing.assert_close(dense(one.code), expected(lm, layer, text, context=64), rtol=1e-4, atol=1e-5)
    for other in (mxd.codes(lm, layer, TEXTS, batch_tokens=1), mxd.codes(lm, layer, TEXTS)):
        for one, same in zip(found, other, strict=True):
            torch.testing.assert_close(dense(same.code), dense(one.code), rtol=1e-4, atol=1e-5)


def test_tokens_come_with_their_characters(lm: mxd.LanguageModel) -> None:
    for text, found in zip(TEXTS, mxd.codes(lm, transcoder(), TEXTS), strict=True):
        assert "".join(found.pieces) == text
        assert found.ids.tolist() == lm.tokenizer(text, add_special_tokens=False).input_ids
        assert found.offsets is not None
        assert len(found.pieces) == len(found.offsets) == len(found.ids)
        for piece, (start, end) in zip(found.pieces, found.offsets, strict=True):
            assert piece in ("", text[start:end])
    [special] = mxd.codes(lm, transcoder(), f"a{BOS}b")
    assert "".join(special.pieces) == f"a{BOS}b"
    assert lm.tokenizer.bos_token_id not in special.ids


def test_one_text_and_a_shorter_context(lm: mxd.LanguageModel) -> None:
    layer = transcoder()
    [found] = mxd.codes(lm, layer, TEXTS[3], context=10)
    torch.testing.assert_close(dense(found.code), expected(lm, layer, TEXTS[3], context=10), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dense(found.code), expected(lm, layer, TEXTS[3], context=64), rtol=1e-2, atol=1e-2)


def test_an_autoencoder_is_given_the_output_and_any_block_may_be_named(lm: mxd.LanguageModel) -> None:
    layer = autoencoder()
    [found] = mxd.codes(lm, layer, TEXTS[0], block=0)
    wanted = expected(lm, layer, TEXTS[0], context=64, block=0)
    torch.testing.assert_close(dense(found.code), wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_in_training_learns_no_threshold_from_what_is_read(lm: mxd.LanguageModel) -> None:
    layer = transcoder("batch-topk").train()
    before = layer.selection.get_buffer("threshold").clone()
    mxd.codes(lm, layer, TEXTS)
    assert torch.equal(layer.selection.get_buffer("threshold"), before)
    assert layer.training


def test_a_bfloat16_layer_and_float32_activations(lm: mxd.LanguageModel) -> None:
    [found] = mxd.codes(lm, transcoder().to(torch.bfloat16), TEXTS[0])
    assert found.code.values.dtype == torch.bfloat16


@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_statistics_are_those_of_the_codes(lm: mxd.LanguageModel, batch_tokens: int) -> None:
    layer = transcoder()
    found = mxd.latent_statistics(lm, layer, iter(TEXTS), contexts_kept=2, batch_tokens=batch_tokens)
    codes = [expected(lm, layer, text, context=64) for text in TEXTS]
    everything = torch.cat(codes)
    assert found.num_tokens == len(everything)
    assert torch.equal(found.firings, (everything > 0).sum(0))
    torch.testing.assert_close(found.maxima, everything.amax(0), rtol=1e-4, atol=1e-5)
    latent = int(everything.sum(0).argmax())
    best = sorted(((float(code[:, latent].max()), number) for number, code in enumerate(codes) if len(code)))[::-1]
    top = found.top_contexts(latent)
    assert [entry.context for entry in top] == [number for _, number in best[:2]]
    for entry in top:
        value = codes[entry.context][entry.position, latent]
        torch.testing.assert_close(torch.tensor(entry.value), value, rtol=1e-4, atol=1e-5)
        assert value >= codes[entry.context][:, latent].max() - 1e-5


def test_without_a_token_that_begins_contexts_their_first_does_not_count(llama: Path) -> None:
    lm = mxd.load_language_model(str(llama))
    tokenizer: Any = lm.tokenizer
    tokenizer.bos_token = None
    layer = transcoder()
    [found] = mxd.codes(lm, layer, TEXTS[0])
    x = mxd.mlp_pairs(lm.module, found.ids[None], [1])[1].x[0]
    torch.testing.assert_close(dense(found.code), layer.encode(x).dense(40), rtol=1e-4, atol=1e-5)
    statistics = mxd.latent_statistics(lm, layer, [TEXTS[3]])
    assert statistics.num_tokens == 150 - 3  # contexts of 64 begin at 0, 64 and 128
    assert isinstance(statistics, LatentStatistics)


def test_what_cannot_be_read_is_said(lm: mxd.LanguageModel) -> None:
    layer, untyped = transcoder(), mxd.__dict__
    with pytest.raises(ValueError, match="does not say whose MLP it stands for: give block"):
        mxd.codes(lm, autoencoder(), "a")
    with pytest.raises(ValueError, match="in the block whose MLP it was trained on, 1; got block 0"):
        mxd.codes(lm, layer, "a", block=0)
    assert len(mxd.codes(lm, layer, "a", block=0, allow_misplaced=True)) == 1
    with pytest.raises(ValueError, match="context must leave room for a token"):
        mxd.codes(lm, layer, "a", context=1)
    with pytest.raises(ValueError, match="context must be at most 64, the model's number of positions; got 65"):
        mxd.codes(lm, layer, "a", context=65)
    narrow = mxd.Transcoder(mxd.TranscoderConfig(d_in=8, d_out=8, num_latents=9, k=3))
    with pytest.raises(ValueError, match=r"\(d_in, d_out\) = \(16, 16\); got \(8, 8\)"):
        mxd.codes(lm, narrow, "a", block=1)
    with pytest.raises(TypeError):
        untyped["codes"](lm.model, layer, "a")
    with pytest.raises(TypeError):
        untyped["latent_statistics"](lm, layer, [[1, 2]])
