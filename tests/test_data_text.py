import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxd.data.documents import GAP, WINDOW, split_text
from mxd.data.holdout import is_held_out
from mxd.data.stdlib import stdlib_modules
from mxd.data.text import Document, HubText, LocalText, TextSource, open_text

TINYSTORIES = Path(__file__).parents[2] / "shared/data/text/tinystories"


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def rows_as_jsonl(rows: list[object]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def all_documents(source: TextSource) -> list[Document]:
    both = [*source.documents(held_out=False), *source.documents(held_out=True)]
    return sorted(both, key=lambda document: document.row)


def texts(*spec: str, text_field: str = "text") -> list[str]:
    return [document.text for document in all_documents(open_text(spec, text_field=text_field))]


def test_a_row_is_a_document_in_every_table_format(tmp_path: Path) -> None:
    stories = ["one\n\ntwo", "three ❄ \u2028 four", "  ", "five"]
    rows: list[object] = [{"text": story, "n": n} for n, story in enumerate(stories)]
    expected = [stories[0], stories[1], stories[3]]
    assert texts(write(tmp_path, "a.jsonl", rows_as_jsonl(rows) + "\n\n")) == expected
    assert texts(write(tmp_path, "a.json", json.dumps(rows))) == expected
    assert texts(write(tmp_path, "b.json", json.dumps(stories))) == expected
    pq.write_table(pa.table({"text": stories, "n": [0, 1, 2, 3]}), tmp_path / "a.parquet")
    assert texts(str(tmp_path / "a.parquet")) == expected


def test_another_text_field_and_rows_without_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", rows_as_jsonl([{"story": "one"}, {"story": None}, {"story": "two"}]))
    assert texts(path, text_field="story") == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n\ntwo\n<|endoftext|>\nthree<|endoftext|>\n", ["one\n\ntwo", "three"]),
        ("\ufeff\none\ntwo\n \t\n\n three\r\n\r\nfour\n", ["one\ntwo", " three", "four"]),
        ("one line", ["one line"]),
    ],
)
def test_a_txt_is_split_at_separators_or_blank_lines(tmp_path: Path, content: str, expected: list[str]) -> None:
    assert [text.lstrip(" ") for text in texts(write(tmp_path, "a.txt", content))] == [t.lstrip(" ") for t in expected]


@given(st.integers(1, 5 * (WINDOW + GAP)))
def test_text_without_any_break_is_cut_into_windows_with_gaps(length: int) -> None:
    text = "".join(chr(0x4E00 + n % 5000) for n in range(length))
    windows = split_text(text)
    for n, window in enumerate(windows):
        start = n * (WINDOW + GAP)
        assert window == text[start : start + WINDOW]
    assert sum(map(len, windows)) >= length - len(windows) * GAP


def test_folders_and_globs_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "two")
    write(tmp_path, "a.txt", "one")
    write(tmp_path, "deep/c.json", '["three"]')
    for name in ("ignored.md", "ignored.gz", "ignored.parquet.gz", ".txt"):
        write(tmp_path, name, "four")
    assert texts(str(tmp_path)) == ["one", "two", "three"]
    assert texts(str(tmp_path / "*.txt")) == ["one", "two"]
    assert texts(str(tmp_path / "**/*.json"), str(tmp_path / "b.txt"), str(tmp_path / "*.txt")) == [
        "three",
        "two",
        "one",
    ]


def test_a_row_whose_token_ids_are_null_has_its_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", rows_as_jsonl([{"input_ids": None, "text": "x"}]))
    (document,) = all_documents(open_text([path]))
    assert document.text == "x"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_rows_whose_token_ids_or_text_are_null_are_left_out(tmp_path: Path, name: str) -> None:
    for field, rows in {"input_ids": [[3, 1], None, [7]], "text": ["one", None, "two"]}.items():
        path = tmp_path / name
        if name.endswith("parquet"):
            pq.write_table(pa.table({field: rows}), path)
        else:
            objects: list[object] = [{field: row} for row in rows]
            path.write_text(rows_as_jsonl(objects) if name == "a.jsonl" else json.dumps(objects))
        found = all_documents(open_text([str(path)]))
        assert [document.ids or document.text for document in found] == [
            tuple(row) if isinstance(row, list) else row for row in rows if row is not None
        ]


def packed_as_zst(content: bytes) -> bytes:
    written = pa.BufferOutputStream()
    with pa.CompressedOutputStream(written, "zstd") as stream:
        stream.write(content)
    return written.getvalue().to_pybytes()


