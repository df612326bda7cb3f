"""What `--data` names: labelled files, the paper's data sets, names of persons, and Python source."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mxd.bundled import held_out_modules
from mxd.data.holdout import is_held_out
from mxd.data.stdlib import stdlib_modules
from mxd.data.text import STDLIB
from mxd.printable import printable
from mxd.probing.examples import TEXTS, ProbingSet, SpanSet, labelled_by
from mxd.probing.files import read_labelled_file
from mxd.probing.hub_sets import HUB_SETS, SURNAMES, load_hub_set, load_surnames
from mxd.probing.python_concepts import python_spans

PYTHON = "python"
"""Names Python source with the concepts of Python's own tokenizer and parser."""
PAPER = "paper"
"""Stands for the eight sets of the paper."""


class DataName(NamedTuple):
    """What one word of `--data` says."""

    name: str
    """A name that is known, or empty for a labelled file."""
    place: str | None
    """A file, folder or hub id; None for where the name usually is."""


def default_data(text: Sequence[str]) -> list[str]:
    """Return what a run is probed with when nothing is named.

    Args:
        text: The text that the run was trained on.

    Raises:
        ValueError: If that is no Python.
    """
    if STDLIB in text:
        return [PYTHON]
    raise ValueError(
        f"A run that was not trained on {STDLIB} must be told what to probe with; got no --data. Name a .jsonl or "
        f".csv file with labels, or one of {_known()}."
    )


def parse_data(words: Sequence[str]) -> list[DataName]:
    """Return what the words of `--data` say, `paper` as eight names.

    Raises:
        FileNotFoundError: If a word is neither a name that is known nor a file.
    """
    return [name for word in words for name in _parse(word)]


def _parse(word: str) -> list[DataName]:
    if word == PAPER:
        return [DataName(name, None) for name in HUB_SETS]
    name, equals, place = word.partition("=")
    if name in (*HUB_SETS, PYTHON, SURNAMES) and not (equals and not place):
        if name == SURNAMES and not place:
            raise ValueError(
                f"{SURNAMES} must say where they are, for the hub has no copy of them that is known; write "
                f"{SURNAMES}=FOLDER, {SURNAMES}=FILE or {SURNAMES}=HUB-ID."
            )
        return [DataName(name, place or None)]
    if Path(word).expanduser().is_file():
        return [DataName("", word)]
    raise FileNotFoundError(f"Data to probe with must be a file or one of {_known()}; got {word}. Check the path.")


def open_data(found: DataName, texts: int = TEXTS) -> ProbingSet:
    """Read what one word of `--data` names.

    Args:
        found: What it says.
        texts: Texts with a label each that are used, at most.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not as it must be.
    """
    if not found.name:
        return read_labelled_file(Path(str(found.place)).expanduser(), texts)
    if found.name == PYTHON:
        return _standard_library() if found.place is None else _python_below(Path(found.place).expanduser())
    if found.name == SURNAMES:
        return load_surnames(str(found.place), texts)
    return load_hub_set(found.name, found.place, texts)


def _standard_library() -> SpanSet:
    """Return Python's standard library; the test part is of modules that no training of ours sees."""
    modules = list(stdlib_modules())
    listed = frozenset(held_out_modules())
    unseen = [number for number, module in enumerate(modules) if module.path in listed or is_held_out(module.path)]
    return labelled_by(PYTHON, [module.source for module in modules], python_spans, unseen)


def _python_below(place: Path) -> SpanSet:
    below = place.rglob("*.py") if place.is_dir() else [place]
    paths = sorted(path for path in below if path.is_file())
    if not paths:
        raise FileNotFoundError(f"{PYTHON}=PATH must name a .py file or a folder with some; {place} has none.")
    texts: list[str] = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"Python source must be UTF-8; {path} is not. Convert it or leave it out.") from error
    return labelled_by(printable(place.stem) or PYTHON, texts, python_spans)


def _known() -> str:
    return ", ".join((PYTHON, f"{PYTHON}=PATH", f"{SURNAMES}=PATH", PAPER, *HUB_SETS))
