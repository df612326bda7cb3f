import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from mxd.checkpoint import edits_digest, save_edits
from mxd.data.tokens import content_positions
from mxd.edits import Ablate, Edit
from mxd.evaluation.opening import open_run, read_finished_run
from mxd.evaluation.students import load_students
from mxd.explorer import collect as collecting
from mxd.explorer.code_store import CodeStore
from mxd.explorer.collect import CollectConfig, collect
from mxd.explorer.concepts import read_concepts
from mxd.explorer.database import (
    identify_run,
    new_database,
    reading,
    require_database,
    write_facts,
)
from mxd.explorer.labels import Label, read_labels, write_label
from mxd.explorer.live import LiveModel
from mxd.layers import SparseCode
from mxd.models import mlp_pairs
from tests.exploring import STUDENTS, explored, library_of
from tests.tiny_run import Command, assert_refused, copied, tiny_run, tree


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explored(tmp_path_factory.getbasetemp())


def rows(run: Path, query: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query)]


def test_the_database_holds_what_the_latents_do_on_the_held_out_text(run: Path) -> None:
    description = read_finished_run(run)
    opened = open_run(run, description, (), None, None)
    contexts = opened.text.contexts
    content = content_positions(contexts, opened.text.special_ids)
    for number, name in enumerate(STUDENTS):
        (student,) = load_students(run, description["students"], [name])
        network = student.candidate.network
        pair = mlp_pairs(opened.language_model.model, contexts, [student.candidate.layer])[student.candidate.layer]  # pyright: ignore[reportArgumentType]
        x = (pair.target if network.reads == "output" else pair.x).float()
        dense = network.encode(x).dense(network.config.num_latents) * content[..., None]
        stored = rows(run, f"SELECT * FROM latents WHERE student = {number} ORDER BY latent")
        assert len(stored) == network.config.num_latents
        for row in stored:
            values = dense[..., row["latent"]]
            fires = values > 0
            assert row["firings"] == fires.sum()
            assert row["rate"] == pytest.approx(fires.sum().item() / content.sum().item())
            assert row["maximum"] == pytest.approx(values.max().item(), rel=1e-3)
            examples = json.loads(row["examples"])
            top = values.max(1).values.sort(descending=True).values[:8]
            strongest = [example["value"] for example in examples if example["group"] == "top"]
            assert strongest == pytest.approx([v for v in top.tolist() if v > 0], rel=1e-3)
            for example in examples:
                first = example["first"]
                window = values[example["context"], first : first + example["length"]]
                cells = [
                    [place, pytest.approx(window[place].item(), rel=1e-3)] for place in window.nonzero()[:, 0].tolist()
                ]
                assert example["cells"] == cells
                assert window[example["peak"]].item() == pytest.approx(example["value"], rel=1e-3)
    tokens = [int(row["occurrences"]) for row in rows(run, "SELECT occurrences FROM tokens ORDER BY id")]
    assert tokens == torch.bincount(contexts[content], minlength=len(tokens)).tolist()


def test_a_given_text_is_read_whole_and_a_student_alone(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("the cat sees two dogs and a tree\n\n" * 40, encoding="utf-8")
    config = CollectConfig(text=(str(text),), tokens=256, student=("0/transcoder-k4",))
    collect(run, tmp_path / "other.sqlite", config, Console(quiet=True))
    with reading(tmp_path / "other.sqlite") as connection:
        assert [row[0] for row in connection.execute("SELECT name FROM students")] == ["0/transcoder-k4"]
        texts = [row[0] for row in connection.execute("SELECT text FROM contexts")]
    assert len(texts) == 8
    assert "two dogs" in texts[0]
    assert not list(tmp_path.glob(".*"))


def test_labels_outlive_a_new_collection(run: Path, tmp_path: Path, mxd: Command) -> None:
    copy = copied(run, tmp_path / "run")
    label = Label(STUDENTS[0], 3, "<b>bold</b>", "a note", "2026-11-21")
    write_label(copy / "explorer.sqlite", label)
    with closing(sqlite3.connect(copy / "explorer.sqlite")) as connection:
        connection.execute("PRAGMA user_version=0")
    refused = mxd("explore", copy, "--no-serve")
    assert_refused(refused, "explore", "version 3", "is of version 0", "--recollect")
    done = mxd("explore", copy, "--no-serve", "--recollect", "--student", STUDENTS[0], "--tokens", 128)
    assert done.status == 0
    with reading(copy / "explorer.sqlite") as connection:
        assert read_labels(connection, STUDENTS[0]) == [label]
    # What was asked for is told apart from what is there.
    assert_refused(mxd("explore", copy, "--no-serve", "--tokens", "256"), "explore", "its tokens is 128", "--recollect")
    assert mxd("explore", copy, "--no-serve").status == 0


def test_a_file_of_another_kind_or_run_is_refused_and_left_alone(run: Path, tmp_path: Path, mxd: Command) -> None:
    path = tmp_path / "notes.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (note)")
    text = tmp_path / "notes.txt"
    text.write_text("no database " * 100, encoding="utf-8")
    for wrong in (path, text):
        before = wrong.read_bytes()
        for more in ((), ("--recollect",)):
            ended = mxd("explore", run, "--no-serve", "--database", wrong, *more)
            assert_refused(ended, "explore", "must be a database of mxd explore")
        assert wrong.read_bytes() == before
    other = copied(run, tmp_path / "another")
    (other / "finished.json").write_text('{"step": 1, "time": "then"}', encoding="utf-8")
    before = (other / "explorer.sqlite").read_bytes()
    for more in ((), ("--recollect",)):
        ended = mxd("explore", other, "--no-serve", *more)
        assert_refused(ended, "explore", "run another", "another run, explored-run", "move it away")
    assert (other / "explorer.sqlite").read_bytes() == before


