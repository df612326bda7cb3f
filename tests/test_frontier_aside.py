"""A frontier on other tokens or other text than a run's `evaluation.json`: that stays, and so do its pictures."""

from pathlib import Path
from typing import cast

import pytest

from mxd.evaluation.comparison import compare_runs, frontier_folder, write_frontier
from mxd.evaluation.record import read_record
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from tests.tiny_run import Command, Settings, TinyRun, assert_refused, change_json, copied, training, tree

FILES = ["frontier.json", "frontier.md", "frontier.png", "frontier.svg", "report.html"]


@pytest.fixture(scope="module")
def trained(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("aside") / "run"
    config = TrainConfig(
        model=str(tiny.model),
        text=(str(tiny.text),),
        layer=(0,),
        kind=("transcoder",),
        k=(2, 4),
        num_latents=16,
        tokens=1024,
        batch_tokens=512,
        context=32,
        eval_tokens=512,
        device="cpu",
        threads=1,
    )
    decompose(make_plan(config), run)
    return run


@pytest.fixture(scope="module")
def full(trained: Path) -> Path:
    run = copied(trained, trained.with_name("full"))
    found = compare_runs([run])
    assert sorted(write_frontier(found, frontier_folder(found, None))) == FILES[:-1]
    return run


@pytest.fixture
def drawn(full: Path, tmp_path: Path) -> Path:
    return copied(full, tmp_path / "run")


def test_fewer_tokens_leave_the_full_evaluation_and_its_frontier(mxd: Command, drawn: Path) -> None:
    before = tree(drawn)
    first = mxd("frontier", drawn, "--tokens", 128)
    assert (first.status, "Evaluating" in first.err) == (0, True)
    after = tree(drawn)
    assert {path: content for path, content in after.items() if path in before} == before
    (record,) = drawn.glob("evaluation-*.json")
    digest = record.stem.removeprefix("evaluation-")
    assert sorted(path.name for path in (drawn / f"frontier-{digest}").iterdir()) == FILES
    assert len(after) == len(before) + len(FILES) + 2
    assert read_record(record).identity.tokens == 128
    assert read_record(drawn / "evaluation.json").identity.tokens == 512
    for tokens, folder in ((128, drawn / f"frontier-{digest}"), (512, drawn)):
        said: list[str] = []
        found = compare_runs([drawn], tokens=tokens, say=said.append)
        assert (said, found.stored[0].identity.tokens) == ([], tokens)
        assert frontier_folder(found, drawn) == frontier_folder(found, None) == folder


def test_where_there_is_no_evaluation_one_on_fewer_tokens_is_the_runs(trained: Path, tmp_path: Path) -> None:
    run = copied(trained, tmp_path / "run")
    for expected in (1, 0):
        said: list[str] = []
        found = compare_runs([run], tokens=128, say=said.append)
        assert (len(said), frontier_folder(found, None)) == (expected, run)
    assert read_record(run / "evaluation.json").identity.tokens == 128
    assert not [*run.glob("*-*")]
    (run / "evaluation.json").write_text("{", encoding="utf-8")
    compare_runs([run], tokens=160)
    assert read_record(run / "evaluation.json").identity.tokens == 160, "what could not be read is made anew"


def of_another_version(content: Settings) -> None:
    content["identity"] = cast("Settings", content["identity"]) | {"metrics": -1}


def test_what_another_version_measured_stays_and_pictures_of_other_numbers_go(drawn: Path) -> None:
    evaluation = drawn / "evaluation.json"
    change_json(evaluation, of_another_version)
    before = evaluation.read_bytes()
    found = compare_runs([drawn], tokens=128)
    write_frontier(found, folder := frontier_folder(found, None))
    assert (evaluation.read_bytes(), folder.parent) == (before, drawn)
    (aside,) = drawn.glob("evaluation-*.json")
    change_json(aside, of_another_version)
    compare_runs([drawn], tokens=128)
    assert sorted(path.name for path in folder.iterdir()) == ["frontier.png", "report.html"]


def test_the_runs_own_text_elsewhere_is_its_own_and_other_text_is_not(
    mxd: Command, tiny: TinyRun, drawn: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(tiny.text.read_bytes())
    before = tree(drawn)
    said: list[str] = []
    found = compare_runs([drawn], text=[str(moved)], say=said.append)
    assert (said, frontier_folder(found, None)) == ([], drawn)
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"document {number} of quite another text, which is long" for number in range(400)))
    assert mxd("frontier", drawn, "--text", other, "--tokens", 128).status == 0
    (folder,) = drawn.glob("frontier-*")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert (drawn / f"evaluation-{folder.name.removeprefix('frontier-')}.json").is_file()
    assert tree(drawn)[str(drawn / "evaluation.json")] == before[str(drawn / "evaluation.json")]


def test_a_refusal_advises_what_differs(mxd: Command, tiny: TinyRun, drawn: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(reversed(tiny.text.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    runs = {"fewer": {"eval_tokens": 256}, "both": {"eval_tokens": 256, "text": other}}
    for name, changes in runs.items():
        assert mxd(*training(tiny, tmp_path / name, **changes)).status == 0
    out = ("--out", tmp_path / "out")
    fewer = mxd("frontier", drawn, tmp_path / "fewer", *out)
    numbers = "the number of evaluation tokens (512 and 256)"
    assert_refused(fewer, "frontier", f"differ in {numbers}; give --tokens, so that")
    both = mxd("frontier", drawn, tmp_path / "both", *out)
    assert_refused(both, "frontier", f"differ in {numbers}, the evaluation text; give --text and --tokens, so that")
    # As advised; drawing it takes longer than it shows.
    compare_runs([drawn, tmp_path / "fewer"], tokens=256)
    assert read_record(drawn / "evaluation.json").identity.tokens == 512
