"""Text becomes the tokens of its characters and nothing else, and comes back with all of them."""

import os
import stat
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxd.data.documents import Document, text_document
from mxd.data.text import LocalText
from mxd.data.tokenization import cached_training_tokens, decode_tokens, encode_texts, encoded_documents, token_pieces
from mxd.data.tokens import StreamedTokens, content_positions, held_out_contexts, open_tokens, special_tokens
from mxd.probing.alignment import tokenize_texts
from tests.test_data import BOTH, SAME, VOCABULARY, CountingTokenizer, byte_tokenizer, stories

NAMES = st.sampled_from(["<s>", "</s>", "<pad>", "<|end|>", "cat", " ", "é"])


@settings(deadline=None, max_examples=40)
@given(words=st.lists(NAMES, min_size=1, max_size=8), tokenizer=st.sampled_from([BOTH, SAME]))
def test_a_special_token_that_is_written_in_a_text_is_text(words: list[str], tokenizer: CountingTokenizer) -> None:
    text = "".join(words)
    (ids,) = encode_texts(tokenizer, [text])["input_ids"]
    assert len(ids) == len(text.encode())
    assert not special_tokens(tokenizer) & set(ids)
    assert decode_tokens(tokenizer, ids) == text
    assert "".join(next(token_pieces(tokenizer, [ids]))) == text
    (encoded,) = encoded_documents([text_document(text, 0)], tokenizer, VOCABULARY)
    assert encoded.ids.tolist() == [*ids, tokenizer.bos_token_id]
    (aligned,) = tokenize_texts(tokenizer, [text])
    assert aligned.ids.tolist() == ids


def test_held_out_text_that_names_special_tokens_is_content_to_the_last_byte() -> None:
    texts = [f"document {n} ends here.</s><s><pad>" for n in range(30)]
    source = LocalText(["texts"], (text_document(text, 0) for text in texts), texts)
    packed = held_out_contexts(source, BOTH, context=20, num_tokens=200, vocab_size=VOCABULARY)
    content = content_positions(packed.contexts, special_tokens(BOTH))[:, 1:]
    separators = packed.contexts[:, 1:].flatten().tolist().count(BOTH.bos_token_id)
    assert packed.num_bytes == int(content.sum()) == content.numel() - separators


@pytest.mark.parametrize("bos", ["<s>", None])
def test_bytes_are_counted_with_the_spaces_that_decoding_may_clean_up(bos: str | None) -> None:
    tokenizer = byte_tokenizer(bos, "</s>")
    tokenizer.clean_up_tokenization_spaces = True
    # Newer versions of transformers clean up behind BPE only where this is set as well.
    vars(tokenizer)["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = True
    text = "he said , that it 's not . "
    assert len(str(tokenizer.decode(encode_texts(tokenizer, [text])["input_ids"][0]))) < len(text)
    source = LocalText(["text"], [text_document(text, 0, identity="x")], ["x"])
    length = len(text) + (bos is not None)
    packed = held_out_contexts(source, tokenizer, context=length, num_tokens=length, vocab_size=VOCABULARY)
    assert packed.num_bytes == len(text) - (bos is None)


@pytest.mark.parametrize("names", [("<s>", "</s>"), (None, "</s>"), ("<s>", None)])
def test_a_separator_outside_the_vocabulary_is_refused_before_anything_is_read(
    tmp_path: Path, names: tuple[str | None, str | None]
) -> None:
    tokenizer, ids = byte_tokenizer(*names), [Document(str(n), "", (1, 2, 3), n) for n in range(400)]
    expected = r"must lie below 256, the size of the model's vocabulary; it is 25[67] \('</?s>'\)"
    for source in (stories(), LocalText(["ids"], ids)):
        before = CountingTokenizer.calls
        with pytest.raises(ValueError, match=expected):
            held_out_contexts(source, tokenizer, context=8, num_tokens=8, vocab_size=256)
        with pytest.raises(ValueError, match=expected):
            StreamedTokens(source, tokenizer, context=8, vocab_size=256, batch_tokens=8)
        with pytest.raises(ValueError, match=expected):
            open_tokens(source, tokenizer, context=8, batch_tokens=8, vocab_size=256, seed=0, cache=tmp_path / "cache")
        assert CountingTokenizer.calls == before
        cached_training_tokens(source, tokenizer, vocab_size=VOCABULARY, cache=tmp_path / "known")
        before = CountingTokenizer.calls
        with pytest.raises(ValueError, match=expected):
            cached_training_tokens(source, tokenizer, vocab_size=256, cache=tmp_path / "known")
        assert CountingTokenizer.calls == before
    assert not (tmp_path / "cache").exists()


def test_cached_tokens_reach_the_disk_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        done.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    cached_training_tokens(stories(), BOTH, vocab_size=VOCABULARY, cache=tmp_path)
    assert done == ["file", "name", "folder"]
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_tokens_that_cannot_be_written_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: IO[bytes], tokens: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ValueError, match=r"is not \(No space left on device\)"):
        cached_training_tokens(stories(), BOTH, vocab_size=VOCABULARY, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before
