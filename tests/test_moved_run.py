"""A run is used and continued wherever its model and its text are now, and from whichever folder."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from mxd.data.text import open_text
from mxd.evaluation.evaluate import evaluate_run
from mxd.runs.places import WORKING_FOLDER, recorded_place
from mxd.training.config import TrainConfig
from mxd.training.continuing import recorded_config, with_places
from mxd.training.decompose import decompose, make_plan
from tests import tiny_model
from tests.tiny_run import Command, Settings, TinyRun, assert_refused, change_json, copied, training, tree


class Moved:
    """A finished run that was begun in `before` with relative names, and all of it now below `after`."""

    def __init__(self, tiny: TinyRun, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.before, self.after = folder / "before", folder / "after"
        self.before.mkdir()
        copied(tiny.model, self.before / "models" / "tiny")
        (self.before / "tiny.jsonl").write_bytes(tiny.text.read_bytes())
        self.run = copied(tiny.run, self.before / "run")
        for written in self.run.glob("evaluation*.json"):
            written.unlink()
        change_json(self.run / "run.json", self._as_begun_here)
        self._patch = patch

    def _as_begun_here(self, described: Settings) -> None:
        cast("Settings", described["config"]).update(model="models/tiny", text=["tiny.jsonl"])
        cast("Settings", described["model"]).update(id="models/tiny")
        described[WORKING_FOLDER] = str(self.before)

    def elsewhere(self) -> None:
        """Move model and text, and the shell too."""
        self.before.rename(self.after)
        (self.after / "tiny.jsonl").rename(self.after / "renamed.jsonl")
        (self.after / "models").rename(self.after / "moved")
        self.run = self.after / "run"
        self._patch.chdir(self.after.parent)


@pytest.fixture(scope="module")
def small(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run of one student, which is evaluated in a moment."""
    run = tmp_path_factory.mktemp("small") / "run"
    config = recorded_config(json.loads((tiny.run / "run.json").read_text()))
    decompose(make_plan(replace(config, layer=0, kind="mxd", tokens=1024, eval_tokens=256)), run)
    return tiny._replace(run=run)


@pytest.fixture
def moved(small: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Moved:
    monkeypatch.chdir(tmp_path)
    return Moved(small, tmp_path, monkeypatch)


def test_names_are_looked_for_where_the_run_was_begun(tmp_path: Path) -> None:
    described = {WORKING_FOLDER: str(tmp_path / "a [b]")}
    for name in ("a [b]/model", "a [b]/texts"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a [b]" / "texts" / "one.txt").write_text("one")
    for name in ("model", "texts/one.txt", "texts"):
        assert recorded_place(name, described) == str(tmp_path / "a [b]" / name)
    assert open_text([recorded_place("texts/*.txt", described)]).identity.names == ("one.txt",)
    for name in ("gpt2", "someone/model", "none/*.txt", str(tmp_path / "x"), "~/x"):
        assert recorded_place(name, described) == name, "what is not there keeps its name"
    assert recorded_place("model", described, alias="model") == "model"
    assert recorded_place("model", {}) == "model", "runs of earlier versions do not say where they were begun"


def test_a_run_that_was_made_with_relative_names_is_used_from_another_folder(mxd: Command, moved: Moved) -> None:
    ended = mxd("evaluate", moved.run, "--student", "0/mxd-k4", "--tokens", 128, "--json")
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out)[0]["model"] == "models/tiny", "it is called what the run calls it"


COMMANDS = ("evaluate", "frontier", "frontier --tokens 128", "probe --data python", "steer", "explain --delphi D",
            "edit --student 0/mxd-k4 --latents 1 --operation ablate", "explore --no-serve")  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_a_model_that_has_moved_is_asked_for_by_option(mxd: Command, moved: Moved, words: str) -> None:
    (moved.before / "models").rename(moved.before / "moved")
    name, *options = words.split()
    before = tree(moved.run)
    ended = mxd(name, moved.run, *options)
    sentence = ended.err.splitlines()[-1]
    assert_refused(ended._replace(err=sentence), name, "'models/tiny'", "name its folder with --model")
    assert tree(moved.run) == before
    there = mxd(name, moved.run, *options, "--model", "./nowhere")
    assert "found no folder './nowhere'" in there.err.splitlines()[-1]
    assert "name its folder" not in there.err, "it was named"


@pytest.mark.parametrize("words", ["evaluate", "frontier", "explain --delphi D", "explore --no-serve"])
def test_text_that_has_moved_is_asked_for_by_option(mxd: Command, moved: Moved, words: str) -> None:
    (moved.before / "tiny.jsonl").rename(moved.before / "renamed.jsonl")
    name, *options = words.split()
    ended = mxd(name, moved.run, *options)
    sentence = ended.err.splitlines()[-1]
    assert_refused(ended._replace(err=sentence), name, "There is no file tiny.jsonl", "name its files with --text")


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("evaluate --tokens 128", "evaluation.json"),
        ("explore --no-serve --student 0/mxd-k4 --tokens 128", "explorer.sqlite"),
        ("explain --delphi {}/delphi --student 0/mxd-k4 --tokens 128", "delphi"),
        ("edit --student 0/mxd-k4 --latents 1 --operation ablate --tokens 128", "layers/0/mxd-k4/edits.json"),
        ("steer --student 0/mxd-k4 --latents 1 --samples 2 --new-tokens 2 --tokens 128", "steering/steering.json"),
    ],
)
def test_model_and_text_are_named_where_they_are_now(mxd: Command, moved: Moved, words: str, written: str) -> None:
    moved.elsewhere()
    name, *options = words.format(moved.run).split()
    places = ("--model", "after/moved/tiny", "--text", "after/renamed.jsonl")
    ended = mxd(name, moved.run, *options, *places)
    assert ended.status == 0, ended.err
    # The same documents are the run's own text, of which the whole run is evaluated for good.
    assert (moved.run / written).exists()


