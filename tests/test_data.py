import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mxd.data.documents import Document, text_document
from mxd.data.holdout import is_held_out
from mxd.data.text import HubText, LocalText, TextSource
from mxd.data.tokenization import cached_training_tokens
from mxd.data.tokens import (
    LocalTokens,
    StreamedTokens,
    TokenPosition,
    TokenStream,
    content_positions,
    held_out_contexts,
    open_tokens,
    special_tokens,
)


class CountingTokenizer(PreTrainedTokenizerFast):
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def byte_tokenizer(bos: str | None = None, eos: str | None = None, pad: str | None = None) -> CountingTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = sorted({token for token in (bos, eos, pad) if token})
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet + specials)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.enable_truncation(4)
    return CountingTokenizer(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=8,
        clean_up_tokenization_spaces=False,
    )


def token_ids(tokenizer: CountingTokenizer, *tokens: str) -> list[int]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


PLAIN = byte_tokenizer()
BOTH = byte_tokenizer("<s>", "</s>", "<pad>")
SAME = byte_tokenizer("<|end|>", "<|end|>")
TOKENIZERS = st.sampled_from([PLAIN, BOTH, SAME])
VOCABULARY = 300

STORIES = [f"{n}: {'é' if n % 3 else 'snow ❄ '}" * (1 + n % 5) for n in range(120)]


def stories() -> LocalText:
    return LocalText(["stories"], (text_document(story, 0) for story in STORIES))


def numbered_documents(lengths: list[int]) -> LocalText:
    documents = [Document(str(n), "", (n,) * length, n) for n, length in enumerate(lengths)]
    return LocalText(["numbers"], documents)


def joined(source: TextSource, tokenizer: CountingTokenizer, *, held_out: bool) -> list[int]:
    separator = tokenizer.bos_token or tokenizer.eos_token
    end = [] if separator is None else token_ids(tokenizer, str(separator))
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    return [
        token
        for document in source.documents(held_out=held_out)
        for token in [*backend.encode(document.text, add_special_tokens=False).ids, *end]
    ]


def streamed(source: TextSource, tokenizer: CountingTokenizer | None = BOTH, *, context: int = 16) -> StreamedTokens:
    return StreamedTokens(source, tokenizer, context=context, vocab_size=VOCABULARY, batch_tokens=1)


@given(st.integers(4, 200), st.integers(2, 12), st.booleans(), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_is_the_text_cut_from_an_offset_in_another_order(
    num_tokens: int, context: int, with_bos: bool, seed: int, epoch: int
) -> None:
    bos = 777 if with_bos else None
    body = context - with_bos
    if num_tokens < body:
        return
    stream = LocalTokens(np.arange(num_tokens), context=context, bos=bos, seed=seed)
    stream.restore(TokenPosition(epoch, 0))
    contexts: list[list[int]] = []
    while stream.epoch == epoch:
        contexts += stream.take(1).tolist()
    assert all(len(row) == context and (not with_bos or row[0] == bos) for row in contexts)
    text = [token for row in sorted(contexts, key=lambda row: row[-1]) for token in row[int(with_bos) :]]
    assert text == list(range(text[0], text[0] + len(text)))
    assert text[0] < body
    assert num_tokens - text[-1] - 1 < body
    assert stream.state() == TokenPosition(epoch + 1, 0)


def test_epochs_reshuffle_and_seeds_differ() -> None:
    def epochs(seed: int) -> list[list[list[int]]]:
        stream = LocalTokens(np.arange(640), context=11, bos=0, seed=seed)
        return [stream.take(63).tolist() for _ in range(3)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first == again
    orders = [first[0], first[1], first[2], other[0]]
    assert all(orders[a] != orders[b] for a in range(4) for b in range(a))
    assert first[0] != sorted(first[0])


def test_epochs_for_counts_the_tokens_that_begin_contexts() -> None:
    stream = LocalTokens(np.arange(100), context=11, bos=0, seed=0)
    assert stream.epochs_for(220) == 2
    assert streamed(stories()).epochs_for(220) is None


@settings(max_examples=25, deadline=None)
@given(TOKENIZERS, st.integers(2, 40), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_streamed_text_is_read_in_order_and_again(
    tokenizer: CountingTokenizer, context: int, counts: list[int]
) -> None:
    stream = streamed(stories(), tokenizer, context=context)
    contexts = torch.cat([stream.take(count) for count in counts])
    assert contexts.shape == (sum(counts), context)
    if stream.bos is not None:
        assert set(contexts[:, 0].tolist()) == {stream.bos}
        contexts = contexts[:, 1:]
    tokens = joined(stories(), tokenizer, held_out=False)
    repeats = contexts.numel() // len(tokens) + 1
    assert contexts.flatten().tolist() == (tokens * repeats)[: contexts.numel()]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["local", "streamed"]), st.integers(1, 60), st.integers(1, 60), st.integers(2, 40))
def test_a_restored_stream_goes_on_as_if_never_interrupted(kind: str, before: int, after: int, context: int) -> None:
    tokens = np.array(joined(stories(), BOTH, held_out=False))

    def open_stream() -> TokenStream:
        if kind == "local":
            return LocalTokens(tokens, context=context, bos=1, seed=3)
        return streamed(stories(), context=context)

    stream = open_stream()
    stream.take(before)
    state = json.loads(json.dumps(stream.state()._asdict()))
    expected, expected_state = stream.take(after), stream.state()
    for fresh in (open_stream(), stream):
        fresh.restore(TokenPosition(**state))
        assert torch.equal(fresh.take(after), expected)
        assert fresh.state() == expected_state


def test_a_hub_dataset_is_restored_by_skipping(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"text": story}) for story in STORIES)
    (tmp_path / "train.jsonl").write_text(rows, encoding="utf-8")
    source = HubText(str(tmp_path))
    stream = open_tokens(source, BOTH, context=32, batch_tokens=64, vocab_size=VOCABULARY, seed=0)
    assert isinstance(stream, StreamedTokens)
    whole = [stream.take(5) for _ in range(40)]
    assert stream.epoch >= 1
    for batch in (1, 13, 30):
        fresh = streamed(source, context=32)
        for _ in range(batch):
            fresh.take(5)
        resumed = streamed(source, context=32)
        resumed.restore(fresh.state())
        assert torch.equal(resumed.take(5), whole[batch])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=60, max_size=250))
