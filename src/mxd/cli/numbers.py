"""Counts as people write them: 2M, 480M, 4096."""

import re
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
    match = re.fullmatch(r"([+-]?\d[\d_,]*(?:\.\d+)?)([KMB]?)", text.strip().upper())
    if match is not None:
        value = Fraction(match[1].replace(",", "").replace("_", "")) * _FACTORS[match[2]]
        if value.denominator == 1:
            return value.numerator
    raise ValueError(f"a count must be a whole number such as 4096, 2M or 480M; got {text!r}.")


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


__all__ = ["COUNTS", "parse_count"]