def test_the_runs_own_text_is_its_own_wherever_it_is(moved: Moved, small: TinyRun) -> None:
    moved.elsewhere()
    model, text = str(moved.after / "moved" / "tiny"), moved.after / "renamed.jsonl"
    own, expected = evaluate_run(moved.run, text=[str(text)], model=model), evaluate_run(small.run)
    assert own.on_own_text
    assert own.identity == expected.identity
    assert [row.ce for row in own.rows] == [row.ce for row in expected.rows]
    other = tiny_model.write_text(moved.after / "other.jsonl", documents=40, seed=9)
    assert not evaluate_run(moved.run, text=[str(other)], tokens=128, model=model).on_own_text


def test_another_model_is_refused_whatever_it_is_called(mxd: Command, moved: Moved) -> None:
    other = tiny_model.write_model(moved.before / "other", seed=1)
    ended = mxd("evaluate", moved.run, "--model", other)
    assert_refused(ended, "evaluate", "must be evaluated with the model that it was trained on", str(other), "--model")


def test_a_frontier_of_text_that_has_moved_is_on_the_runs_own(mxd: Command, moved: Moved) -> None:
    moved.elsewhere()
    places = ("--model", "after/moved/tiny", "--text", "after/renamed.jsonl", "--tokens", 128)
    ended = mxd("frontier", moved.run, "--out", "out", *places)
    assert ended.status == 0, ended.err
    assert [path.name for path in moved.run.glob("evaluation*.json")] == ["evaluation.json"]
    again = mxd("frontier", moved.run, "--out", "out", *places)
    assert "Evaluating" not in again.err, "what is there is taken"


def unfinished(run: Path) -> None:
    """Take a run back to before its layers were saved, which is quicker than interrupting it."""
    (run / "finished.json").unlink()


def layers(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("layers/*/*/*"))}


def begun(moved: Moved, mxd: Command, patch: pytest.MonkeyPatch, **settings: object) -> Path:
    """Train a run in its folder with relative names, and take it back to before its end."""
    patch.chdir(moved.before)
    given = TinyRun(Path("models/tiny"), Path("tiny.jsonl"), Path("unused"))
    assert mxd(*training(given, Path("own"), lr=0.02, cache="cache", **settings)).status == 0
    patch.chdir(moved.before.parent)
    run = moved.before / "own"
    unfinished(run)
    return run


