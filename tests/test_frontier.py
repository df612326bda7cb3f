import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch

from mxd.checkpoint import edits_digest, save_edits
from mxd.data.text import open_text
from mxd.edits import Ablate, Edit
from mxd.evaluation.comparison import compare_runs
from mxd.evaluation.evaluate import evaluate_run
from mxd.evaluation.faithfulness import EvaluationText, model_losses, replacement
from mxd.evaluation.intervals import seed_interval
from mxd.evaluation.opening import open_run, read_finished_run
from mxd.evaluation.record import read_record, write_record
from mxd.evaluation.rows import METRICS_VERSION, EvaluationRow
from mxd.evaluation.students import load_students
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from tests.test_cli import process
from tests.tiny_run import (
    Command,
    Settings,
    TinyRun,
    assert_refused,
    change_json,
    copied,
    other_model,
    training,
    tree,
)

FILES = ["frontier.json", "frontier.md", "frontier.png", "frontier.svg", "report.html"]


@pytest.fixture(scope="module")
def evaluated(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two layers, Ks and seeds, trained and drawn as a person would."""
    run = tmp_path_factory.mktemp("frontier") / "run"
    config = TrainConfig(
        model=str(tiny.model),
        text=(str(tiny.text),),
        layer=(0, 1),
        kind=("transcoder",),
        k=(2, 4),
        seeds=2,
        num_latents=16,
        tokens=1024,
        batch_tokens=512,
        context=32,
        eval_tokens=512,
        device="cpu",
        threads=1,
    )
    decompose(make_plan(config), run)
    ended = process("frontier", run, "--together")
    assert (ended.status, "it is not evaluated yet" in ended.err) == (0, True)
    assert "All layers" in ended.out
    return run


def rows_of(run: Path) -> list[EvaluationRow]:
    return list(read_record(run / "evaluation.json").rows)


def test_one_command_writes_the_whole_frontier(evaluated: Path) -> None:
    assert all((evaluated / name).is_file() for name in [*FILES, "evaluation.json"])
    rows = rows_of(evaluated)
    assert len(rows) == 2 * 2 * 2 + 2 * 2
    stored = json.loads((evaluated / "frontier.json").read_text(encoding="utf-8"))
    assert [EvaluationRow.from_json(row) for row in stored["rows"]] == rows
    assert [(point["layer"], point["k"]) for point in stored["points"]] == [
        (layer, k) for layer in (0, 1, None) for k in (2, 4)
    ]
    for point in stored["points"]:
        values = [row.ce_increase for row in rows if (row.layer, row.k) == (point["layer"], point["k"])]
        assert point["ce_increase"] == pytest.approx(sum(values) / 2)
        assert point["ce_increase_over_seeds"] == pytest.approx(seed_interval(values))
        assert point["ce_increase_over_documents"] is None
        assert (point["nmse"] is None) == (point["layer"] is None)
        assert point["parameters"] > 0 < point["flops_per_token"]
    table = (evaluated / "frontier.md").read_text(encoding="utf-8")
    assert table.count("| all | Transcoder | 2 |") == 1
    assert "Student's t" in table
    low, high = cast("tuple[float, float]", rows[0].kl_interval)
    assert f"{rows[0].kl:.4f} [{low:.4f}, {high:.4f}]" in table


def test_all_layers_together_add_up_what_each_has(evaluated: Path) -> None:
    rows = {(found.layer, found.id): found for found in rows_of(evaluated)}
    at_once = rows[None, "together/transcoder-k4-seed1"]
    parts = [rows[layer, "transcoder-k4-seed1"] for layer in (0, 1)]
    assert (at_once.kind, at_once.k, at_once.seed, at_once.num_latents) == ("transcoder", 4, 1, 16)
    assert at_once.parameters == sum(cast("int", part.parameters) for part in parts)
    assert at_once.l0 is at_once.nmse is at_once.jacobian_cosine is None
    assert at_once.ce_base == parts[0].ce_base


def test_what_is_evaluated_is_not_evaluated_again(mxd: Command, evaluated: Path, tmp_path: Path) -> None:
    before = {name: (evaluated / name).read_bytes() for name in ("evaluation.json", "report.html")}
    ended = mxd("frontier", evaluated, "--json")
    assert (ended.status, "Evaluating" in ended.err) == (0, False)
    assert len(json.loads(ended.out)["points"]) == 6
    assert mxd("frontier", evaluated, "--out", tmp_path / "new" / "folder").status == 0
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == FILES
    said: list[str] = []
    compare_runs([evaluated], tokens=512, say=said.append)
    assert said == []
    assert {name: (evaluated / name).read_bytes() for name in before} == before


def test_a_later_evaluation_leaves_no_frontier_of_earlier_numbers(
    mxd: Command, evaluated: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    assert mxd("evaluate", run, "--tokens", 256).status == 0
    assert not [name for name in ("frontier.svg", "frontier.md", "frontier.json") if (run / name).exists()]
    assert (run / "frontier.png").is_file()


def test_intervals_over_documents_are_those_of_the_definition(tiny: TinyRun, evaluated: Path) -> None:
    """Score each document's tokens one by one, and resample whole documents, both models at once."""
    opened = open_run(evaluated, read_finished_run(evaluated), (), None, None)
    found = next(row for row in rows_of(evaluated) if row.layer == 1)
    description = read_finished_run(evaluated)
    network = load_students(evaluated, description["students"], [f"1/{found.id}"])[0].candidate.network
    model = cast("torch.nn.Module", opened.language_model.model)
    contexts, documents = opened.held_out.contexts, opened.held_out.documents
    sums: dict[int, list[float]] = {}
    for context, numbers in zip(contexts, documents, strict=True):
        one = EvaluationText(contexts=context[None], documents=torch.arange(len(context))[None], special_ids=())
        losses = model_losses(model, {"new": replacement(model, {1: network}, opened.text)}, one)
        # Every token is a document of its own here, and the first is not predicted.
        for place in range(1, len(context)):
            entry = sums.setdefault(int(numbers[place]), [0.0, 0.0])
            entry[0] += float(losses["new"].ce_sums[place] - losses[""].ce_sums[place])
            entry[1] += 1
    values = torch.tensor([sums[number] for number in sorted(sums)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = [values[torch.randint(len(values), (len(values),), generator=generator)].sum(0) for _ in range(1000)]
    increases = sorted(float(total / tokens) for total, tokens in drawn)
    assert found.documents_evaluated == len(sums) > 2
    assert found.ce_increase_interval is not None
    assert found.ce_increase_interval == pytest.approx((increases[25], increases[974]), rel=0.03)
    assert found.ce_increase_interval[0] < found.ce_increase < found.ce_increase_interval[1]
    assert found.kl_interval is not None
    assert found.kl_interval[0] < found.kl < found.kl_interval[1]


def test_one_document_says_nothing_of_others(tiny: TinyRun, evaluated: Path) -> None:
    measured = evaluate_run(evaluated, tokens=32, students=["0/transcoder-k2-seed0"]).rows[0]
    assert measured.documents_evaluated == 1
    assert measured.ce_increase_interval is measured.kl_interval is measured.loss_recovered_interval is None


def old_version(stored: Settings) -> None:
    cast("Settings", stored["identity"])["metrics"] = METRICS_VERSION - 1


def before_identities(stored: Settings) -> None:
    del stored["identity"]


def lost_key(stored: Settings) -> None:
    del cast("list[Settings]", stored["rows"])[0]["kl_interval"]


def strange_row(stored: Settings) -> None:
    cast("list[object]", stored["rows"])[0] = 1


def lost_row(stored: Settings) -> None:
    cast("list[Settings]", stored["rows"]).pop(0)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (old_version, f"of version {METRICS_VERSION - 1}"),
        (before_identities, "of another version of mxd"),
        (lost_key, "kl_interval missing"),
        (strange_row, "must hold facts and rows"),
        (lost_row, "does not have all of its students"),
    ],
)
def test_an_old_evaluation_is_made_anew_and_the_reason_said(
    mxd: Command, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: object, reason: str
) -> None:
    run = copied(evaluated, tmp_path / "run")
    change_json(run / "evaluation.json", damage)  # pyright: ignore[reportArgumentType]
    asked: list[Path] = []

    def evaluate(run: Path, **more: object) -> None:
        asked.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr("mxd.evaluation.comparison.evaluate_run", evaluate)
    ended = mxd("frontier", run)
    assert (ended.status, asked) == (130, [run])
    assert reason in ended.err


def without_edits_key(stored: Settings) -> None:
    del cast("Settings", stored["identity"])["edits"]


def test_a_run_is_evaluated_anew_when_its_edits_are_others_and_the_reason_said(
    mxd: Command, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(evaluated, tmp_path / "run")
    # As it was written before edits were known.
    change_json(run / "evaluation.json", without_edits_key)
    assert "Evaluating" not in mxd("frontier", run).err
    folder = run / "layers/0/transcoder-k2-seed0"
    save_edits(folder, [Edit(latents=(0,), operation=Ablate())])
    with monkeypatch.context() as patch:
        patch.setattr("mxd.evaluation.comparison.evaluate_run", _interrupted)
        ended = mxd("frontier", run)
        assert (ended.status, "is of other edits of its layers" in ended.err) == (130, True)
    record = evaluate_run(run).record
    assert record.identity.edits == edits_digest(run) is not None
    write_record(run / "evaluation.json", record)
    said: list[str] = []
    # An edited layer is compared with others.
    frontier = compare_runs([run, evaluated], say=said.append)
    assert said == []
    assert "edits" not in cast("Settings", frontier.to_json()["identity"])
    save_edits(folder)
    with monkeypatch.context() as patch:
        patch.setattr("mxd.evaluation.comparison.evaluate_run", _interrupted)
        assert mxd("frontier", run).status == 130


def _interrupted(run: Path, **more: object) -> None:
    raise KeyboardInterrupt


def test_runs_side_by_side_are_measured_one_after_the_other(
    mxd: Command, tiny: TinyRun, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / "slow", tmp_path / "fast"]
    for run, lr in zip(runs, (0.001, 0.01), strict=True):
        assert mxd(*training(tiny, run, lr=lr, eval_tokens=512)).status == 0

    real = evaluate_run

    def interrupted(run: Path, **more: object) -> object:
        if run == runs[1]:
            raise KeyboardInterrupt
        return real(run, **more)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr("mxd.evaluation.comparison.evaluate_run", interrupted)
        assert mxd("frontier", *runs, evaluated, "--out", tmp_path / "out").status == 130
    assert (runs[0] / "evaluation.json").is_file()
    assert not (tmp_path / "out").exists()

    ended = mxd("frontier", *runs, evaluated, "--out", tmp_path / "out", "--json")
    assert ended.status == 0
    assert f"Evaluating {runs[0]}" not in ended.err
    assert f"Evaluating {runs[1]} (2 of 3)" in ended.err
    points = json.loads(ended.out)["points"]
    names = {point["name"] for point in points}
    assert len(names) == 3
    assert {name.split()[1] for name in names} == {"lr=0.001", "lr=0.01", "lr=auto"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


def test_other_text_leaves_the_runs_own_evaluation_alone(
    mxd: Command, tiny: TinyRun, evaluated: Path, tmp_path: Path
) -> None:
    run = copied(evaluated, tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"document {number} of quite another text, which is long" for number in range(400)))
    before = tree(run)
    first = mxd("frontier", run, "--text", other, "--tokens", 128, "--out", tmp_path / "out")
    assert (first.status, "Evaluating" in first.err) == (0, True)
    said: list[str] = []
    compare_runs([run], text=[str(other)], tokens=128, say=said.append)
    assert said == []
    assert len({path: content for path, content in tree(run).items() if path not in before}) == 1
    assert {path: content for path, content in tree(run).items() if path in before} == before
    other.write_text(other.read_text().replace("quite", "now"))
    compare_runs([run], text=[str(other)], tokens=128, say=said.append)
    assert len(said) == 1, "the text has changed"


def shorter_context(tiny: TinyRun, run: Path) -> None:
    change_json(run / "run.json", lambda described: cast("Settings", described["config"]).update(context=16))


def passthrough(tiny: TinyRun, run: Path) -> None:
    change_json(
        run / "run.json",
        lambda described: cast("Settings", described["config"]).update(special_positions="passthrough"),
    )


def fewer_tokens(tiny: TinyRun, run: Path) -> None:
    change_json(run / "run.json", lambda described: cast("Settings", described["config"]).update(eval_tokens=256))


def other_text(tiny: TinyRun, run: Path) -> None:
    lines = tiny.text.read_text(encoding="utf-8").splitlines()
    other = run.with_name("other.jsonl")
    other.write_text("\n".join(reversed(lines)), encoding="utf-8")

    def change(described: Settings) -> None:
        cast("Settings", described["config"]).update(text=[str(other)])
        described["text"] = open_text([str(other)]).identity._asdict()

    change_json(run / "run.json", change)


def other_weights(tiny: TinyRun, run: Path) -> None:
    sizes = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = other_model(tiny, run.with_name("wider"), "llama", **sizes, intermediate_size=24, vocab_size=259)

    def change(described: Settings) -> None:
        cast("Settings", described["config"]).update(model=str(model))
        cast("Settings", described["model"]).update(fingerprint="another")

    change_json(run / "run.json", change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shorter_context, "differ in the length of a context (32 and 16); give runs that were trained alike"),
        (passthrough, "what happens at special positions (replace and passthrough)"),
        (fewer_tokens, "the number of evaluation tokens (512 and 256); give --tokens, so"),
        (other_text, "differ in the evaluation text; give --text, so"),
        (other_weights, "differ in the language model; give runs"),
    ],
)
@pytest.mark.parametrize("measured", [True, False])
def test_runs_that_do_not_compare_are_refused_by_name_and_nothing_is_written(
    mxd: Command, tiny: TinyRun, evaluated: Path, tmp_path: Path, change: object, words: str, measured: bool
) -> None:
    run = copied(evaluated, tmp_path / "run")
    other = copied(evaluated, tmp_path / "other")
    for path in (run, other) if not measured else (other,):
        (path / "evaluation.json").unlink()
    change(tiny, other)  # pyright: ignore[reportCallIssue]
    before = tree(tmp_path)
    ended = mxd("frontier", run, other, "--out", tmp_path / "out")
    assert_refused(ended, "frontier", f"{run} and {other}", words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("{run} {run} --out {out}", "must be named only once"),
        ("{run} {other}", "--out must name a folder"),
        ("{run} {other} --out {other}", "must not be the folder of a run"),
        ("{run} --out {run}/run.json", "is a file"),
        ("{run} {unfinished} --out {out}", "must be a finished run; it is not; finish it with mxd train --resume"),
        ("{out}", "must be the folder of a run"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    mxd: Command, evaluated: Path, tmp_path: Path, words: str, expected: str
) -> None:
    folders = {"run": evaluated, "other": copied(evaluated, tmp_path / "other"), "out": tmp_path / "out"}
    folders["unfinished"] = copied(evaluated, tmp_path / "unfinished")
    (folders["unfinished"] / "finished.json").unlink()
    before = tree(tmp_path)
    assert_refused(mxd("frontier", *words.format(**folders).split()), "frontier", expected)
    assert tree(tmp_path) == before


def test_a_request_that_a_later_run_cannot_meet_is_refused_before_any_is_evaluated(
    mxd: Command, tiny: TinyRun, evaluated: Path, tmp_path: Path
) -> None:
    runs = [copied(evaluated, tmp_path / name) for name in ("whole", "single")]
    for run in runs:
        (run / "evaluation.json").unlink()

    def keep_one_layer(described: Settings) -> None:
        described["students"] = cast("list[Settings]", described["students"])[:4]

    change_json(runs[1] / "run.json", keep_one_layer)
    before = tree(tmp_path)
    ended = mxd("frontier", *runs, "--together", "--out", tmp_path / "out")
    assert_refused(ended, "frontier", "together needs students of several layers", f"{runs[1]} are all of layer 0")
    change_json(runs[1] / "run.json", lambda described: cast("list[Settings]", described["students"])[0].pop("id"))
    assert_refused(mxd("frontier", *runs, "--out", tmp_path / "out"), "frontier", "students.0 lacks id")
    assert set(tree(tmp_path)) == set(before)
