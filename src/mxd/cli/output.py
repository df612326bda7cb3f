"""What commands say: results on stdout, and beside them notes on stderr."""

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import cast

from rich.console import Console

from mxd.atomic import JSON, json_text
from mxd.runs.faults import TrainingInterrupted

_OBEYED = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What JSON leaves as it is and a terminal could obey or not print: control characters, marks that turn the direction
of writing, line breaks, and the half characters that stand for undecodable bytes in names of files."""


def notes() -> Console:
    """Return where a command says what is no result: stderr, line by line as it is given."""
    # Square brackets in the name of a file are no markup.
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def print_json(value: JSON) -> None:
    """Print a result as JSON, with null for what is not finite."""
    text = json_text(_finite(value))
    print(_OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text), end="")


def go_on_with_resume(error: BaseException) -> TrainingInterrupted:
    """Return what is said when training was stopped: by what, and the command that goes on with it."""
    given = sys.argv[1:]
    resuming = given if "--resume" in given else [*given, "--resume"]
    return TrainingInterrupted(f"stopped by {str(error) or 'SIGINT'}; go on with: {shlex.join(['mxd', *resuming])}")


def _finite(value: object) -> JSON:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(held) for key, held in cast("Mapping[str, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in cast("Sequence[object]", value)]
    return cast("JSON", value)
