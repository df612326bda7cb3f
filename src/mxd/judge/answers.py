"""What judges are made to answer: one JSON value, the last such one in their words.

The last, because some models think aloud first, and repeat what they were asked while they do.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import cast


def read_scores(said: str, names: Sequence[str]) -> tuple[float, ...]:
    """Return the numbers from 0 to 1 that the last such JSON object of an answer gives these names.

    Raises:
        ValueError: If there is no such object in the answer.

    Example:
        >>> read_scores('Sure! {"coherence": 0.75, "fluency": 1}', ["coherence", "fluency"])
        (0.75, 1.0)
    """
    for found in reversed(re.findall(r"\{[^{}]*\}", said)):
        try:
            value = cast("Mapping[str, object]", json.loads(found))
        except (ValueError, RecursionError):
            continue
        numbers = [value.get(name) for name in names]
        if all(type(number) in (int, float) and 0 <= cast("float", number) <= 1 for number in numbers):
            return tuple(float(cast("float", number)) for number in numbers)
    raise ValueError(f"no JSON object with numbers from 0 to 1 for {', '.join(names)}")


def read_verdicts(said: str, count: int) -> tuple[bool, ...]:
    """Return the last list of `count` zeros and ones that an answer holds.

    Raises:
        ValueError: If there is none.

    Example:
        >>> read_verdicts("[1, 0, 1]", 3)
        (True, False, True)
    """
    for found in reversed(re.findall(r"\[[\s\d,]*\]", said)):
        try:
            value = cast("list[object]", json.loads(found))
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