def test_what_cannot_be_collected_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, mxd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(tiny_run(tmp_path_factory.getbasetemp()).run, tmp_path / "run")
    before = tree(copy)
    assert_refused(mxd("explore", copy, "--student", "mxd-k9"), "explore", "no student mxd-k9")
    assert_refused(mxd("explore", copy, "--tokens", "3"), "explore", "must fill one context")
    assert_refused(mxd("explore", copy, "--database", tmp_path / "none" / "x.sqlite"), "explore", "must be a folder")
    assert_refused(mxd("explore", tmp_path), "explore", "must be the folder of a run")
    assert_refused(mxd("explore", copy, "--port", "0"), "explore", "port must lie in")
    monkeypatch.setattr(collecting, "BYTES_AN_ENTRY", 10**15)
    assert_refused(mxd("explore", copy), "explore", "GiB beside the database", "fewer --tokens")
    monkeypatch.undo()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collecting, "write_facts", interrupt)
    assert mxd("explore", copy, "--student", "0/mxd-k4").status == 130
    assert tree(copy) == before


def test_a_run_without_layers_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, mxd: Command
) -> None:
    copy = copied(tiny_run(tmp_path_factory.getbasetemp()).run, tmp_path / "run")
    shutil.rmtree(copy / "layers")
    assert_refused(mxd("explore", copy), "explore", "layers/0/mxd-k4")
    (copy / "finished.json").unlink()
    assert_refused(mxd("explore", copy), "explore", "must be a finished run")


def test_the_command_exports_pages_and_serves_nothing(run: Path, tmp_path: Path, mxd: Command) -> None:
    ended = mxd("explore", run, "--export", tmp_path / "pages")
    assert ended.status == 0
    assert ended.out == ""
    assert "index.html in a browser" in ended.err
    assert (tmp_path / "pages" / "index.html").is_file()
    (tmp_path / "mine").write_text("a file", encoding="utf-8")
    assert_refused(mxd("explore", run, "--export", tmp_path / "mine"), "explore", "must not exist, be empty")


def test_search_finds_by_number_token_text_label_and_concept(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path / "run")
    student = STUDENTS[0]
    write_label(copy / "explorer.sqlite", Label(student, 5, "Quiet Rivers", "", "2026-11-21"))
    named = {"latent": 6, "concept": "docstring", "f1_validation": 0.5, "f1": 0.4}
    probing = {"version": 1, "token_level": {"students": {student: {"latents": [named]}}}}
    (copy / "probing.json").write_text(json.dumps(probing), encoding="utf-8")
    library = library_of(copy)

    def found(query: str) -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", library.search(student, query))

    assert found("7")[0] == {"latent": 7, "why": "number", "what": "7"}
    assert [(entry["latent"], entry["why"]) for entry in found("quiet riv")] == [(5, "label")]
    assert [(entry["latent"], entry["why"]) for entry in found("DOCSTR")] == [(6, "concept")]
    assert found(" ") == found("no such text anywhere") == []
    # What stands for anything in SQL stands for itself here.
    assert {entry["what"] for entry in found("%")} <= {"%"}
    fires = rows(
        copy,
        "SELECT latent FROM token_latents JOIN tokens ON id = token "
        "WHERE student = 0 AND relation = 'fires on' AND text = 't'",
    )
    assert fires
    assert {row["latent"] for row in fires} <= {entry["latent"] for entry in found("t")}
    peaks = {row["latent"] for row in rows(copy, "SELECT * FROM peaks WHERE student = 0")}
    by_text = found("the cat")
    assert {entry["why"] for entry in by_text} == {"context"}
    assert {entry["latent"] for entry in by_text} <= peaks
    # The nearest activations come first.
    assert any(piece in by_text[0]["what"] for piece in ("the", "cat"))
    labels = library.labels(student)
    assert labels["concepts"] == {"names": ["docstring"], "latents": [[6, 0, 0.4]]}


