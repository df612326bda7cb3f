"""Documents, and the local files they are read from: every row is checked as it is read."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, cast

_COMPRESSIONS = (".gz", ".zst")
_WRITTEN = (".txt", ".jsonl", ".json")
ENDINGS = f"{', '.join(_WRITTEN)}, .parquet, or one of the first three followed by .gz or .zst"
"""Endings of the files that can be read, in words."""

SEPARATOR = "<|endoftext|>"
"""Stands between the documents of a .txt, where it occurs at all."""

WINDOW = 4096
"""Characters of a document of a .txt that has neither separators nor blank lines."""

GAP = 256
"""Characters between two such windows that belong to no document, so that a training one says little of its
held-out neighbour."""


class Document(NamedTuple):
    """One document: text, or token ids where the source has them already."""

    identity: str
    """What decides whether the document is held out: its path for `stdlib`, else its content."""
    text: str
    """The text; empty where `ids` are given."""
    ids: tuple[int, ...] | None
    """Token ids of a pre-tokenised document."""
    row: int
    """Number of its row in the source, held-out and empty rows counted."""


def text_document(text: str, row: int, identity: str | None = None) -> Document:
    """Return a document of text, identified by its content unless an identity is given."""
    return Document(text if identity is None else identity, text, None, row)


def row_document(fields: Mapping[str, object], text_field: str, where: str, row: int) -> Document | None:
    """Return the document that a row of a table holds, or None where its text is null or blank.

    Args:
        fields: The row; `input_ids`, where there are any and they are not null, are taken before the text.
        text_field: Name of the field that holds the text.
        where: The row's place, for messages.
        row: Number of the row in the source.

    Raises:
        ValueError: If the row has neither field, or something else than text or token ids in it.
    """
    if fields.get("input_ids") is not None:
        return _ids_document(fields["input_ids"], where, row)
    check_fields(fields, text_field, where)
    # It may have null token ids and no text at all.
    text = fields.get(text_field)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(
            f"The field {text_field!r} must hold text; {where} has a {type(text).__name__}. "
            "Name the text's field with --text-field."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Text must be valid Unicode; {where} has a lone surrogate at character {error.start}. "
            "Repair or remove the row."
        ) from error
    return text_document(text, row) if text.strip() else None


def check_fields(names: Iterable[str], text_field: str, where: str) -> None:
    """Raise a ValueError that lists the fields there are where none of them holds text or token ids."""
    names = list(names)
    if text_field not in names and "input_ids" not in names:
        there = ", ".join(map(repr, names)) or "none"
        raise ValueError(
            f"A row must have the text field {text_field!r}; {where} has the fields: {there}. "
            "Name the text's field with --text-field."
        )


def _ids_document(value: object, where: str, row: int) -> Document | None:
    # bool is an int to Python, and no token id.
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in cast(list[object], value)):
        raise ValueError(
            f"`input_ids` must be a list of nonnegative integers; {where} has {_shortened(value)}. "
            "Give token ids, or drop the field and give text."
        )
    ids = tuple(cast(list[int], value))
    content = blake2b(",".join(map(str, ids)).encode(), digest_size=16).hexdigest()
    return Document(content, "", ids, row) if ids else None


def _shortened(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def read_documents(path: Path, text_field: str) -> Iterator[Document]:
    """Yield the documents of one local file, numbered within the file.

    Raises:
        ValueError: If the ending is not one of `ENDINGS`, or the content is not what it promises.
    """
    match kind_of(path):
        case ".txt":
            # A line ends in one way, so that a document is the same whichever system it was written on.
            for row, text in enumerate(split_text(read_utf8(path).replace("\r\n", "\n"))):
                yield text_document(text, row)
        case ".jsonl":
            yield from _read_jsonl(path, text_field)
        case ".json":
            yield from _read_json(path, text_field)
        case ".parquet":
            yield from _read_parquet(path, text_field)
        case _:
            raise ValueError(f"Local text must end in {ENDINGS}; got {path}. Convert the file to one of these.")


def kind_of(path: Path) -> str | None:
    """Return the ending that says how a file is read, whether packed or not; None where it is none of `ENDINGS`."""
    ending = path.suffix.lower()
    if ending not in _COMPRESSIONS:
        return ending if ending in (*_WRITTEN, ".parquet") else None
    inner = path.with_suffix("").suffix.lower()
    return inner if inner in _WRITTEN else None


def split_text(text: str) -> list[str]:
    """Split the content of a .txt into documents: at separators, else at blank lines, else into windows."""
    if SEPARATOR in text:
        parts = text.split(SEPARATOR)
    else:
        parts = re.split(r"\n\s*\n", text.strip())
        if len(parts) == 1:
            parts = [text[start : start + WINDOW] for start in range(0, len(text), WINDOW + GAP)]
    return [part.strip("\r\n") for part in parts if part.strip()]


def read_utf8(path: Path) -> str:
    """Return the text of a file, unpacked where its name ends in .gz or .zst, without a byte order mark.

    Raises:
        ValueError: If it is not UTF-8, or cannot be unpacked.
    """
    content = _unpacked(path)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Text must be UTF-8; {path} has byte 0x{content[error.start]:02x} at offset {error.start}. "
            "Convert the file to UTF-8."
        ) from error


def _unpacked(path: Path) -> bytes:
    packed = path.read_bytes()
    if path.suffix.lower() not in _COMPRESSIONS:
        return packed
    import pyarrow

    try:
        if path.suffix.lower() == ".gz":
            return gzip.decompress(packed)
        with pyarrow.input_stream(pyarrow.py_buffer(packed), compression="zstd") as stream:
            return stream.read()
    # A pyarrow that was built without zstd raises an exception of its own.
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise ValueError(
            f"A file that ends in {path.suffix} must be packed so; {path} cannot be unpacked ({error}). "
            "Download or pack it again."
        ) from error


class JsonLine(NamedTuple):
    """One row of a .jsonl."""

    value: object
    """What JSON says."""
    where: str
    """The row's place, for messages."""
    row: int
    """Number of the line, counted from 0."""