def test_a_run_is_resumed_by_its_folder_alone(mxd: Command, moved: Moved, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(moved, mxd, monkeypatch)
    trained = layers(run)
    for path in run.glob("layers/*/*/*"):
        path.unlink()
    ended = mxd("train", "--resume", "--out", run)
    assert ended.status == 0, ended.err
    assert layers(run) == trained, "also what the layers say of their model"
    assert not Path("cache").exists(), "its cache is below the folder where it was begun"
    assert "finished already" in mxd("train", "--resume", "--out", run).err
    changed = mxd("train", "--resume", "--out", run, "--lr", "0.03")
    assert_refused(changed, "train", "config.lr (0.02 → 0.03)")


def test_a_run_goes_on_with_model_and_text_at_other_places(
    mxd: Command, moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(moved, mxd, monkeypatch)
    trained = layers(run)
    moved.elsewhere()
    run = moved.after / "own"
    sentence = mxd("train", "--resume", "--out", run).err.splitlines()[-1]
    assert "found no 'models/tiny'" in sentence
    assert "name its folder with --model" in sentence
    model = ("--model", moved.after / "moved" / "tiny")
    sentence = mxd("train", "--resume", "--out", run, *model).err.splitlines()[-1]
    assert "There is no file tiny.jsonl" in sentence
    assert "name its files with --text" in sentence
    text = ("--text", moved.after / "renamed.jsonl")
    ended = mxd("train", "--resume", "--out", run, *model, *text)
    assert ended.status == 0, ended.err
    weights = {name: content for name, content in trained.items() if name.endswith(".safetensors")}
    assert {name: content for name, content in layers(run).items() if name.endswith(".safetensors")} == weights
    assert str(moved.after) not in "".join(path.read_text() for path in run.glob("layers/*/*/config.json"))


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_does_not_go_on_with_another_model_or_text(
    mxd: Command, moved: Moved, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    run = begun(moved, mxd, monkeypatch)
    if finished:
        (run / "finished.json").write_text("{}")
    before = tree(run)
    other = tiny_model.write_model(moved.before / "other", seed=1)
    ended = mxd("train", "--resume", "--out", run, "--model", other, "--cache", "None")
    assert_refused(ended, "train", "model.fingerprint", "name another --out")
    text = tiny_model.write_text(moved.before / "other.jsonl", documents=60)
    ended = mxd("train", "--resume", "--out", run, "--text", text, "--cache", "None")
    assert_refused(ended, "train", "text.digest", "name another --out")
    assert tree(run) == before


def test_all_layers_are_recorded_by_number_and_resumed_alike(mxd: Command, tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mxd(*training(tiny, run, layer="all")).status == 0
    described = json.loads((run / "run.json").read_text())
    assert described["config"]["layer"] == [0, 1]
    assert described[WORKING_FOLDER] == os.getcwd()
    assert sorted(path.parent.name for path in run.glob("layers/*/*")) == ["0", "1"]
    for layer in ("all", "0-1", ("0", "1")):
        assert "finished already" in mxd(*training(tiny, run, "--resume", layer=layer)).err
    refused = mxd(*training(tiny, run, "--resume", layer="1"))
    assert_refused(refused, "train", "config.layer.0 (0 → 1)")


def test_a_folder_that_is_no_run_cannot_be_resumed_alone(mxd: Command, tmp_path: Path) -> None:
    ended = mxd("train", "--resume", "--out", tmp_path / "no-run")
    assert_refused(ended, "train", "must be the folder of a run to resume it without other options", "check the path")
    assert mxd("train", "--resume", "--out", tmp_path / "no-run", "--help").status == 0


def test_what_is_recorded_is_read_back_in_python(tiny: TinyRun, tmp_path: Path) -> None:
    stored = json.loads((tiny.run / "run.json").read_text())
    config = recorded_config(stored)
    assert isinstance(config, TrainConfig)
    assert with_places(config, stored) == config, "absolute names stay"
    plan = make_plan(config, stored=stored)
    decompose(plan, tiny.run, resume=True)
    for damage in ({"config": {"model": 3}}, {"config": {}}, {}):
        with pytest.raises(ValueError, match=r"run\.json must hold the options of mxd train under config"):
            recorded_config({"command": "train", **damage})
    with pytest.raises(ValueError, match="must be one of mxd train"):
        recorded_config({"command": "pretrain", "config": {}})
