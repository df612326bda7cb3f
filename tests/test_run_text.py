"""A run is measured on the text that it was trained on as it was then, for what is held out follows its content."""

import json
from pathlib import Path
from typing import cast

import pytest

from mxd.data.text import LocalText, TextIdentity, open_text
from mxd.evaluation.opening import open_run_text, read_finished_run
from tests.tiny_run import (
    Command,
    Settings,
    TinyRun,
    assert_refused,
    change_json,
    copied,
    tree,
)


@pytest.fixture
def moved(tiny: TinyRun, tmp_path: Path) -> TinyRun:
    """The run with a copy of its text, which is the same text at another place."""
    text = tmp_path / tiny.text.name
    text.write_bytes(tiny.text.read_bytes())
    run = copied(tiny.run, tmp_path / "run")
    for written in run.glob("evaluation*.json"):
        written.unlink()
    change_json(run / "run.json", lambda described: cast("Settings", described["config"]).update(text=[str(text)]))
    return TinyRun(tiny.model, text, run)


def append_dots(text: Path) -> None:
    rows = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    text.write_text("\n".join(json.dumps({"text": f"{row}."}) for row in rows), encoding="utf-8")


@pytest.mark.parametrize("words", ["evaluate", "frontier", "frontier --tokens 128", "explore --no-serve"])
def test_text_that_has_changed_since_training_is_refused_by_name_and_nothing_is_written(
    mxd: Command, moved: TinyRun, tmp_path: Path, words: str
) -> None:
    trained_on = {document.text for document in open_text([str(moved.text)]).documents(held_out=False)}
    append_dots(moved.text)
    held_out_now = [document.text[:-1] for document in open_text([str(moved.text)]).documents(held_out=True)]
    assert trained_on.intersection(held_out_now), "or there is no leak to refuse"
    before = tree(tmp_path)
    name, *options = words.split()
    ended = mxd(name, moved.run, *options)
    # Frontier first says what it is about to evaluate.
    last = ended.err.splitlines()[-1:]
    expected = (str(moved.run), f"{moved.text.name} has changed since", "Restore it", "--text")
    assert_refused(ended._replace(err="".join(last)), name, *expected)
    assert tree(tmp_path) == before


def test_the_same_text_elsewhere_and_text_that_is_named_are_measured_on(moved: TinyRun) -> None:
    description = read_finished_run(moved.run)
    digest = open_run_text(moved.run, description, ()).identity.digest
    assert digest == description["text"]["digest"]
    append_dots(moved.text)
    assert open_run_text(moved.run, description, (str(moved.text),)).identity.digest != digest


@pytest.mark.parametrize("change", [{"revision": "b" * 40}, {"split": "test"}, {"digest": "c" * 32}])
def test_another_commit_of_a_dataset_is_refused(
    moved: TinyRun, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    trained_on = TextIdentity(("someone/texts",), None, "a" * 40, "train")
    description = read_finished_run(moved.run) | {"text": trained_on._asdict()}

    def found(identity: TextIdentity) -> None:
        source = LocalText(identity.names, open_text([str(moved.text)]).documents(held_out=True))
        source.identity = identity
        monkeypatch.setattr("mxd.evaluation.opening.open_text", lambda *spec, **options: source)  # pyright: ignore

    found(trained_on)
    assert open_run_text(moved.run, description, ()).identity == trained_on
    found(trained_on._replace(**change))
    with pytest.raises(ValueError, match="someone/texts has changed since"):
        open_run_text(moved.run, description, ())
