import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from datasets import Dataset

from mxd.probing import hub_sets
from mxd.probing.examples import Example, Skipped, Span, SpanSet, TextSet, make_text_set
from mxd.probing.files import read_labelled_file
from mxd.probing.hub_sets import HUB_SETS, load_hub_set, load_surnames
from mxd.probing.sources import DataName, default_data, open_data, parse_data
from tests.jsonl import write_rows

LEAST = 25


def labelled(count: int, *labels: str) -> list[dict[str, str]]:
    return [{"text": f"{label} text {number}", "label": label} for label in labels for number in range(count)]


def test_a_file_of_labelled_texts_becomes_a_set(tmp_path: Path) -> None:
    rows = labelled(30, "good", "bad") + labelled(3, "rare") + labelled(2, "good")
    found = read_labelled_file(write_rows(tmp_path / "reviews" / "data.jsonl", rows))
    assert isinstance(found, TextSet)
    assert found.name == "reviews"
    assert found.labels == ["bad", "good"]
    assert found.skipped == [Skipped("rare", 3, LEAST)]
    assert found.duplicates == 2
    assert Counter(example.label for example in found.examples) == {"bad": 30, "good": 30}
    assert [example.label for example in found.examples[:30]] != ["good"] * 30


def test_a_csv_reads_as_its_jsonl_does(tmp_path: Path) -> None:
    rows = [row | {"text": row["text"] + ', "quoted"\nsecond line'} for row in labelled(30, "1", "2")]
    jsonl = read_labelled_file(write_rows(tmp_path / "a.jsonl", rows))
    lines = ["text,label\n", *('"' + row["text"].replace('"', '""') + f'",{row["label"]}\n' for row in rows)]
    (tmp_path / "a.csv").write_text("".join(lines), encoding="utf-8")
    csv = read_labelled_file(tmp_path / "a.csv")
    assert isinstance(jsonl, TextSet)
    assert isinstance(csv, TextSet)
    assert csv.examples == jsonl.examples


def test_a_file_of_spans_becomes_documents(tmp_path: Path) -> None:
    rows = [
        {"text": "ab cd", "spans": [[0, 2, "x"], {"start": 3, "end": 5, "label": 7}]},
        {"text": "none", "spans": []},
    ]
    found = read_labelled_file(write_rows(tmp_path / "spans.jsonl", rows))
    assert isinstance(found, SpanSet)
    assert found.texts == ["ab cd", "none"]
    assert [list(found.spans_of(number)) for number in range(2)] == [[Span(0, 2, "x"), Span(3, 5, "7")], []]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "abc", "spans": [[1, 4, "x"]]}, "A span must fit its text, 0 ≤ start < end ≤ 3 characters"),
        ({"text": "abc", "spans": [[2, 2, "x"]]}, "A span must fit its text"),
        ({"text": "abc", "spans": [[-1, 2, "x"]]}, "A span must fit its text"),
        ({"text": "abc", "spans": [[True, 2, "x"]]}, "A span must fit its text"),
        ({"text": "abc", "spans": [[0, 2]]}, r"A span must be \[start, end, label\]"),
        ({"text": "abc", "spans": [[0, 2, None]]}, "A label must be a printable text or a number"),
        ({"text": "abc", "label": "a\x1b[31mb"}, "A label must be a printable text or a number"),
        ({"text": "abc", "spans": {"0": 1}}, "must have a list in 'spans'"),
        ({"text": "abc"}, "must have 'text' and 'label', or 'text' and 'spans'"),
        ({"text": " ", "label": "x"}, "must have text in 'text'"),
        ({"label": "x"}, "must have text in 'text'"),
        ({"text": "abc", "label": [1]}, "A label must be a printable text or a number"),
        ([1], "must be a JSON object"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, row: object, expected: str) -> None:
    fine = (
        {"text": "fine", "label": "y"} if not (isinstance(row, dict) and "spans" in row) else {"text": "a", "spans": []}
    )
    path = write_rows(tmp_path / "bad.jsonl", [fine, row])
    with pytest.raises(ValueError, match=expected) as error:
        read_labelled_file(path)
    assert "bad.jsonl, line 2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "at least one row"),
        (b"{", "not \\("),
        (b"\xff", "must be UTF-8"),
        (json.dumps({"text": "alone", "label": "x"}).encode(), "at least two classes with 25 different texts"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        read_labelled_file(tmp_path / "bad.jsonl")
    (tmp_path / "bad.xlsx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must be \.jsonl or \.csv"):
        read_labelled_file(tmp_path / "bad.xlsx")
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_labelled_file(tmp_path / "absent.jsonl")


def test_the_most_texts_are_drawn_at_random_and_the_same_each_time() -> None:
    examples = [Example(f"{number}", "ab"[number % 2]) for number in range(400)]
    found = make_text_set("many", examples, per_class=60, total=100)
    assert len(found.examples) == 100
    assert max(Counter(example.label for example in found.examples).values()) <= 60
    assert found.examples == make_text_set("many", examples, per_class=60, total=100).examples
    assert any(int(example.text) > 300 for example in found.examples)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_sets, "PER_CLASS", 30)


