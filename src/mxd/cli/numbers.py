"""Numbers as people write them: counts such as 2M, 480M and 4096, and spans such as 0-99."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import cast

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mxd.training.config import LayerChoice

_LONGEST_SPAN = 10**7
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}

COUNTS = ConstructorRegistry()
"""Reads every whole number of the command line with `parse_count`, and layers with `parse_layers`."""


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


@COUNTS.primitive_rule
def _layers_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[LayerChoice] | None:
    if cast("object", info.type) != LayerChoice:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="LAYERS",
        instance_from_str=parse_layers,
        is_instance=lambda value: value == "all" or isinstance(value, tuple),
        str_from_instance=lambda value: ["all"] if isinstance(value, str) else [str(layer) for layer in value],
    )


def parse_layers(words: Sequence[str]) -> LayerChoice:
    """Return the layers that words such as `3` and `0-2` name, in their order, or `all`.

    Raises:
        ValueError: If a word names none, or there is none.

    Example:
        >>> parse_layers(["5", "0-2"]), parse_layers(["all"])
        ((5, 0, 1, 2), 'all')
    """
    if list(words) == ["all"]:
        return "all"
    return tuple(_spanned(words, "layer", "numbers, spans such as 0-3, or all alone"))


def parse_latents(words: Sequence[str]) -> list[int]:
    """Return the latents that words such as `7` and `0-99` name, each once, in their order.

    Raises:
        ValueError: If a word names none.

    Example:
        >>> parse_latents(["7", "0-2"])
        [7, 0, 1, 2]
    """
    return list(dict.fromkeys(_spanned(words, "latents", "numbers or spans of them, such as 7 or 0-99")))


def _spanned(words: Sequence[str], name: str, expected: str) -> list[int]:
    found: list[int] = []
    for word in words:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{name} must be {expected}; got {word!r}.")
        if int(match[2] or match[1]) - int(match[1]) >= _LONGEST_SPAN:
            raise ValueError(f"{name} must be {expected}, of at most {_LONGEST_SPAN:,} numbers; got {word!r}.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found:
        raise ValueError(f"{name} must name at least one; got none.")
    return found


__all__ = ["COUNTS", "parse_count", "parse_latents", "parse_layers"]
