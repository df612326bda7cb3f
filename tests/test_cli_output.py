import json
import math

import pytest

from mxd.cli.output import go_on_with_resume, notes, print_json


def test_results_are_json_whatever_is_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[31m \x9b31m \u202e \u2028 \x7f \udcff"
    value = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"ü→": "naïve 猫 🎉", "hostile": hostile}, "c": None, "d": True}
    print_json(value)
    printed = capsys.readouterr().out
    expected = {**value, "a": [None, 1.5, [None, 2]]}
    assert json.loads(printed) == expected
    assert printed.endswith("}\n")
    assert "naïve 猫 🎉" in printed
    assert all(character.isprintable() for character in printed.replace("\n", ""))


def test_names_of_folders_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    notes().print("Wrote runs/[red]a[/red].")
    assert capsys.readouterr() == ("", "Wrote runs/[red]a[/red].\n")


@pytest.mark.parametrize("given", [["train", "--out", "a b"], ["train", "--resume", "--out", "a b"]])
def test_what_was_stopped_says_how_to_go_on(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mxd", *given])
    words = str(go_on_with_resume(KeyboardInterrupt()))
    assert words.startswith("stopped by SIGINT; go on with: mxd train ")
    assert words.count("--resume") == 1
    assert "'a b'" in words
