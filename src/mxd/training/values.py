"""Values of settings as Python code gives them: brought to the type that a setting has, or refused by name."""

import functools
import numbers
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

Config = TypeVar("Config")
_REFUSED = object()
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True or False", types.NoneType: "None"}


def settling(config: type[Config]) -> type[Config]:
    """Let a dataclass whose fields are keywords bring what it is given to the types that its annotations name.

    A list or a range becomes a tuple, a single value where only several are taken a tuple of one, a path text, and a
    whole number a float where one is wanted. Nothing else is converted, and text is never taken apart. A value of
    another type raises a TypeError that names it.
    """
    plain = config.__init__
    kinds = {field.name: field.type for field in fields(cast("Any", config))}

    @functools.wraps(plain)
    def initialise(self: Any, **settings: Any) -> None:
        plain(self, **{name: _settle(name, value, kinds.get(name, Any)) for name, value in settings.items()})

    config.__init__ = initialise
    return config


def _settle(name: str, value: object, wanted: Any) -> object:
    # What is no field at all is refused by the dataclass.
    settled = value if wanted is Any else _settled(value, wanted)
    if settled is _REFUSED:
        raise TypeError(f"{name} must be {_words(wanted)}; got {value!r}.{_hint(value, wanted)}")
    return settled


def _settled(value: object, wanted: Any) -> object:
    """Return a value as one of the types that are wanted, or `_REFUSED`."""
    single, element = _parts(wanted)
    for kind in single:
        settled = _as(value, kind)
        if settled is not _REFUSED:
            return settled
    if element is None:
        return _REFUSED
    if isinstance(value, list | tuple | range):
        several = tuple(_settled(one, element) for one in cast("list[object]", value))
        return _REFUSED if any(one is _REFUSED for one in several) else several
    alone = _settled(value, element)
    return alone if alone is _REFUSED else (alone,)


def _as(value: object, kind: Any) -> object:
    """Return a value as this type, or `_REFUSED`."""
    if typing.get_origin(kind) is typing.Literal:
        # True equals 1, and is no such choice.
        return value if any(type(value) is type(one) and value == one for one in typing.get_args(kind)) else _REFUSED
    if typing.get_origin(kind) is dict:
        return _rates(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fsdecode(cast("os.PathLike[str]", value))
    if isinstance(value, bool):
        # An int to Python, and no number that anybody means.
        return value if kind is bool else _REFUSED
    if kind is float and isinstance(value, numbers.Real):
        return float(value)
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    return value if kind not in (int, float) and isinstance(value, kind) else _REFUSED


def _rates(value: object) -> object:
    if not isinstance(value, Mapping):
        return _REFUSED
    rates = {name: _as(rate, float) for name, rate in cast("Mapping[object, object]", value).items()}
    is_known = all(isinstance(name, str) and rate is not _REFUSED for name, rate in rates.items())
    return rates if is_known else _REFUSED


def _parts(wanted: Any) -> tuple[list[Any], Any]:
    """Return the types of which one value may be, and the type of each of several, or None where they may not be."""
    is_union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    members = typing.get_args(wanted) if is_union else (wanted,)
    element = next((typing.get_args(one)[0] for one in members if typing.get_origin(one) is tuple), None)
    return [one for one in members if typing.get_origin(one) is not tuple], element


def _words(wanted: Any) -> str:
    """Return what a message calls the types of a setting."""
    single, element = _parts(wanted)
    of_several = [] if element is None else [*_parts(element)[0]]
    found: list[str] = []
    for kind in dict.fromkeys([*of_several, *single]):
        if typing.get_origin(kind) is typing.Literal:
            found += map(repr, typing.get_args(kind))
        else:
            found.append("pairs of kind and number" if typing.get_origin(kind) is dict else _NAMES[kind])
    return " or ".join(found) + (", or several of them" if element is not None else "")


def _hint(value: object, wanted: Any) -> str:
    """Return how a count is written, for what a person may have meant as one."""
    if "a whole number" not in _words(wanted):
        return ""
    if isinstance(value, float) and value.is_integer():
        return f" Write {int(value):_}."
    if isinstance(value, str) and value[:1].isdigit():
        return " Write counts as 480_000_000; K, M and B belong to the command line."
    return ""
