"""What probing refuses, leaves out and says so, shows safely, and never holds in memory."""

import io
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from mxd.evaluation.students import load_students
from mxd.models import load_language_model
from mxd.printable import printable
from mxd.probing import hub_sets, picture, token_codes
from mxd.probing.alignment import TokenizedText, token_labels, tokenize_texts
from mxd.probing.collecting import Probed
from mxd.probing.examples import Example, Skipped, Span, TextSet, Unlabelled, labelled_by
from mxd.probing.features import collect_text_features
from mxd.probing.files import read_labelled_file
from mxd.probing.hub_sets import load_hub_set
from mxd.probing.picture import draw_probing
from mxd.probing.probe import probe
from mxd.probing.python_concepts import python_spans
from mxd.probing.results import ProbeRow, Probing, SetResult
from mxd.probing.statistics import Quality
from mxd.probing.tables import concept_table, mean_table, remarks
from mxd.probing.token_codes import collect_tokens
from mxd.probing.token_probes import probe_tokens
from mxd.runs.run import read_configuration
from tests.jsonl import write_rows
from tests.tiny_model import WORDS
from tests.tiny_run import Command, TinyRun, assert_refused

ESCAPE = "\x1b[31m"


@pytest.fixture(scope="module")
def probed(tiny: TinyRun) -> Probed:
    students = load_students(tiny.run, cast("Any", read_configuration(tiny.run)["students"]), ["0/mxd-k4"])
    loaded = load_language_model(str(tiny.model), dtype=torch.float32)
    return Probed(cast("nn.Module", loaded.model), loaded.tokenizer, [one.candidate for one in students], 32)


def sentences(count: int, seed: int = 0, length: int = 12) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, length)) for _ in range(count)]


def test_labels_take_no_memory_of_the_texts_length_times_their_number() -> None:
    length = 200_000
    starts = np.arange(0, length, 100)
    tokens = TokenizedText(np.zeros_like(starts), starts, starts + 100)
    spans = [Span(place, place + 10_000, f"concept {place // 1000 % 100}") for place in range(0, length - 10_000, 1000)]
    tracemalloc.start()
    try:
        found = token_labels(tokens, spans)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 100
    assert all(len(bearing) == 200 or len(bearing) == 100 for bearing in found.values())
    # A byte for each character and label would be 20 MB.
    assert peak < 2e6


@pytest.mark.parametrize("keep", ["first", "last"])
def test_of_a_long_text_only_what_is_seen_is_tokenised(
    probed: Probed, monkeypatch: pytest.MonkeyPatch, keep: Any
) -> None:
    seen: list[int] = []

    def listen(tokenizer: Any, texts: Sequence[str]) -> Any:
        seen.extend(map(len, texts))
        return tokenize_texts(tokenizer, texts)

    text = " ".join(sentences(1, length=4_000))
    monkeypatch.setattr("mxd.probing.features.tokenize_texts", listen)
    monkeypatch.setattr(token_codes, "tokenize_texts", listen)
    examples = [Example(text, "x"), Example(text, "y", (len(text) - 9, len(text) - 5))]
    found = collect_text_features(probed, TextSet(name="long", examples=examples, keep=keep))
    part = text[:31] if keep == "first" else text[-31:]
    short = [Example(part, "x"), Example(text[-60:], "y", (51, 55))]
    expected = collect_text_features(probed, TextSet(name="short", examples=short, keep=keep))
    for one, other in zip(found.features, expected.features, strict=True):
        columns = range(one.width)
        assert one.columns(columns) == pytest.approx(other.columns(columns), abs=1e-6)
    collect_tokens(probed, labelled_by("long", [text, text[5:], text[9:]], lambda _: []), 600)
    assert max(seen) <= 600 * 64