PACKED: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": packed_as_zst}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_packed_files_hold_the_same_documents(tmp_path: Path, name: str, ending: str) -> None:
    content = {"a.txt": b"one\n\ntwo \xe2\x9d\x84", "a.jsonl": b'"one"\n"two"', "a.json": b'["one", "two"]'}[name]
    plain = open_text([write(tmp_path, name, content)])
    # Two parts, one behind the other, are one file to gzip and zstd.
    packed = PACKED[ending](content[:5]) + PACKED[ending](content[5:])
    path = write(tmp_path, f"packed/{name.upper()}.{ending}", packed)
    assert open_text([path]).identity.digest == plain.identity.digest
    assert open_text([str(tmp_path / "packed")]).identity.digest == plain.identity.digest
    for broken in (packed[:-5], b"no such thing"):
        with pytest.raises(ValueError, match=rf"ends in \.{ending} must be packed so; .* Download or pack it again"):
            open_text([write(tmp_path, f"broken.{name}.{ending}", broken)])
    with pytest.raises(ValueError, match="must be UTF-8"):
        open_text([write(tmp_path, f"other.{name}.{ending}", PACKED[ending](b"caf\xe9"))])
    with pytest.raises(FileNotFoundError, match="There is no file"):
        open_text([f"missing.{name}.{ending}"])


def test_a_txt_is_the_same_text_whichever_way_its_lines_end(tmp_path: Path) -> None:
    unix = "one\nmore\n\ntwo\n"
    digests = {
        open_text([write(tmp_path, name, unix.replace("\n", end))]).identity.digest
        for name, end in {"unix.txt": "\n", "windows.txt": "\r\n"}.items()
    }
    assert len(digests) == 1
    assert texts(str(tmp_path / "windows.txt")) == ["one\nmore", "two"]


def test_local_text_knows_how_many_documents_it_has(tmp_path: Path) -> None:
    stories = [f"story {n}" for n in range(300)]
    source = open_text([write(tmp_path, "a.json", json.dumps(stories))])
    held_out = sum(map(is_held_out, stories))
    assert source.counts == (300, held_out)
    assert held_out > 0


def test_token_ids_are_taken_before_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", rows_as_jsonl([{"input_ids": [3, 1], "text": "x"}, {"input_ids": []}]))
    (document,) = all_documents(open_text([path]))
    assert document.ids == (3, 1)
    pq.write_table(pa.table({"input_ids": [[3, 1], [7]]}), tmp_path / "a.parquet")
    first, second = all_documents(open_text([str(tmp_path / "a.parquet")]))
    assert (first.ids, second.ids) == ((3, 1), (7,))
    assert first.identity == document.identity != second.identity


def test_every_document_is_on_the_side_of_its_content(tmp_path: Path) -> None:
    stories = [f"story {n}" for n in range(400)]
    source = open_text([write(tmp_path, "a.json", json.dumps(stories))])
    assert source.is_local
    held_out = [document.text for document in source.documents(held_out=True)]
    assert held_out == [story for story in stories if is_held_out(story)]
    assert 5 < len(held_out) < 40
    assert [d.text for d in source.documents(held_out=False)] == [s for s in stories if s not in held_out]


def test_stdlib_documents_are_modules_and_listed_ones_are_held_out() -> None:
    paths = [module.path for module in stdlib_modules()]
    listed = next(path for path in paths if not is_held_out(path))
    source = open_text(["stdlib"], held_out_modules=[listed])
    held_out = [document.identity for document in source.documents(held_out=True)]
    assert held_out == [path for path in paths if is_held_out(path) or path == listed]
    assert source.identity.digest != open_text(["stdlib"]).identity.digest


def test_identity_follows_the_content(tmp_path: Path) -> None:
    def identity(folder: str, content: str) -> tuple[object, ...]:
        return open_text([write(tmp_path, f"{folder}/a.txt", content)]).identity

    assert identity("one", "a\n\nb") == identity("two", "a\n\nb")
    assert identity("one", "a\n\nb") != identity("one", "a\n\nc")
    assert identity("one", "a\n\nb") != identity("one", "ab")