def read_json_lines(path: Path) -> Iterator[JsonLine]:
    """Yield the rows of a .jsonl, lines that are blank left out.

    Raises:
        ValueError: If it is not UTF-8, or a line is no JSON.
    """
    # Not splitlines(): it also splits at U+2028 and its like, which JSON allows inside strings.
    for row, line in enumerate(read_utf8(path).split("\n")):
        where = f"{path}, line {row + 1}"
        if not line.strip():
            continue
        try:
            value: object = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Every line of a .jsonl must be a JSON value; {where} is not ({error.msg}). Repair or remove the line."
            ) from error
        # Nested too deeply, or an integer of thousands of digits.
        except (RecursionError, ValueError) as error:
            raise ValueError(
                f"Every line of a .jsonl must be a JSON value that Python can read; {where} is not ({error}). "
                "Repair or remove the line."
            ) from error
        yield JsonLine(value, where, row)


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    for line in read_json_lines(path):
        if document := _json_document(line.value, text_field, line.where, line.row):
            yield document


def _read_json(path: Path, text_field: str) -> Iterator[Document]:
    text = read_utf8(path)
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"A .json must be valid JSON; {path} is not ({error.msg}, line {error.lineno}). "
            "Repair it, or name it .jsonl if each line is a row."
        ) from error
    # Nested too deeply, or an integer of thousands of digits.
    except (RecursionError, ValueError) as error:
        raise ValueError(f"A .json must be JSON that Python can read; {path} is not ({error}). Repair it.") from error
    if not isinstance(value, list):
        raise ValueError(
            f"A .json must hold a list of rows or strings; {path} holds a {type(value).__name__}. "
            "Give a list, or leave this file out by naming the files one by one."
        )
    for row, element in enumerate(cast(list[object], value)):
        if document := _json_document(element, text_field, f"{path}, element {row + 1}", row):
            yield document


def _json_document(value: object, text_field: str, where: str, row: int) -> Document | None:
    if isinstance(value, str):
        value = {text_field: value}
    if not isinstance(value, dict):
        raise ValueError(
            f"A row must be an object or a string; {where} is a {type(value).__name__}. "
            f'Write it as {{"{text_field}": "..."}}.'
        )
    return row_document(cast(dict[str, object], value), text_field, where, row)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names: list[str] = list(table.schema_arrow.names)
            check_fields(names, text_field, str(path))
            column = "input_ids" if "input_ids" in names else text_field
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if document := row_document({column: value}, text_field, f"{path}, row {row + 1}", row):
                        yield document
                    row += 1
    except ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"A .parquet must be a Parquet table; {path} is not ({reason}). Download or write it again."
        ) from error