def test_texts_that_begin_alike_and_are_cut_are_one(probed: Probed) -> None:
    examples = [
        Example("one two red cat a tree sees the river" + end, label) for end, label in (("!", "x"), ("?", "y"))
    ]
    found = collect_text_features(probed, TextSet(name="alike", examples=examples))
    assert (found.labels, found.duplicates) == (["x"], 1)


def trimming_tokenizer(*, trims: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the end of GPT-NeoX's, with tokens for white space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    blanks = ["ĠĠ", "ĠĠĠ", "ĊĠ", "ĊĠĠĠ"]
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, *blanks])}
    merges = [("Ġ", "Ġ"), ("ĠĠ", "Ġ"), ("Ċ", "ĠĠĠ")]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    return made


def test_tokens_of_white_space_have_their_characters_where_offsets_are_trimmed() -> None:
    text = "if a:\n    b = 1\n    if b:\n        c = 2\n"
    trims, keeps = trimming_tokenizer(trims=True), trimming_tokenizer(trims=False)
    # Without our doing, a token of four blanks stands for no character.
    assert any(start == end for start, end in trims(text, return_offsets_mapping=True)["offset_mapping"])
    [tokens], [expected] = tokenize_texts(trims, [text]), tokenize_texts(keeps, [text])
    for column, other in zip(tokens, expected, strict=True):
        assert np.array_equal(column, other)
    assert len(token_labels(tokens, python_spans(text))["indentation"]) >= 3
    # The tokenizer is given back as it was.
    assert "trim_offsets=True" in repr(trims.backend_tokenizer.post_processor)


def test_nothing_that_is_printed_is_obeyed() -> None:
    for number in (*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFFF0, 0x10010)):
        shown = printable(f"a{chr(number)}b")
        assert shown.isprintable()
        assert shown.encode()
        assert (shown == f"a{chr(number)}b") == chr(number).isprintable()
        assert printable(shown) == shown


def test_control_characters_of_names_reach_no_terminal(tiny: TinyRun, tmp_path: Path, mxd: Command) -> None:
    ended = mxd("probe", tiny.run, "--data", tmp_path / f"none{ESCAPE}\u202e.jsonl")
    assert_refused(ended, "probe", "none\\x1b[31m\\u202e.jsonl")
    assert ended.err.rstrip("\n").isprintable()
    spans = write_rows(tmp_path / f"red{ESCAPE}.jsonl", [{"text": "ab", "spans": []}])
    assert read_labelled_file(spans).name == "red\\x1b[31m"
    # An undecodable name, which Python keeps as half a character that no file of results can hold.
    assert printable("a\udcff") == "a\\udcff"
    result = made(1, concepts=[f"c{ESCAPE}"], data=f"d{ESCAPE}", few=True)
    assert ESCAPE not in drawn(mean_table(result)) + drawn(concept_table(result)) + "".join(remarks([result]))


def parquet(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows)).to_parquet(str(path))


def news(count: int) -> list[dict[str, object]]:
    return [{"text": f"news {label} {number}", "label": label} for number in range(count) for label in range(4)]