def local_errors() -> Iterator[tuple[str, str | bytes, str]]:
    yield "a.txt", " \n\n ", r"at least one document; a.txt holds none. Give"
    yield "a.txt", b"good \xff bad", r"UTF-8; .*a.txt has byte 0xff at offset 5. Convert"
    yield "a.jsonl", b'{"text": "\xe4"}', r"UTF-8; .*a.jsonl has byte 0xe4 at offset 10"
    yield "a.jsonl", '{"text": "a"}\n{"text": ', r"a.jsonl, line 2 is not \(Expecting value\). Repair"
    yield "a.jsonl", '{"story": "a", "n": 1}', r"'text'; .*line 1 has the fields: 'story', 'n'. .*--text-field"
    yield "a.jsonl", '{"text": 3}', r"'text' must hold text; .*line 1 has a int"
    yield "a.jsonl", "3", r"object or a string; .*line 1 is a int"
    yield "a.jsonl", r'"\ud800"', r"lone surrogate"
    yield "a.jsonl", '{"input_ids": [1, 2.5]}', r"`input_ids` must be .*line 1 has \[1, 2.5\]. Give"
    yield "a.jsonl", '{"input_ids": [true]}', r"`input_ids` must be"
    yield "a.jsonl", '{"input_ids": [-1]}', r"nonnegative"
    yield "a.jsonl", '{"input_ids": "1 2"}', r"`input_ids` must be"
    yield "a.json", '["a", {"story": "b"}]', r"a.json, element 2 has the fields: 'story'"
    yield "a.json", '{"text": "a"}\n{"text": "b"}', r"Extra data, line 2\). .*\.jsonl"
    yield "a.json", '{"text": "a"}', r"list of rows or strings; .* holds a dict"
    deep, long = "[" * 200_000 + "]" * 200_000, "1" * 5000
    yield "a.jsonl", f'"a"\n{deep}', r"a.jsonl, line 2 is not \(.*recursion.*\). Repair or remove the line"
    yield "a.json", deep, r"must be JSON that Python can read; .*a.json is not \(.*recursion.*\). Repair"
    yield "a.jsonl", f'"a"\n{long}', r"a.jsonl, line 2 is not \(.*digits.*\). Repair or remove the line"
    yield "a.json", f"[{long}]", r"a.json is not \(.*digits.*\). Repair"
    yield "a.parquet", "no table", r"Parquet table; .*a.parquet is not"
    yield "a.csv", "a,b", r"must end in .txt, .jsonl, .json, .parquet, or .*; got .*a.csv"


@pytest.mark.parametrize(("name", "content", "message"), local_errors())
def test_local_text_that_cannot_be_used_says_what_to_do(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_text([write(tmp_path, name, content)])


def test_a_parquet_without_the_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"story": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has the fields: 'story'. .*--text-field"):
        open_text([str(tmp_path / "a.parquet")])


def test_missing_files(tmp_path: Path) -> None:
    for name, message in [
        ("no.txt", "There is no file .*no.txt"),
        ("*.txt", "No file matches the pattern"),
        ("", "The folder .* holds no file"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            open_text([str(tmp_path / name)])


def test_what_cannot_be_a_specification(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one name"):
        open_text([])
    with pytest.raises(ValueError, match="must be the only text; got some/dataset"):
        open_text(["stdlib", "some/dataset"])
    with pytest.raises(FileNotFoundError, match=r"mxd-tests/none is neither .* nor a dataset .*Check the name"):
        open_text(["mxd-tests/none"])


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    rows: list[object] = [{"text": f"row {n}" if n % 7 else "", "n": n} for n in range(200)]
    write(folder, "train.jsonl", rows_as_jsonl(rows))
    return folder


def test_a_streamed_dataset_gives_the_same_documents_as_a_local_file(hub_folder: Path) -> None:
    streamed, local = HubText(str(hub_folder)), open_text([str(hub_folder)])
    assert not streamed.is_local
    for held_out in (False, True):
        expected = [document.text for document in local.documents(held_out)]
        documents = list(streamed.documents(held_out))
        assert [document.text for document in documents] == expected
        for document in documents[:: len(documents) // 4]:
            assert next(streamed.documents(held_out, skip=document.row)) == document


def test_a_streamed_dataset_without_the_split_or_the_field(hub_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"must have the split 'nope'.*--split"):
        HubText(str(hub_folder), split="nope")
    with pytest.raises(ValueError, match=r"has the fields: .*'text'.*--text-field"):
        list(HubText(str(hub_folder), text_field="story").documents(held_out=False))


def test_numbering_starts_anew_for_each_source() -> None:
    document = Document("same", "same", None, row=5)
    source = LocalText(["memory"], [document, document])
    assert [document.row for document in all_documents(source)] == [0, 1]
    assert source.name == "memory"


@pytest.mark.skipif(not TINYSTORIES.is_dir(), reason="the shared TinyStories sample is not there")
def test_tinystories_in_both_formats() -> None:
    assert len(all_documents(open_text([str(TINYSTORIES / "tinystories_1000.json")]))) == 1000
    assert len(texts(str(TINYSTORIES / "tinystories_2MB_cased.txt"))) > 2000
