import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn, cast

import pytest

from mxd.cli.main import main
from mxd.cli.numbers import parse_count
from mxd.runs.faults import TrainingFault, TrainingInterrupted
from mxd.runs.snapshots import SnapshotError
from tests.tiny_run import (
    TINY,
    Command,
    Ended,
    Settings,
    TinyRun,
    assert_refused,
    copied,
    training,
    tree,
)

KEYS = [
    "id",
    "model",
    "layer",
    "kind",
    "k",
    "k_trained",
    "num_latents",
    "d_hidden",
    "activation",
    "encoder",
    "rank",
    "normalize_experts",
    "shared_expert",
    "selection",
    "shared_penalty",
    "l1_coefficient",
    "random_k",
    "init",
    "seed",
    "parameters",
    "flops_per_token",
    "tokens_trained",
    "tokens_evaluated",
    "documents_evaluated",
    "l0",
    "nmse",
    "fvu",
    "ce_base",
    "ce",
    "ce_increase",
    "ce_increase_interval",
    "ce_zero",
    "ce_mean",
    "loss_recovered",
    "loss_recovered_interval",
    "bits_per_byte_base",
    "bits_per_byte",
    "kl",
    "kl_interval",
    "dead_fraction",
    "specialisation",
    "specialisation_constant_gain",
    "ngram_agreement",
    "jacobian_cosine",
    "stable_rank",
    "numerical_rank",
    "gini",
    "top_share",
    "effective_latents",
    "top_energy_share",
    "always_on",
    "always_on_share",
    "base_share",
    "fvu_permuted",
    "special_positions",
    "nmse_all_positions",
    "fvu_all_positions",
]
"""The keys of a row of `mxd evaluate --json`, which people's scripts read."""


def test_layers_that_do_not_fit_in_memory_end_in_a_sentence_and_no_traceback(
    mxd: Command, tiny: TinyRun, tmp_path: Path
) -> None:
    ended = mxd(*training(tiny, tmp_path / "run", num_latents="100B"))
    assert ended.status == 2
    assert "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("mxd train: what was asked for must fit in memory")


@pytest.mark.parametrize("flag", ["--k", "--tokens", "--lr", "--context"])
def test_a_value_of_the_wrong_type_is_refused_without_a_traceback(
    mxd: Command, tiny: TinyRun, tmp_path: Path, flag: str
) -> None:
    ended = mxd(*training(tiny, tmp_path / "run"), flag, "abc")
    assert (ended.status, ended.out) == (2, "")
    assert f"Error parsing {flag}" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_an_unknown_command_and_a_missing_argument_are_refused(mxd: Command) -> None:
    for arguments, expected in {("observe",): "observe", ("train", "--out", "x"): "--model"}.items():
        ended = mxd(*arguments)
        assert ended.status == 2
        assert expected in ended.err
        assert "Traceback" not in ended.err


def test_an_existing_run_is_neither_overwritten_nor_continued_otherwise_than_it_began(
    mxd: Command, tiny: TinyRun
) -> None:
    before = tree(tiny.run)
    assert_refused(mxd(*training(tiny, tiny.run)), "train", "exists", "pass --resume", "name another --out")
    changed = mxd(*training(tiny, tiny.run, "--resume", **(TINY | {"lr": 0.02, "context": 16})))
    assert_refused(changed, "train", "config.lr (0.01 → 0.02)", "config.context (32 → 16)", "name another --out")
    assert tree(tiny.run) == before


def test_resuming_a_finished_run_changes_nothing(mxd: Command, tiny: TinyRun) -> None:
    before = tree(tiny.run)
    ended = mxd(*training(tiny, tiny.run, "--resume", **TINY))
    assert ended.status == 0
    assert "is finished already" in ended.err
    assert tree(tiny.run) == before


def test_a_run_is_not_continued_on_a_model_whose_weights_have_changed(
    mxd: Command, tiny: TinyRun, tmp_path: Path
) -> None:
    model = copied(tiny.model, tmp_path / "model")
    assert mxd(*training(tiny, tmp_path / "run", model=model)).status == 0
    (tmp_path / "run/finished.json").unlink()
    before = tree(tmp_path / "run")
    weights = model / "model.safetensors"
    # The last byte of the last float, which is sign and exponent.
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x40")
    ended = mxd(*training(tiny, tmp_path / "run", "--resume", model=model))
    assert_refused(ended, "train", "model.fingerprint", "name another --out")
    assert tree(tmp_path / "run") == before