def test_a_stream_that_breaks_says_where(tmp_path: Path, tiny: TinyRun, mxd: Command) -> None:
    folder = tmp_path / "news" / "data"
    parquet(folder / "train-00000-of-00002.parquet", news(10))
    (folder / "train-00001-of-00002.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"must be readable row by row; \S+ is not behind row 40 \(") as error:
        load_hub_set("ag-news", str(tmp_path / "news"))
    assert "\n" not in str(error.value)
    assert_refused(mxd("probe", tiny.run, "--data", f"ag-news={tmp_path / 'news'}"), "probe", "not behind row 40")


@pytest.mark.parametrize("kind", [ConnectionError, RuntimeError, KeyError])
def test_whatever_a_stream_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def rows(*_: object) -> Iterator[dict[str, object]]:
        yield from news(3)
        raise kind("the server\nis gone")

    monkeypatch.setattr(hub_sets, "_opened", rows)
    with pytest.raises(ValueError, match=r"ag_news is not behind row 12 \(") as error:
        load_hub_set("ag-news")
    assert "\n" not in str(error.value)


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, probed: Probed) -> None:
    blank: list[dict[str, object]] = [{"text": text, "label": 1} for text in ("", " \n", None)]
    parquet(tmp_path / "news" / "data" / "train-00000-of-00001.parquet", [*news(26)[:50], *blank, *news(26)[50:]])
    found = load_hub_set("ag-news", str(tmp_path / "news"))
    assert found.blank == 3
    assert len(found.examples) == 104
    few = probe(Probed(probed.model, probed.tokenizer, [], 32), [], facts={}, identity={})
    assert few.texts == []
    pairs = [{"translation": {"en": f"text {number}" if number % 10 else None}} for number in range(40)]
    rows = hub_sets._take(pairs, hub_sets.HUB_SETS["europarl"].parts[0], None, "made", taken := hub_sets._Taken())
    assert len([*rows]) == 36
    assert taken.blank == 4


def quality(f1: float) -> Quality:
    interval = (max(f1 - 0.1, 0), min(f1 + 0.1, 1))
    return Quality(f1, interval, 0.5, interval, 0.5, 0.5, 0.5, 0.5)


def made(
    students: int, layers: int = 1, concepts: Sequence[str] = ("a", "b"), data: str = "made", *, few: bool = False
) -> SetResult:
    """Return a result of many students and their baselines."""
    names = [f"{layer}/mxd-k{4 * number}" for layer in range(layers) for number in range(1, students + 1)]
    features = [*names, "token identity"]
    features += [f"{layer}/{kind}" for layer in range(layers) for kind in ("dense hidden", "residual stream")]
    rows = [
        ProbeRow(
            concept=concept,
            features=name,
            layer=int(name[0]) if "/" in name else None,
            kind="mxd" if "mxd" in name else name.rpartition("/")[2],
            k=None if name == "chance" else 1,
            latents=[0],
            quality=quality((place * 7 + number * 3) % 20 / 20),
        )
        for number, concept in enumerate(concepts)
        for place, name in enumerate([*features, "chance"])
    ]
    examples = {concept: 10 + number for number, concept in enumerate(concepts)}
    groups = dict.fromkeys(concepts, 2 if few else 9)
    return SetResult(
        data=data,
        examples=examples,
        total=100,
        parts=[50, 20, 30],
        skipped=[Skipped(f"{concept}?", 3, 15) for concept in concepts],
        left_out={},
        rows=rows,
        documents=9,
        test_groups=groups,
    )


def drawn(table: Table) -> str:
    console = Console(file=io.StringIO(), width=400)
    console.print(table)
    return cast("io.StringIO", console.file).getvalue()


def test_baselines_stay_however_many_students_there_are() -> None:
    shown = drawn(concept_table(made(12)))
    for name in ("MxD K 4 ", "token identity", "dense hidden", "residual stream", "chance", "6 students more"):
        assert name in shown
    assert "MxD K 28" not in shown
    several = drawn(concept_table(made(3, layers=4)))
    assert all(f"Layer {layer} dense hidden" in several for layer in (0, 1))
    assert "8 students more" in several
    assert "students more" not in drawn(concept_table(made(6)))


def test_a_picture_has_a_largest_size_and_each_set_one_of_its_own(tmp_path: Path) -> None:
    many = made(1, concepts=[f"{number} {'x' * 200}" for number in range(400)], data="a b")
    lines = picture._lines([many])
    assert len(lines) == 101
    assert max(len(line.label) for line in lines) == 48
    assert {int(line.label.split()[0]) for line in lines[:-1]} == set(range(300, 400))
    # The mean is over all of them.
    [mean] = [row for row in picture._lines([made(1)]) if row.label == "mean"]
    assert (mean.classes, lines[-1].classes, len(lines[-1].rows)) == (2, 400, 5 * 400)
    probing = Probing(facts={}, identity={}, tokens=[made(1, data="a b"), made(1, data="A-b"), made(1, data="texts")])
    names = [path.name for path in draw_probing(probing, tmp_path)]
    assert names == ["probing-a-b.png", "probing-A-b-2.png", "probing-texts-2.png"]


@pytest.mark.parametrize("count", ["-5", "0", "49"])
@pytest.mark.parametrize("option", ["--texts", "--tokens"])
def test_counts_that_make_no_sense_are_refused(tiny: TinyRun, mxd: Command, option: str, count: str) -> None:
    assert_refused(mxd("probe", tiny.run, option, count), "probe", f"{option} must be at least 50", f"got {count}")


def test_two_sets_of_one_name_are_refused(tiny: TinyRun, tmp_path: Path, mxd: Command) -> None:
    (tmp_path / "more").mkdir()
    paths = [
        write_rows(folder / "spans.jsonl", [{"text": "ab", "spans": []}]) for folder in (tmp_path, tmp_path / "more")
    ]
    twice = mxd("probe", tiny.run, "--data", "paper", "ag-news")
    assert_refused(twice, "probe", "must have a name of its own", "ag-news would be of two")
    assert_refused(
        mxd("probe", tiny.run, "--data", *paths), "probe", "must have a name of its own", "spans would be of two"
    )


def test_a_text_with_commas_and_no_quotation_marks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.csv"
    path.write_text("text,label\nfine,good,,\nwell, well,good\n")
    with pytest.raises(ValueError, match=r"bare\.csv, line 3 has 3\. Put a text that has commas in quotation marks"):
        read_labelled_file(path)


def words(text: str) -> list[Span]:
    """Label cats, which are frequent, and rivers, which are rare."""
    return [
        Span(place, place + len(word), word)
        for word in ("cat", "river")
        for place in range(len(text))
        if text.startswith(word, place)
    ]


def test_a_concept_of_which_a_dense_layer_keeps_too_little_is_left_out_of_its_mean(
    probed: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_codes, "DENSE_ELEMENTS", 16 * 500)
    random = np.random.default_rng(3)
    texts = [" ".join(random.choice(["cat", "dog", "red", "one"], 12)) for _ in range(60)]
    texts = [f"river {text[10:]}" if number % 3 == 0 else text for number, text in enumerate(texts)]
    result = probe_tokens(probed, labelled_by("made", texts, words), 3_000).result
    rows = {(row.features, row.concept) for row in result.rows}
    assert {("0/residual stream", "cat"), ("0/mxd-k4", "river"), ("chance", "river")} <= rows
    assert ("0/residual stream", "river") not in rows
    [cat] = [
        row.quality.f1 for row in result.rows if (row.features, row.concept, row.k) == ("0/residual stream", "cat", 1)
    ]
    assert result.mean_f1("0/residual stream", 1) == cat
    assert any("0/residual stream was kept at too few tokens of these" in remark for remark in remarks([result]))


def test_what_a_labeller_says_must_fit_its_text(probed: Probed) -> None:
    data = labelled_by("made", sentences(9), lambda text: [Span(3, len(text) + 1, "x")])
    with pytest.raises(ValueError, match=r"A span must fit its text, .*; document \d of made has 3 to"):
        collect_tokens(probed, data, 1_000)


def test_documents_of_which_none_can_be_labelled_are_refused(probed: Probed) -> None:
    def fail(text: str) -> list[Span]:
        raise Unlabelled(text)

    with pytest.raises(ValueError, match=r"must be three or more, .* 0 can be used"):
        collect_tokens(probed, labelled_by("made", sentences(9), fail), 1_000)


def test_remarks_say_which_classes_have_no_interval() -> None:
    said = remarks([made(1, concepts=[f"c{number}" for number in range(25)], few=True)])
    assert any(
        "fewer than 5 documents of the test part hold these, which have no interval: c0 (2)" in one for one in said
    )
    assert all(one.endswith("and 5 more.") for one in said if "c0" in one)
