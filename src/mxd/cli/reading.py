"""Reading a command line: what is wrong with it is one sentence about the command that was typed."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tyro

from mxd.cli.numbers import COUNTS

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CORNERS, _SIDE = ("╭", "╰"), "│"
_RULE = re.compile(r"[\s─-]*")


def run_one_of(commands: Mapping[str, Callable[..., None]], name: str, arguments: Sequence[str], *, about: str) -> None:
    """Run the command that the first of the arguments names, or show what commands there are.

    Args:
        commands: The commands by name.
        name: What is typed before theirs.
        arguments: What follows.
        about: What they are for.

    Raises:
        ValueError: If there is no such command, or it does not take the other arguments.
    """
    first = arguments[0] if arguments else "--help"
    if first in commands:
        run_command(commands[first], f"{name} {first}", arguments[1:])
    elif first in ("-h", "--help") or first.startswith("--tyro-"):
        tyro.extras.subcommand_cli_from_dict(
            dict(commands), prog=name, description=about, args=[first, *arguments[1:]], registry=COUNTS
        )
    else:
        raise ValueError(f"a command must be one of {', '.join(commands)}; got {first!r}. {name} --help explains them.")


def run_command(command: Callable[..., None], name: str, arguments: Sequence[str]) -> None:
    """Run one command with these arguments.

    Args:
        command: The command; tyro makes its options from its signature.
        name: What is typed to call it, as in `mxd train`.
        arguments: What follows.

    Raises:
        ValueError: If they are none that it takes; the sentence says which, and where all are explained.
    """
    said = io.StringIO()
    try:
        # The command itself runs later: what it says on stderr is its own.
        with contextlib.redirect_stderr(said):
            call = tyro.cli(_bound(command), prog=name, args=list(arguments), registry=COUNTS)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise ValueError(f"{_sentence(said.getvalue())} {name} --help shows all options.") from end
    sys.stderr.write(said.getvalue())
    call()


def _bound(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Return what takes a command's arguments, and returns the call."""
    given = command.keywords if isinstance(command, functools.partial) else {}
    plain = command.func if isinstance(command, functools.partial) else command

    @functools.wraps(plain)
    def bind(*arguments: Any, **keywords: Any) -> Callable[[], None]:
        return functools.partial(plain, *arguments, **keywords)

    return functools.partial(bind, **given) if given else bind


class _Line(NamedTuple):
    """One line of what tyro says."""

    indent: int
    words: str


def _sentence(box: str) -> str:
    """Return in a sentence or two what tyro says in a box, whose first part is the fault and whose others are help."""
    parts = _parts(box)
    fault = parts[0] if parts else [_Line(0, "The options are not understood")]
    beside = {part[0].words: part[1:] for part in parts[1:]}
    missing = _options(fault[1:]) if fault[0].words.startswith("Missing from") else []
    if missing:
        unknown = [line.words for line in beside.get("Unrecognized options:", [])]
        return f"{_refused(unknown)}{_listed(missing)} must be given."
    words = " ".join(line.words for line in fault).rstrip(".")
    unknown = re.fullmatch(r"Unrecognized options: (.*)", words)
    meant = _options(beside.get("Perhaps you meant:", []))
    sentence = _refused(unknown[1].split(", ")) if unknown else f"{words}. "
    return f"{sentence}Perhaps you meant {meant[0]}." if meant else sentence.rstrip()


def _parts(box: str) -> list[list[_Line]]:
    """Return the lines of the box, split at its rules; its title, which says less than the fault, is left out."""
    parts: list[list[_Line]] = [[]]
    for line in _COLOUR.sub("", box).splitlines():
        inner = line.strip().strip(_SIDE) if _SIDE in line else line
        if line.strip().startswith(_CORNERS) or _RULE.fullmatch(inner):
            parts.append([])
        else:
            parts[-1].append(_Line(len(inner) - len(inner.lstrip()), inner.strip()))
    found = [part for part in parts if part]
    # Where only ASCII can be written, there are no edges, and the title is a part of its own.
    return found if _SIDE in box else found[1:]


def _options(lines: Sequence[_Line]) -> list[str]:
    """Return the options that lines of help are about, and with what has no name what it is."""
    found: list[str] = []
    for place, line in enumerate(lines):
        if line.indent > min(other.indent for other in lines):
            continue
        name, below = line.words.split(" ")[0].rstrip(","), lines[place + 1 : place + 2]
        explained = [
            other.words.removesuffix("(required)").rstrip(" .") for other in below if other.indent > line.indent
        ]
        found.append(f"{name} ({explained[0]})" if explained and not name.startswith("-") else name)
    return found


def _refused(words: Sequence[str]) -> str:
    if not words:
        return ""
    return f"There is {'no option' if words[0].startswith('-') else 'no place for'} {' '.join(words)}. "


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
