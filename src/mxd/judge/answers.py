"""What judges are made to answer: one JSON value, somewhere in their words."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import cast


def read_scores(said: str, names: Sequence[str]) -> tuple[float, ...]:
    """Return the numbers from 0 to 1 that an answer's JSON object gives these names.

    Raises:
        ValueError: If there is no such object in the answer.

    Example:
        >>> read_scores('Sure! {"coherence": 0.75, "fluency": 1}', ["coherence", "fluency"])
        (0.75, 1.0)
    """
    for found in re.finditer(r"\{[^{}]*\}", said):
        try:
            value = cast("Mapping[str, object]", json.loads(found[0]))
        except ValueError:
            continue
        numbers = [value.get(name) for name in names]
        if all(type(number) in (int, float) for number in numbers):
            scores = tuple(float(cast("float", number)) for number in numbers)
            if all(math.isfinite(score) and 0 <= score <= 1 for score in scores):
                return scores
    raise ValueError(f"no JSON object with numbers from 0 to 1 for {', '.join(names)}")


def read_verdicts(said: str, count: int) -> tuple[bool, ...]:
    """Return the list of `count` zeros and ones that an answer holds.

    Raises:
        ValueError: If there is none.

    Example:
        >>> read_verdicts("[1, 0, 1]", 3)
        (True, False, True)
    """
    for found in re.finditer(r"\[[\s\d,]*\]", said):
        try:
            value = cast("list[object]", json.loads(found[0]))
        except ValueError:
            continue
        if len(value) == count and all(type(entry) is int and entry in (0, 1) for entry in value):
            return tuple(bool(entry) for entry in value)
    raise ValueError(f"no list of {count} zeros and ones")


def read_explanation(said: str) -> str:
    """Return the explanation behind the last `[EXPLANATION]:` of an answer, on one line of printable characters.

    Raises:
        ValueError: If there is none, or it is longer than 500 characters.
    """
    _, mark, text = said.rpartition("[EXPLANATION]:")
    line = "".join(character for character in " ".join(text.split()) if character.isprintable())
    if not mark or not line or len(line) > 500:
        raise ValueError("no line [EXPLANATION]: …")
    return line
