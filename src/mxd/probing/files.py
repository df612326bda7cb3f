"""Labelled texts in local files: .jsonl and .csv with a label a text, .jsonl with labelled spans."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

from mxd.data.documents import read_json_lines, read_utf8
from mxd.printable import printable
from mxd.probing.examples import TEXTS, Example, ProbingSet, Span, SpanSet, make_text_set

MOST_CHARACTERS = 2**24
"""Of a field of a .csv; the csv module's own limit is shorter than a long text."""


class _Row(NamedTuple):
    fields: Mapping[str, object]
    where: str


def read_labelled_file(path: Path, texts: int = TEXTS) -> ProbingSet:
    """Return the labelled texts of a file: `{text, label}` a row, or `{text, spans}` where a .jsonl's rows have spans.

    Rows of one `group`, where some have such a field, are in one part: texts of one author, say, or about one person.
    A span is `{"start": 0, "end": 5, "label": "..."}` or `[0, 5, "..."]`, in characters of the text, the end behind
    the last one.

    Args:
        path: The file.
        texts: Texts with a label each that are used, at most.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row is not as it must be, or a span does not fit its text; the sentence says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Data to probe with must be a file; there is no {path}. Check the path.")
    rows = list(_read_csv(path) if path.suffix.lower() == ".csv" else _read_jsonl(path))
    if not rows:
        raise ValueError(f"Data to probe with must hold at least one row; {path} holds none. Give another file.")
    # data.jsonl says nothing: its folder does.
    name = printable(path.parent.name if path.stem == "data" and path.parent.name else path.stem)
    if any("spans" in row.fields for row in rows):
        spans = [_spans(row) for row in rows]
        texts_of = [str(row.fields["text"]) for row in rows]
        return SpanSet(name=name, texts=texts_of, spans_of=spans.__getitem__, groups=[_group(row) for row in rows])
    return make_text_set(name, [_example(row) for row in rows], total=texts)


def _read_jsonl(path: Path) -> Iterator[_Row]:
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise ValueError(f"Data to probe with must be .jsonl or .csv; got {path}. Convert the file to one of these.")
    for value, where, _ in read_json_lines(path):
        if not isinstance(value, dict):
            raise ValueError(f"Every line must be a JSON object; {where} is a {type(value).__name__}. Repair it.")
        yield _Row(cast("dict[str, object]", value), where)


def _read_csv(path: Path) -> Iterator[_Row]:
    # A stream without translation: splitlines() splits at U+2028 and its like, which a field may hold.
    lines = csv.reader(io.StringIO(read_utf8(path), newline=""), strict=True)
    limit = csv.field_size_limit(MOST_CHARACTERS)
    try:
        head = next(lines, [])
        for fields in lines:
            if fields:
                if any(fields[len(head) :]):
                    raise ValueError(
                        f"A row of a .csv must have no more fields than its first line, {len(head)}; {path}, line "
                        f"{lines.line_num} has {len(fields)}. Put a text that has commas in quotation marks."
                    )
                # A row that is too short lacks its last fields, and _example says so.
                yield _Row(dict(zip(head, fields, strict=False)), f"{path}, line {lines.line_num}")
    except csv.Error as error:
        raise ValueError(f"A .csv must be well-formed; {path}, line {lines.line_num} is not ({error}).") from error
    finally:
        csv.field_size_limit(limit)


def text_of(fields: Mapping[str, object], name: str, where: str) -> str:
    """Return a field that must hold text.

    Raises:
        ValueError: If it does not.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        found = ", ".join(map(repr, fields)) or "none" if name not in fields else repr(value)[:60]
        raise ValueError(f"Every row must have text in {name!r}; {where} has {found}. Repair or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Text must be valid Unicode; {where} has a lone surrogate at character {error.start}. "
            "Repair or remove the row."
        ) from error
    return value


def label_of(value: object, where: str) -> str:
    """Return a class as text.

    Raises:
        ValueError: If it is no text, number or truth value, or has control characters, which a terminal would obey.
    """
    if isinstance(value, (str, int, float)) and str(value).strip() and str(value).isprintable():
        return str(value)
    raise ValueError(f"A label must be a printable text or a number; {where} has {value!r}. Repair or remove the row.")


def _example(row: _Row) -> Example:
    if "label" not in row.fields:
        found = ", ".join(map(repr, row.fields))
        raise ValueError(
            f"Every row must have 'text' and 'label', or 'text' and 'spans'; {row.where} has {found}. "
            "Name the fields so."
        )
    text, label = text_of(row.fields, "text", row.where), label_of(row.fields["label"], row.where)
    return Example(text, label, group=_group(row))


def _group(row: _Row) -> str | None:
    value = row.fields.get("group")
    if value is None or value == "":
        return None
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"A group must be a text or a number; {row.where} has {str(value)[:60]!r}. Repair or remove it.")


def _spans(row: _Row) -> list[Span]:
    text = text_of(row.fields, "text", row.where)
    spans = row.fields.get("spans")
    if not isinstance(spans, list):
        raise ValueError(f"Every row must have a list in 'spans', be it empty; {row.where} has {spans!r}. Repair it.")
    return [_span(span, text, row.where) for span in cast("list[object]", spans)]


def _span(value: object, text: str, where: str) -> Span:
    parts = value
    if isinstance(value, dict):
        fields = cast("dict[str, object]", value)
        parts = [fields.get(name) for name in Span._fields]
    if not isinstance(parts, list) or len(cast("list[object]", parts)) != 3:
        raise ValueError(f"A span must be [start, end, label]; {where} has {value!r}. Repair it.")
    start, end, label = cast("list[object]", parts)
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        raise ValueError(
            f"A span must fit its text, 0 ≤ start < end ≤ {len(text)} characters; {where} has {start!r} to {end!r}. "
            "Repair the span, or the text that it was made for."
        )
    return Span(start, end, label_of(label, where))
