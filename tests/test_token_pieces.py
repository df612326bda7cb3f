"""What each token adds to a text, with tokenizers that take away the space with which a text begins."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rules
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mxd.data.tokenization import Tokenizer, token_pieces
from mxd.judge.examples import Piece, marked
from mxd.models import load_tokenizer
from tests import tiny_model

SPACED: hf.PreTrainedTokenizerFast = tiny_model.spaced_tokenizer()
STORIES = Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K"


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(tiny_model.write_model(tmp_path_factory.mktemp("model"))))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert isinstance(ids, list)
    return ids


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    [pieces] = token_pieces(tokenizer, [ids])
    assert len(pieces) == len(ids)
    return pieces


def test_words_keep_the_space_that_sentencepiece_gives_them() -> None:
    ids = ids_of(SPACED, "the red cat.")
    assert [SPACED.decode([token]) for token in ids] == ["the", "red", "cat", "."]
    assert pieces_of(SPACED, ids) == [" the", " red", " cat", "."]
    number = SPACED.get_vocab()
    assert list(token_pieces(SPACED, [[number["the"]], [number["▁the"]]])) == [["the"], [" the"]]
    bos = SPACED.bos_token_id
    assert isinstance(bos, int)
    assert pieces_of(SPACED, [bos, *ids[1:]]) == [tiny_model.BOS, " red", " cat", "."]


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from(["the", "cat", "é", "🎉", " ", "in", "x."]), min_size=1, max_size=12).map("".join))
def test_pieces_join_to_the_text(bytewise: Tokenizer, text: str) -> None:
    assert "".join(pieces_of(bytewise, ids_of(bytewise, text))) == text
    ids = ids_of(SPACED, text)
    before = ids_of(SPACED, "dog")
    assert "".join(pieces_of(SPACED, ids)) == SPACED.decode([*before, *ids])[len("dog") :]


def test_a_character_of_several_tokens_is_the_piece_of_the_last(bytewise: Tokenizer) -> None:
    for tokenizer in (SPACED, bytewise):
        ids = ids_of(tokenizer, "in🎉x")
        pieces = pieces_of(tokenizer, ids)
        place = pieces.index("🎉")
        assert pieces[place - 3 : place] == ["", "", ""]
        assert pieces[place + 1 :] == ["x"]
        cut = pieces_of(tokenizer, ids[: place - 1])
        assert cut[-2] == ""
        assert set(cut[-1]) == {"\ufffd"}
        # A sequence may begin within a character.
        begun = pieces_of(tokenizer, [*ids[place - 1 : place + 1], *ids[place + 1 :], *ids])
        assert begun[0] == ""
        assert set(begun[1]) == {"\ufffd"}
        assert begun[2:] == ["x", *pieces]
        # A vocabulary is read a token at a time.
        assert pieces_of(tokenizer, ids[place : place + 1]) == ["\ufffd"]
    begins = ids_of(bytewise, "🎉")[:1]
    broken = pieces_of(bytewise, [*begins * 100, *ids_of(bytewise, "x")])
    assert "".join(broken) == "\ufffd" * 100 + "x"
    assert sum(piece != "" for piece in broken) > 5


GPT1: hf.PreTrainedTokenizerFast = tiny_model.suffixed_tokenizer()
CLIP: hf.PreTrainedTokenizerFast = tiny_model.suffixed_tokenizer(bytewise=True)
BERT = Rules(
    models.WordPiece(
        vocab={token: n for n, token in enumerate(["[UNK]", "a", "the", "cat", "##s", "##at", "c", ".", "'", "t"])},
        unk_token="[UNK]",
    )
)
BERT.normalizer, BERT.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
BERT.decoder = decoders.WordPiece(prefix="##", cleanup=True)
WORDPIECES: hf.PreTrainedTokenizerFast = hf.PreTrainedTokenizerFast(tokenizer_object=BERT, unk_token="[UNK]")


@pytest.mark.parametrize("tokenizer", [GPT1, CLIP], ids=["gpt-1", "clip"])
def test_a_token_that_ends_a_word_has_the_space_behind_it(tokenizer: hf.PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer, "the cat cats the.")
    assert tokenizer.convert_ids_to_tokens(ids) == ["the</w>", "cat</w>", "ca", "t", "s</w>", "the</w>", ".</w>"]
    assert pieces_of(tokenizer, ids) == ["the ", "cat ", "ca", "t", "s ", "the ", ". "]
    # Alone, as a vocabulary is read, a token is what it is in a text.
    assert list(token_pieces(tokenizer, [[token] for token in ids])) == [[piece] for piece in pieces_of(tokenizer, ids)]
    bos = tokenizer.bos_token_id
    assert isinstance(bos, int)
    assert pieces_of(tokenizer, [bos, ids[2], ids[1]]) == [tiny_model.BOS, "ca", "cat "]


def test_a_character_of_bytes_that_ends_a_word_is_whole() -> None:
    ids = ids_of(CLIP, "cat é the</w>")
    assert "".join(pieces_of(CLIP, ids)).startswith("cat é the ")
    assert pieces_of(CLIP, ids)[1:3] == ["", "é "]
    # What a person typed stays.
    assert "".join(pieces_of(CLIP, ids_of(CLIP, "a</w>"))).replace(" ", "") == "a</w>"


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.sampled_from(["the", "cat", "cats", "te", "hat", "x"]), min_size=1, max_size=8))
def test_words_with_an_end_join_to_the_text(words: list[str]) -> None:
    for tokenizer in (GPT1, CLIP):
        assert "".join(pieces_of(tokenizer, ids_of(tokenizer, " ".join(words)))) == " ".join(words) + " "


def test_word_pieces_join_to_words() -> None:
    ids = ids_of(WORDPIECES, "The cats sat. Cat")
    assert WORDPIECES.convert_ids_to_tokens(ids) == ["the", "cat", "##s", "[UNK]", ".", "cat"]
    assert pieces_of(WORDPIECES, ids) == [" the", " cat", "s", " [UNK]", ".", " cat"]
    number = WORDPIECES.get_vocab()
    assert list(token_pieces(WORDPIECES, [[number["##at"]], [number["cat"]]])) == [["at"], [" cat"]]


def test_each_token_is_decoded_once_however_long_the_text_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_model.spaced_tokenizer()
    ids = ids_of(tokenizer, "the red cat sees the red dog " * 20)
    expected = pieces_of(tokenizer, ids)
    calls: list[object] = []
    decode = tokenizer.decode

    def counted(tokens: list[int], **options: bool) -> object:
        calls.append(tokens)
        return decode(tokens, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    assert list(token_pieces(tokenizer, [ids, ids])) == [expected, expected]
    assert len(calls) <= len(set(ids)) + 1


def test_marks_of_a_judge_keep_spaces_and_whole_characters() -> None:
    ids = ids_of(SPACED, "the red cat in🎉x")
    contexts = torch.tensor([ids])
    piece = Piece(0, 0, len(ids), frozenset({1}), 1.0)
    assert marked(piece, {1, 2}, contexts, SPACED) == " the« red cat» in🎉x"
    first = SPACED.convert_ids_to_tokens(ids).index("<0xF0>")
    assert marked(piece, {first}, contexts, SPACED) == " the red cat in«🎉»x"
    assert marked(piece, {first + 3}, contexts, SPACED) == " the red cat in«🎉»x"


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared/data/models/stories260K is not beside this checkout")
def test_a_real_sentencepiece_tokenizer_keeps_its_spaces() -> None:
    tokenizer = load_tokenizer(str(STORIES))
    text = "Once upon a time, a café 🎉 was there."
    pieces = pieces_of(tokenizer, ids_of(tokenizer, text))
    assert "".join(pieces) == " " + text
    assert pieces[:4] == [" Once", " upon", " a", " time"]
    assert "🎉" in pieces
