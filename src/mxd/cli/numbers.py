"""Numbers as people write them: counts such as 2M, 480M and 4096, and spans such as 0-99."""

import re
from collections.abc import Sequence
from fractions import Fraction

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}

COUNTS = ConstructorRegistry()
"""Reads every whole number of the command line with `parse_count`."""


def parse_count(text: str) -> int:
    """Return the whole number that a text stands for, with K, M and B for thousands, millions and billions.

    Raises:
        ValueError: If it stands for none.

    Example:
        >>> parse_count("2M"), parse_count("1.5k"), parse_count("4_096")
        (2000000, 1500, 4096)
    """
    # A comma stands between thousands only: 8,16 is a list, which spaces make.
    match = re.fullmatch(r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)(?:\.\d+)?)([KMB]?)", text.strip().upper())
    if match is not None:
        value = Fraction(match[1].replace(",", "").replace("_", "")) * _FACTORS[match[2]]
        if value.denominator == 1:
            return value.numerator
    several = "; separate several by spaces" if "," in text else ""
    raise ValueError(f"a count must be a whole number such as 4096, 2M or 480M; got {text!r}{several}.")


@COUNTS.primitive_rule
def _count_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="COUNT",
        instance_from_str=lambda texts: parse_count(texts[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def parse_latents(words: Sequence[str]) -> list[int]:
    """Return the latents that words such as `7` and `0-99` name, each once, in their order.

    Raises:
        ValueError: If a word names none.

    Example:
        >>> parse_latents(["7", "0-2"])
        [7, 0, 1, 2]
    """
    found: list[int] = []
    for word in words:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"latents must be numbers or spans of them, such as 7 or 0-99; got {word!r}.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found:
        raise ValueError("latents must name at least one; got none.")
    return list(dict.fromkeys(found))


__all__ = ["COUNTS", "parse_count", "parse_latents"]