def test_a_dry_run_shows_the_students_and_writes_nothing(mxd: Command, tiny: TinyRun, tmp_path: Path) -> None:
    ended = mxd(*training(tiny, tmp_path / "run", "--dry-run"))
    assert ended.status == 0
    assert "transcoder-k4" in ended.err
    assert "1,024 tokens" in ended.err
    assert not (tmp_path / "run").exists()


def test_square_brackets_in_names_are_shown_as_they_are(mxd: Command, tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "[bold]a" / "[b]"
    ended = mxd(*training(tiny, run))
    assert ended.status == 0
    assert f"Wrote 1 layer to {run}/layers." in ended.err
    ended = mxd("evaluate", run)
    assert ended.status == 0
    assert f"Wrote {run}/evaluation.json" in ended.err


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (TrainingInterrupted("SIGINT after step 3"), 130, "SIGINT after step 3"),
        (KeyboardInterrupt(), 130, "interrupted."),
        (TrainingFault("loss was NaN"), 3, "loss was NaN"),
        (SnapshotError("disk full"), 3, "disk full"),
        (ValueError("two\n  lines"), 2, "two lines"),
        (PermissionError(13, "Permission denied", "/there"), 2, "/there must be readable and writable"),
        (RuntimeError("CUDA out of memory."), 2, "must fit in memory"),
    ],
)
def test_how_a_command_ends_is_its_exit_status(
    mxd: Command, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: BaseException, status: int, sentence: str,
) -> None:  # fmt: skip
    def fail(config: object, stored: object) -> NoReturn:
        raise error

    monkeypatch.setattr("mxd.cli.train.make_plan", fail)
    ended = mxd(*training(tiny, tmp_path / "run"))
    assert ended.status == status
    assert sentence in ended.err
    assert len(ended.err.splitlines()) == 1
    monkeypatch.setenv("MXD_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(training(tiny, tmp_path / "run"))


def test_json_is_one_array_with_exactly_the_documented_keys(mxd: Command, tiny: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny.run, tmp_path / "run")
    ended = mxd("evaluate", run, "--json", "--together", "--student", "mxd-k4")
    assert (ended.status, ended.err) == (0, "")
    rows = cast("list[Settings]", json.loads(ended.out))
    assert [(row["layer"], row["id"]) for row in rows] == [(0, "mxd-k4"), (1, "mxd-k4"), (None, "together/mxd-k4")]
    assert all(sorted(row) == sorted(KEYS) for row in rows)
    assert not (run / "evaluation.json").exists(), "a part of the run must not stand for the whole"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("2M", 2_000_000),
        ("1.5k", 1500),
        ("4_096", 4096),
        ("480m", 480_000_000),
        ("-1", -1),
        ("1B", 10**9),
        ("9,007,199,254,740,993", 2**53 + 1),
    ],
)
def test_counts_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "2.5", "1e3", "2MB", "abc", "_", "1.0001k", "8,16", "4,", "1,3"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="count must be a whole number such as 4096"):
        parse_count(text)


def process(*arguments: object) -> Ended:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "mxd", *map(str, arguments)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_help_lists_the_commands() -> None:
    ended = process("--help")
    assert (ended.status, ended.err) == (0, "")
    assert all(command in ended.out for command in ("train", "evaluate", "demo"))


def test_a_reader_that_has_read_enough_is_no_fault() -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mxd", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_refusal_is_the_only_line_of_a_process(tiny: TinyRun, tmp_path: Path) -> None:
    assert_refused(process(*training(tiny, tmp_path / "run", layer=2)), "train", "layer must lie in [0, 1]")
    assert not (tmp_path / "run").exists()


def test_train_and_evaluate_run_from_a_shell(tiny: TinyRun, tmp_path: Path) -> None:
    trained = process(*training(tiny, tmp_path / "run", kind=("mxd", "transcoder")))
    assert (trained.status, trained.out) == (0, "")
    assert "Wrote 2 layers" in trained.err
    evaluated = process("evaluate", tmp_path / "run", "--json")
    assert (evaluated.status, evaluated.err) == (0, "")
    assert [row["id"] for row in json.loads(evaluated.out)] == ["mxd-k4", "transcoder-k4"]
    for name in ("evaluation.json", "frontier.png", "report.html", "metrics.jsonl", "layers/0/mxd-k4/config.json"):
        assert (tmp_path / "run" / name).is_file()
