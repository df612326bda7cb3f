import ast
import io
import tokenize
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxd.models import load_tokenizer
from mxd.probing.alignment import TokenizedText, token_labels, tokenize_texts
from mxd.probing.examples import Span, Unlabelled
from mxd.probing.python_concepts import python_spans
from tests import tiny_model

SOURCE = '''"""Doc é."""
import os
from a.b import c  # why
@dec(1)
class Foo(Base):
    x: int = 3
    def bar(self, y: str = "é", *a) -> None:
        """D."""
        if y == "ü" and len(a) > 3:
            for i in a:
                raise ValueError(f"a{len(y)}b", k=1)
        try: pass
        except KeyError: return [z + 1 for z in a[1:]]
'''

EXPECTED = {
    "docstring": ['"""Doc é."""', '"""D."""'],
    "import": ["import os", "from a.b import c"],
    "comment": ["# why"],
    "decorator": ["dec(1)"],
    "class name": ["Foo"],
    "function name": ["bar"],
    "self": ["self"],
    "type annotation": ["int", "None", "str"],
    "parameter": ["a", "self", "y"],
    "string": ['"""D."""', '"""Doc é."""', '"é"', '"ü"', 'f"a{len(y)}b"'],
    "number": ["1", "1", "1", "1", "3", "3"],
    "constant": ["None"],
    "comparison": ["==", ">"],
    "arithmetic operator": ["*", "+"],
    "exception class": ["KeyError", "ValueError"],
    "caught exception": ["KeyError"],
    "raise": ['raise ValueError(f"a{len(y)}b", k=1)'],
    "return statement": ["return [z + 1 for z in a[1:]]"],
    "comprehension": ["[z + 1 for z in a[1:]]"],
    "condition": ['y == "ü" and len(a) > 3'],
    "keyword argument": ["k=1"],
    "index": ["1:"],
    "attribute": ["b"],
    "builtin": ["int", "len", "str"],
    "def": ["def"],
    "if": ["if"],
    "in": ["in", "in"],
    "return": ["return"],
    "assigned to": ["x"],
    "called function": ["ValueError", "dec", "len"],
    "deeply nested": ["for i in a:", 'raise ValueError(f"a{len(y)}b", k=1)'],
}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_parts_of_a_source_are_labelled_as_python_reads_them(ending: str) -> None:
    text = SOURCE.replace("\n", ending)
    found: dict[str, list[str]] = {}
    for span in set(python_spans(text)):
        found.setdefault(span.label, []).append(text[span.start : span.end])
    for concept, parts in EXPECTED.items():
        assert sorted(found[concept]) == sorted(parts), concept
    assert len(found["keyword"]) == 16
    assert len(found) >= 30


def test_every_token_of_a_module_of_python_lies_where_it_says() -> None:
    text = Path(ast.__file__).read_text(encoding="utf-8")
    spans = python_spans(text)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    comments = sorted({text[span.start : span.end] for span in spans if span.label == "comment"})
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    assert comments == sorted({token.string for token in tokens if token.type == tokenize.COMMENT})
    names = {text[span.start : span.end] for span in spans if span.label == "function name"}
    assert {"literal_eval", "walk", "parse"} <= names
    docstrings = [text[span.start : span.end] for span in spans if span.label == "docstring"]
    defined = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    assert len(set(docstrings)) == len({ast.get_docstring(node) for node in defined} - {None})


@pytest.mark.parametrize("text", ["def f(:", "x = (", "\x00", "  x\n y", "print 'a'", "(" * 5000])
def test_what_is_no_python_is_left_out(text: str) -> None:
    with pytest.raises(Unlabelled, match="must be Python source"):
        python_spans(text)


def naive_labels(tokens: TokenizedText, spans: list[Span], concept: str) -> list[bool]:
    held = {place for span in spans if span.label == concept for place in range(span.start, span.end)}
    return [
        0 < 2 * len(held & set(range(start, end))) >= end - start
        for start, end in zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True)
    ]


spans = st.lists(
    st.tuples(st.integers(0, 29), st.integers(1, 30), st.sampled_from(["a", "b", "other"])).filter(
        lambda span: span[0] < span[1]
    ),
    max_size=6,
)


@given(spans, st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=12))
def test_a_token_bears_a_label_that_holds_half_of_its_characters(
    found: list[tuple[int, int, str]], places: list[tuple[int, int]]
) -> None:
    starts = np.array([start for start, _ in places], dtype=np.int64)
    ends = np.array([min(start + length, 30) for start, length in places], dtype=np.int64)
    tokens = TokenizedText(np.zeros(len(places), dtype=np.int64), starts, ends)
    given_spans = [Span(*span) for span in found]
    bearing = token_labels(tokens, given_spans)
    for concept in ("a", "b", "other"):
        assert (
            bearing.get(concept, np.array([])).tolist()
            == np.flatnonzero(naive_labels(tokens, given_spans, concept)).tolist()
        )


def test_tokens_of_the_bundled_model_bear_the_labels_of_their_characters() -> None:
    tokenizer = load_tokenizer("bundled")
    [tokens] = tokenize_texts(tokenizer, [SOURCE])
    bearing = token_labels(tokens, python_spans(SOURCE))
    found = {
        concept: [str(tokenizer.decode([token])) for token in tokens.ids[bearing[concept]].tolist()]
        for concept in ("def", "function name", "comment", "indentation")
    }
    assert [token.strip() for token in found["def"]] == ["def"]
    assert "".join(found["function name"]).strip() == "bar"
    assert "".join(found["comment"]).strip() == "# why"
    assert all(token.isspace() for token in found["indentation"])


def test_white_space_at_a_tokens_ends_stands_for_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model.write_model(tmp_path / "model")))
    [tokens, empty] = tokenize_texts(tokenizer, ["a é b", ""])
    assert [(int(start), int(end)) for start, end in zip(tokens.starts, tokens.ends, strict=True)] == [
        (0, 1),
        (1, 2),
        (2, 3),
        (2, 3),
        (3, 4),
        (4, 5),
    ]
    assert len(empty.ids) == 0