def test_a_database_of_other_edits_is_refused_until_collected_anew(run: Path, tmp_path: Path, mxd: Command) -> None:
    copy = copied(run, tmp_path / "run")
    layer = copy / "layers" / STUDENTS[0]
    before = (copy / "explorer.sqlite").read_bytes()
    save_edits(layer, [Edit(latents=(1,), operation=Ablate())])
    refused = mxd("explore", copy, "--no-serve")
    assert_refused(refused, "explore", "edits have changed since", "then none, now digest", "--recollect")
    assert (copy / "explorer.sqlite").read_bytes() == before
    asked = ("explore", copy, "--no-serve", "--student", STUDENTS[0], "--tokens", 128)
    assert mxd(*asked, "--recollect").status == 0
    assert mxd("explore", copy, "--no-serve").status == 0
    assert rows(copy, "SELECT firings FROM latents WHERE latent = 1") == [{"firings": 0}]
    save_edits(layer, [Edit(latents=(2,), operation=Ablate())])
    assert_refused(mxd("explore", copy, "--no-serve"), "explore", "then digest", "now digest", "--recollect")
    save_edits(layer, [])
    assert_refused(mxd("explore", copy, "--no-serve"), "explore", "now none", "--recollect")


def test_pages_that_need_the_model_refuse_layers_edited_since(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path / "run")
    live = LiveModel(copy, STUDENTS)
    save_edits(copy / "layers" / STUDENTS[0], [Edit(latents=(1,), operation=Ablate())])
    with pytest.raises(ValueError, match=r"edited since.*--recollect"):
        live.attribute(STUDENTS[0], "the cat")
    assert LiveModel(copy, STUDENTS).attribute(STUDENTS[0], "the cat")


def test_one_process_at_a_time_collects_a_database(run: Path, tmp_path: Path, mxd: Command) -> None:
    copy = copied(run, tmp_path / "run")
    path, before = copy / "explorer.sqlite", tree(copy)
    few = ("--no-serve", "--student", STUDENTS[0], "--tokens", "128")
    with new_database(path, identify_run(copy)) as connection:
        during = tree(copy)
        refused = mxd("explore", copy, "--recollect", *few)
        assert_refused(refused, "explore", "Another process is collecting", "name another --database")
        assert tree(copy) == during
        # Another file is another collection.
        assert mxd("explore", copy, "--database", tmp_path / "other.sqlite", *few).status == 0
        write_facts(connection, {"collected": {"text": [], "tokens": None, "student": []}})
    assert set(tree(copy)) == set(before)
    assert mxd("explore", copy, "--recollect", *few).status == 0
    assert set(tree(copy)) == set(before)


def test_codes_that_something_else_changed_are_refused(tmp_path: Path) -> None:
    code = SparseCode(torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 3]]))
    for changed in ("latents", "values"):
        folder = tmp_path / changed
        folder.mkdir()
        store = CodeStore(folder, "0", num_places=1, num_latents=4)
        store.add(code, torch.tensor([True]), 0)
        path = folder / f"0.{changed}"
        path.write_bytes(path.read_bytes() * 2)
        with pytest.raises(OSError, match=r"must hold the 8 bytes.*it holds 16"):
            store.finish()


def test_probing_of_another_version_is_left_out(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path / "run")
    for content in ('{"version": 99}', "nonsense", '{"version": 1, "token_level": {"students": {"a": 3}}}'):
        (copy / "probing.json").write_text(content, encoding="utf-8")
        assert library_of(copy).labels(STUDENTS[0])["concepts"] == {"names": [], "latents": []}


def test_probing_of_layers_that_have_been_edited_since_is_left_out(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = copied(run, tmp_path / "run")
    named = [{"latent": latent, "concept": "docstring", "f1_validation": 0.5, "f1": 0.4} for latent in (6, 7)]
    probing = {"version": 1, "token_level": {"students": {STUDENTS[0]: {"latents": named}}}}

    def found() -> list[int]:
        return sorted(read_concepts(copy).get(STUDENTS[0], {}))

    for identity in ({}, {"identity": {"edits": None}}):
        (copy / "probing.json").write_text(json.dumps(probing | identity), encoding="utf-8")
        assert found() == [6, 7], identity
    save_edits(copy / "layers" / STUDENTS[0], [Edit(latents=(1,), operation=Ablate())])
    assert found() == []
    assert "the layers have been edited since" in caplog.text
    (copy / "probing.json").write_text(json.dumps(probing | {"identity": {"edits": edits_digest(copy)}}))
    assert found() == [6, 7]


def test_a_database_knows_its_run(run: Path) -> None:
    require_database(run / "explorer.sqlite", identify_run(run))
    overview = library_of(run).overview()
    assert overview["run"] == "explored-run"
    assert [student["name"] for student in overview["students"]] == list(STUDENTS)  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType, reportCallIssue, reportIndexIssue, reportOptionalIterable]
    assert overview["curves"]
