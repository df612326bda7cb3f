"""What is wrong with a command line is told in a line about the command that was typed."""

import sys

import pytest

from mxd.cli.numbers import COUNTS
from mxd.cli.reading import run_command
from tests.tiny_run import Command, assert_refused

TRAIN = "train --model m --text t --layer 0 --tokens 5 --out x"
WRONG: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "an option of no command": (f"{TRAIN} --tokn 6", "train", ("There is no option --tokn 6.", "meant --tokens.")),
    "another command's option": ("evaluate RUN --latents 3", "evaluate", ("There is no option --latents 3.",)),
    "options that are missing": (
        "train --out x",
        "train",
        ("--model, --text, --layer and --tokens must be given.",),
    ),
    "both": ("edit RUN --latent 3", "edit", ("There is no option --latent 3.", "--student must be given.")),
    "a word too many": ("evaluate a b", "evaluate", ("There is no place for b.",)),
    "no run": ("explore", "explore", ("(Folder of a finished run) must be given.",)),
    "no value": ("evaluate a --tokens", "evaluate", ("--tokens",)),
    "no such choice": (f"{TRAIN} --schedule cosine", "train", ("cosine", "--schedule", "constant", "linear")),
    "no count": (f"{TRAIN} --tokens 4x", "train", ("--tokens", "must be a whole number such as 4096", "'4x'")),
    "a span backwards": (f"{TRAIN} --layer 3-1", "train", ("--layer", "spans such as 0-3", "'3-1'")),
    "within a group": ("privacy induce --foo", "privacy induce", ("no option --foo.", "--retained must be given.")),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_wrong_command_line_is_one_line_on_its_command(
    mxd: Command, monkeypatch: pytest.MonkeyPatch, case: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words, name, expected = WRONG[case]
    ended = mxd(*words.split())
    assert_refused(ended, name, *expected, f" mxd {name} --help shows all options.\n")
    for foreign in ("─", "│", "mxd probe", "mxd pretrain", "(required)"):
        assert foreign not in ended.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("observe", "mxd observe: a command must be one of train, evaluate, frontier"),
        ("--quick", "mxd: a command must be one of train, evaluate, frontier"),
        ("privacy observe", "mxd privacy observe: a command must be one of induce, sweep"),
    ],
)
def test_a_command_that_is_none_is_told_which_there_are(mxd: Command, words: str, sentence: str) -> None:
    ended = mxd(*words.split())
    assert ended.status == 2
    assert ended.err.startswith(sentence)
    assert ended.err.endswith("--help explains them.\n")
    assert len(ended.err.splitlines()) == 1


def test_what_a_command_says_itself_is_not_read_as_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    def speak(count: int = 1) -> None:
        """Say something."""
        sys.stderr.write("said\n")
        raise SystemExit(count)

    with pytest.raises(SystemExit) as end:
        run_command(speak, "mxd speak", ["--count", "2k"])
    assert end.value.code == 2000, "counts are read as everywhere"
    assert capsys.readouterr().err == "said\n"
    assert COUNTS is not None


def test_help_is_of_the_command_alone(mxd: Command) -> None:
    ended = mxd("train", "--help")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("usage: mxd train [-h]")
