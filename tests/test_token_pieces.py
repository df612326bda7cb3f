"""What each token adds to a text, with tokenizers that take away the space with which a text begins."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

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
        # A vocabulary is read a token at a time.
        assert pieces_of(tokenizer, ids[place : place + 1]) == ["\ufffd"]
    begins = ids_of(bytewise, "🎉")[:1]
    broken = pieces_of(bytewise, [*begins * 100, *ids_of(bytewise, "x")])
    assert "".join(broken) == "\ufffd" * 100 + "x"
    assert sum(piece != "" for piece in broken) > 5


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
