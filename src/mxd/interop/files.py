"""Files of weights and settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from torch import Tensor

from mxd.atomic import JSON, settle_file, sync_file


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, row by row."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    settle_file(path)


def write_text(path: Path, text: str) -> None:
    """Write text and wait until it is on the disk."""
    # Half characters of undecodable names have no bytes; JSON reads them back from this.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    sync_file(path)


def yaml_text(values: Mapping[str, JSON]) -> str:
    """Return values as YAML, one a line, in the part of it that all versions and loaders read alike.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON cannot hold.
        TypeError: If a value, however deep, is no JSON value.
    """
    return "".join(f"{name}: {_in_yaml(value)}\n" for name, value in values.items())


def _in_yaml(value: object) -> str:
    match value:
        case str():
            # YAML knows no pairs of surrogates, by which JSON escapes emoji.
            return "".join(map(_printable, json.dumps(value, ensure_ascii=False)))
        case float():
            # YAML 1.1 takes no number for one that has an exponent and no dot, as in 1e-05.
            mantissa, e, exponent = json.dumps(value, allow_nan=False).partition("e")
            return f"{mantissa}{'' if '.' in mantissa else '.0'}{e}{exponent}"
        case dict():
            items = cast("dict[str, object]", value).items()
            return "{" + ", ".join(f"{_in_yaml(str(name))}: {_in_yaml(one)}" for name, one in items) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_in_yaml, cast("list[object]", value))) + "]"
        case _:
            return json.dumps(value)


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