def write_parquet(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list([dict(row) for row in rows]).to_parquet(str(path))


@pytest.mark.usefixtures("few")
def test_the_papers_sets_are_read_from_copies_in_the_hubs_layout(tmp_path: Path) -> None:
    news = [{"text": f"news {label} {number}", "label": label} for number in range(40) for label in range(4)]
    write_parquet(tmp_path / "news" / "data" / "train-00000-of-00001.parquet", news)
    found = load_hub_set("ag-news", str(tmp_path / "news"))
    assert Counter(example.label for example in found.examples) == dict.fromkeys("0123", 30)

    pairs = ["en-fr", "fr-it", "de-en", "es-fr", "nl-pt"]
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {pair}\n  data_files:\n  - split: train\n    path: {pair}/train-*.parquet\n" for pair in pairs
    )
    (tmp_path / "europarl").mkdir()
    (tmp_path / "europarl" / "README.md").write_text(card + "---\n")
    for pair in pairs:
        rows = [{"translation": {name: f"{name} {pair} {number}" for name in pair.split("-")}} for number in range(35)]
        write_parquet(tmp_path / "europarl" / pair / "train-00000-of-00001.parquet", rows)
    found = load_hub_set("europarl", str(tmp_path / "europarl"))
    assert Counter(example.label for example in found.examples) == dict.fromkeys(("en", "fr", "de", "es", "nl"), 30)
    assert all(example.text.startswith(example.label) for example in found.examples)

    files = [
        {"content": f"{extension}{number}" + "licence " * 30 + "x = 1\n" * 80, "path": f"src/a{number}.{extension}"}
        for number in range(40)
        for extension in ("c", "py", "html", "java", "php", "rs")
    ]
    write_parquet(tmp_path / "code" / "data" / "train-00000-of-00002.parquet", [{"content": "short", "path": "b.py"}])
    write_parquet(tmp_path / "code" / "data" / "train-00001-of-00002.parquet", files)
    with pytest.raises(ValueError, match="different texts"):
        # What distinguishes these files is in the part that is left out.
        load_hub_set("github-code", str(tmp_path / "code"))
    for place, file in enumerate(files):
        file["content"] = f"{file['content']}{place}"
    write_parquet(tmp_path / "code" / "data" / "train-00001-of-00002.parquet", files)
    found = load_hub_set("github-code", str(tmp_path / "code"))
    assert Counter(example.label for example in found.examples) == dict.fromkeys(
        ("C", "Python", "HTML", "Java", "PHP"), 30
    )
    assert found.keep == "last"


@pytest.mark.usefixtures("few")
def test_classes_have_half_of_their_texts_of_each_gender_and_rating(tmp_path: Path) -> None:
    people = [
        {"hard_text": f"person {number} of {job}", "profession": job, "gender": int(number % 4 == 0)}
        for number in range(90)
        for job in (0, 1, 2, 3, 11, 20)
    ]
    write_parquet(tmp_path / "bios" / "data" / "train-00000-of-00001.parquet", people)
    found = load_hub_set("bias-in-bios-1", str(tmp_path / "bios"))
    assert Counter(example.label for example in found.examples) == {"0": 30, "1": 30, "2": 30}
    genders = Counter(int(example.text.split()[1]) % 4 == 0 for example in found.examples)
    assert genders == {True: 45, False: 45}

    reviews = [
        {"text": f"review {number}", "category": number % 7, "rating": 1.0 + 4 * (number % 2)} for number in range(700)
    ]
    write_parquet(tmp_path / "reviews" / "data" / "train-00000-of-00001.parquet", reviews)
    found = load_hub_set("amazon-category", str(tmp_path / "reviews"))
    assert Counter(example.label for example in found.examples) == dict.fromkeys(("1", "2", "3", "5", "6"), 30)
    found = load_hub_set("amazon-sentiment", str(tmp_path / "reviews"))
    assert Counter(example.label for example in found.examples) == {"1.0": 30, "5.0": 30}


def test_the_eight_sets_have_the_papers_classes() -> None:
    assert len(HUB_SETS) == 8
    assert {name: len(found.labels) for name, found in HUB_SETS.items()} == {
        "ag-news": 4,
        "europarl": 5,
        "github-code": 5,
        "amazon-category": 5,
        "amazon-sentiment": 2,
        "bias-in-bios-1": 5,
        "bias-in-bios-2": 5,
        "bias-in-bios-3": 5,
    }