def test_training_and_held_out_tokens_share_no_document(lengths: list[int]) -> None:
    source = numbered_documents(lengths)
    held_out = {n for n in range(len(lengths)) if is_held_out(str(n))}
    stream = StreamedTokens(source, None, context=2, vocab_size=10**6, batch_tokens=1)
    seen: set[int] = set()
    while stream.epoch == 0:
        seen |= set(stream.take(1).flatten().tolist())
    assert seen == set(range(len(lengths))) - held_out
    if sum(lengths[n] for n in held_out) >= 2:
        evaluation = held_out_contexts(source, None, context=2, num_tokens=10**4, vocab_size=10**6)
        assert set(evaluation.contexts.flatten().tolist()) <= held_out
        assert evaluation.num_bytes is None


@pytest.mark.parametrize("tokenizer", [PLAIN, BOTH, SAME])
@pytest.mark.parametrize("num_tokens", [40, 100, 10**6])
def test_held_out_contexts_are_in_order_without_repetition(tokenizer: CountingTokenizer, num_tokens: int) -> None:
    source = stories()
    packed = held_out_contexts(source, tokenizer, context=20, num_tokens=num_tokens, vocab_size=VOCABULARY)
    with_bos = tokenizer.bos_token is not None
    expected = joined(source, tokenizer, held_out=True)
    text = packed.contexts[:, int(with_bos) :].flatten().tolist()
    assert text == expected[: len(text)]
    assert len(packed.contexts) == min(num_tokens // 20, len(expected) // (20 - with_bos))
    if with_bos:
        content = [token for token in text if token < 256]
        decoded = tokenizer.backend_tokenizer.decode(content)
        assert packed.num_bytes is not None
        assert packed.num_bytes == len(decoded.encode())
        assert abs(packed.num_bytes - len(content)) <= 2


def test_scored_bytes_leave_out_the_first_token_where_no_bos_precedes_it() -> None:
    letters = LocalText(["letters"], [text_document("abcdefghij" * 4, 0, identity="x")], ["x"])
    packed = held_out_contexts(letters, PLAIN, context=10, num_tokens=40, vocab_size=VOCABULARY)
    assert packed.num_bytes == 4 * 9
    packed = held_out_contexts(letters, BOTH, context=11, num_tokens=44, vocab_size=VOCABULARY)
    assert packed.num_bytes == 4 * 10


def test_content_is_everything_but_bos_padding_and_what_begins_a_context() -> None:
    bos, eos, pad = token_ids(BOTH, "<s>", "</s>", "<pad>")
    contexts = torch.tensor([[bos, 5, eos, 6], [bos, 7, pad, pad]])
    mask = content_positions(contexts, special_tokens(BOTH))
    assert mask.tolist() == [[False, True, True, True], [False, True, False, False]]
    (same,) = token_ids(SAME, "<|end|>")
    contexts = torch.tensor([[same, 5, same, 6]])
    assert content_positions(contexts, special_tokens(SAME)).tolist() == [[False, True, False, True]]
    # Whatever begins a context is one to a model without BOS.
    assert content_positions(contexts, special_tokens(PLAIN)).tolist() == [[False, True, True, True]]
    assert special_tokens(None) == frozenset()


def test_a_bos_or_eos_of_pretokenised_documents_is_not_doubled() -> None:
    bos, eos = token_ids(BOTH, "<s>", "</s>")
    documents = [Document("a", "", (bos, 5, 6, eos), 0), Document("b", "", (7,), 1), Document("c", "", (bos,), 2)]
    stream = streamed(LocalText(["ids"], documents), context=7)
    assert stream.take(1).tolist() == [[bos, 5, 6, bos, 7, bos, bos]]


def test_tokens_are_cached_by_content(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("<s>", "</s>")

    def calls_for(*texts: str, using: CountingTokenizer = tokenizer) -> int:
        before = CountingTokenizer.calls
        source = LocalText(["memory"], (text_document(text, 0) for text in texts))
        tokens = cached_training_tokens(source, using, vocab_size=VOCABULARY, cache=tmp_path / "cache")
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == joined(source, using, held_out=False)
        return CountingTokenizer.calls - before

    assert calls_for("some text", "more") == 1
    assert calls_for("some text", "more") == 0
    assert calls_for("some text", "morf") == 1
    assert calls_for("some text", "more", using=byte_tokenizer("<s>")) == 1
    assert calls_for("some text", "more", using=byte_tokenizer("<s>", "</s>")) == 0
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 3
    for file in files:
        file.write_bytes(file.read_bytes()[:-3])
    assert calls_for("some text", "more") == 1


def test_cached_tokens_are_checked_against_each_models_vocabulary(tmp_path: Path) -> None:
    source = LocalText(["ids"], [Document("a", "", (5, 70_000), 0)])
    assert cached_training_tokens(source, None, vocab_size=70_001, cache=tmp_path).tolist() == [5, 70_000]
    with pytest.raises(ValueError, match=r"must lie below 100, the size of the model's vocabulary; the text has 70000"):
        cached_training_tokens(source, None, vocab_size=100, cache=tmp_path)
    with pytest.raises(ValueError, match=r"must lie below 100"):
        held_out_contexts(
            LocalText(["ids"], [Document("a", "", (5, 100), 0)], ["a"]), None, context=2, num_tokens=2, vocab_size=100
        )


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXD_CACHE", str(tmp_path / "here"))
    stream = open_tokens(stories(), BOTH, context=32, batch_tokens=64, vocab_size=VOCABULARY, seed=0)
    assert isinstance(stream, LocalTokens)
    assert len(list((tmp_path / "here").iterdir())) == 1
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"must be a folder that can be written.*MXD_CACHE"):
        cached_training_tokens(stories(), BOTH, vocab_size=VOCABULARY, cache=tmp_path / "file" / "below")


def test_tokenising_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached_training_tokens(stories(), byte_tokenizer(), vocab_size=VOCABULARY, cache=tmp_path)
    assert not caplog.records


def test_text_that_is_too_short(tmp_path: Path) -> None:
    sentence = r"text with too few tokens for one batch: \d+. Give more text"
    short = LocalText(["short"], [text_document("some short text", 0)])
    with pytest.raises(ValueError, match=sentence):
        open_tokens(short, BOTH, context=4, batch_tokens=400, vocab_size=VOCABULARY, seed=0, cache=tmp_path)
    with pytest.raises(ValueError, match=sentence):
        StreamedTokens(short, BOTH, context=4, vocab_size=VOCABULARY, batch_tokens=400).take(100)
    with pytest.raises(ValueError, match=r"must fill one context of 40 tokens; it holds 16"):
        open_tokens(short, BOTH, context=40, batch_tokens=0, vocab_size=VOCABULARY, seed=0, cache=tmp_path)
    with pytest.raises(ValueError, match=r"held-out documents of short must fill one context of 4 tokens; they hold 0"):
        held_out_contexts(short, BOTH, context=4, num_tokens=100, vocab_size=VOCABULARY)
    only_held_out = LocalText(["short"], [text_document("text", 0, identity="x")], ["x"])
    with pytest.raises(ValueError, match=sentence):
        open_tokens(only_held_out, BOTH, context=4, batch_tokens=4, vocab_size=VOCABULARY, seed=0, cache=tmp_path)


def test_other_requests_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens; got 1"):
        streamed(stories(), context=1)
    with pytest.raises(ValueError, match="Ask for more tokens"):
        held_out_contexts(stories(), BOTH, context=64, num_tokens=63, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="must come with the model's tokenizer"):
        streamed(stories(), None).take(1)
    stream = LocalTokens(np.arange(30), context=10, bos=None, seed=0)
    with pytest.raises(ValueError, match="Resume with the text"):
        stream.restore(TokenPosition(0, 3))
    held_out_row = next(n for n, story in enumerate(STORIES) if is_held_out(story))
    with pytest.raises(ValueError, match=f"Row {held_out_row} of stories must be the training document"):
        streamed(stories()).restore(TokenPosition(0, held_out_row, 2))


def test_importing_the_package_imports_no_heavy_dependency() -> None:
    code = "import sys, mxd.data.tokens; assert not {'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