def people() -> list[dict[str, object]]:
    return [
        {
            "text": f"About Ann, then: Dr. Ann van Lee {number}<pad><pad>",
            "tokens": [1, 2, 3],
            "name": f"Ann van Lee {number}",
            "surname_index_start": 1,
            "surname_index_end": 2,
            "class": ["actor", "singer"][number % 2],
        }
        for number in range(60)
    ]


def test_surnames_are_read_as_they_are_saved(tmp_path: Path) -> None:
    Dataset.from_list(people()).save_to_disk(tmp_path / "occupation")
    write_rows(tmp_path / "occupation.jsonl", people())
    saved, lines = load_surnames(str(tmp_path / "occupation")), load_surnames(str(tmp_path / "occupation.jsonl"))
    assert saved.examples == lines.examples
    assert saved.name == "occupation"
    assert saved.labels == ["actor", "singer"]
    for example in saved.examples:
        assert example.span is not None
        assert example.text[slice(*example.span)].startswith("van Lee ")
        assert example.text.endswith(example.text[slice(*example.span)])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "Bob Someone"}, "must have its name of two words or more in its text"),
        ({"name": "Ann"}, "must have its name of two words"),
        ({"class": None}, "must have the field 'class'"),
        ({"text": 7}, "must have text in 'text'"),
    ],
)
def test_a_row_without_a_surname_is_named(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    rows = people()
    rows[4] |= change
    with pytest.raises(ValueError, match=expected) as error:
        load_surnames(str(write_rows(tmp_path / "alive.jsonl", rows)))
    assert "row 5" in str(error.value)


def test_a_data_set_that_is_another_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "other" / "data" / "train-00000-of-00001.parquet", [{"text": "a", "stars": 1}])
    with pytest.raises(ValueError, match=r"row 1 has 'text', 'stars'"):
        load_hub_set("ag-news", str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="cannot be opened"):
        load_hub_set("ag-news", str(tmp_path / "absent"))


def test_words_name_data(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.jsonl", [])
    assert parse_data(["python", f"ag-news={tmp_path}", str(path), "surnames=a=b"]) == [
        DataName("python", None),
        DataName("ag-news", str(tmp_path)),
        DataName("", str(path)),
        DataName("surnames", "a=b"),
    ]
    assert [found.name for found in parse_data(["paper"])] == list(HUB_SETS)
    assert default_data(["stdlib"]) == ["python"]
    with pytest.raises(FileNotFoundError, match="must be a file or one of python"):
        parse_data(["nonsense"])
    with pytest.raises(FileNotFoundError, match="must be a file or one of"):
        parse_data(["ag-news="])
    with pytest.raises(ValueError, match="must say where they are"):
        parse_data(["surnames"])
    with pytest.raises(ValueError, match="must be told what to probe with"):
        default_data(["stories.txt"])


def test_python_below_a_folder_is_labelled(tmp_path: Path) -> None:
    (tmp_path / "code" / "deep").mkdir(parents=True)
    (tmp_path / "code" / "a.py").write_text("x = 1\n")
    (tmp_path / "code" / "deep" / "b.py").write_text("y = (\n")
    found = open_data(DataName("python", str(tmp_path / "code")))
    assert isinstance(found, SpanSet)
    assert found.name == "code"
    assert not found.for_test
    assert Span(4, 5, "number") in found.spans_of(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must name a \.py file or a folder"):
        open_data(DataName("python", str(tmp_path / "empty")))


def test_the_standard_library_is_tested_on_modules_that_no_training_sees() -> None:
    found = open_data(DataName("python", None))
    assert isinstance(found, SpanSet)
    assert 0 < len(found.for_test) < 0.15 * len(found.texts)


def test_a_csv_may_hold_line_separators_and_long_texts_in_its_fields(tmp_path: Path) -> None:
    rows = [("a\u2028b " * 3 + str(n), "yes" if n % 2 else "no") for n in range(60)] + [("long " * 40_000, "yes")]
    lines = ["text,label", *(f'"{text}",{label}' for text, label in rows)]
    path = tmp_path / "odd.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    found = read_labelled_file(path)
    assert isinstance(found, TextSet)
    assert sorted(example.text for example in found.examples) == sorted(text for text, _ in rows)


def test_a_lone_surrogate_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "fine", "label": "a"}\n{"text": "a\\ud800b", "label": "b"}\n')
    with pytest.raises(ValueError, match="line 2 has a lone surrogate at character 1"):
        read_labelled_file(path)
