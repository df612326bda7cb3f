"""Labelled examples from files: images in class folders, .npz, and .csv or .parquet for tables and text."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy
import torch
from torch import Tensor

from mxd.privacy.examples import Examples
from mxd.privacy.text_examples import TextReader, continuation_examples, sequence_examples, word_examples

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
INPUT_KEYS = ("images", "inputs", "x", "X")
LABEL_KEYS = ("labels", "label", "y")


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnNames:
    """Which columns of a table hold what."""

    label: str = "label"
    """Each row's class, a number or a name."""
    text: str = "text"
    """Text, where the model reads text; for a causal language model the continuation that is protected."""
    prompt: str = "prompt"
    """What comes before the continuation, for a causal language model; the column may be absent."""
    words: str = "tokens"
    """The words of a row, a list, where each has a class."""
    tags: str = "tags"
    """The class of each word, a list of numbers."""


class FileSets(NamedTuple):
    """Examples from files that share one list of classes."""

    sets: Mapping[str, Examples]
    """By the name that each file was given."""
    class_names: tuple[str, ...]
    """Names of the classes in their order; empty where labels are numbers."""
    shown: Mapping[str, Sequence[str]]
    """What a page may show of each row of text; empty for images and tables."""


class _Raw(NamedTuple):
    """A file before its labels are numbered."""

    labels: list[str] | list[int]
    inputs: Tensor | None = None
    texts: list[str] | None = None
    columns: tuple[str, ...] = ()


def read_sets(
    paths: Mapping[str, Path],
    *,
    columns: ColumnNames | None = None,
    reader: TextReader | None = None,
    class_names: Sequence[str] = (),
) -> FileSets:
    """Read several sets of one kind, with classes numbered alike in all.

    Labels that are whole numbers are taken as they are. Named labels are numbered in the order of `class_names`, or in
    alphabetical order over all the files.

    Args:
        paths: Name of a set -> its file or folder: a folder with a folder of images for each class; `.npz` with arrays
            `images` (or `inputs`, `x`) and `labels` (or `y`), where bytes are pixels; `.csv` or `.parquet` with a
            column of labels, all others numbers, or with text.
        columns: Names of the columns.
        reader: How text becomes tensors; without it tables must hold numbers.
        class_names: Names of the classes in the model's order.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file cannot be read, holds no examples, or the sets are not of one kind.
    """
    columns = columns or ColumnNames()
    if reader is not None and reader.task != "sequence":
        tables = {name: _read_table(path) for name, path in paths.items()}
        sets = {name: _positions(name, table, paths[name], columns, reader) for name, table in tables.items()}
        return FileSets(sets, tuple(class_names), {name: _shown(table, columns) for name, table in tables.items()})
    raws = {name: _read(path, columns, reader) for name, path in paths.items()}
    headings = {name: raw.columns for name, raw in raws.items()}
    if len(set(headings.values())) > 1:
        found = "; ".join(f"{name}: {_few(heading)}" for name, heading in headings.items())
        raise ValueError(f"all tables must have the same columns of numbers; got {found}.")
    order, number = _numbering([label for raw in raws.values() for label in raw.labels], class_names)
    sets = {}
    for name, raw in raws.items():
        labels = [number[label] if isinstance(label, str) else label for label in raw.labels]
        if raw.texts is not None and reader is not None:
            sets[name] = sequence_examples(raw.texts, labels, reader, may_cut=name != "protected")
        else:
            assert raw.inputs is not None
            sets[name] = Examples(inputs=raw.inputs, labels=torch.tensor(labels))
    return FileSets(sets, order, {name: raw.texts or () for name, raw in raws.items()})


def _numbering(labels: Sequence[str | int], class_names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    names = {label for label in labels if isinstance(label, str)}
    if not names:
        return tuple(class_names), {}
    if any(isinstance(label, int) for label in labels):
        raise ValueError("labels must be numbers in all files, or names in all; got both; make them alike.")
    order = tuple(class_names) or tuple(sorted(names))
    unknown = sorted(names - set(order))
    if unknown:
        raise ValueError(f"labels must be among the model's classes ({_few(order)}); got {_few(unknown)}.")
    return order, {name: place for place, name in enumerate(order)}


def _read(path: Path, columns: ColumnNames, reader: TextReader | None) -> _Raw:
    if not path.exists():
        raise FileNotFoundError(f"data must be a file or folder; {path} does not exist; check the path.")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    table = _read_table(path)
    labels = _whole_or_names(_column(table, columns.label, path), path)
    if reader is not None:
        return _Raw(labels, texts=[str(text) for text in _column(table, columns.text, path)])
    names = tuple(name for name in table if name != columns.label)
    try:
        numbers = torch.tensor([[float(value) for value in row] for row in zip(*map(table.get, names), strict=True)])
    except (TypeError, ValueError) as error:
        raise ValueError(f"all columns of {path} but '{columns.label}' must hold numbers; {error}.") from error
    return _Raw(labels, inputs=numbers.reshape(len(labels), len(names)), columns=names)


def _positions(
    name: str, table: dict[str, list[Any]], path: Path, columns: ColumnNames, reader: TextReader
) -> Examples:
    may_cut = name != "protected"
    if reader.task == "token":
        words, tags = _column(table, columns.words, path), _column(table, columns.tags, path)
        return word_examples(words, tags, reader, may_cut=may_cut)
    texts = [str(text) for text in _column(table, columns.text, path)]
    prompts = [str(prompt or "") for prompt in table.get(columns.prompt, [""] * len(texts))]
    return continuation_examples(prompts, texts, reader, may_cut=may_cut)


def _shown(table: dict[str, list[Any]], columns: ColumnNames) -> list[str]:
    if columns.words in table:
        return [" ".join(map(str, row)) for row in table[columns.words]]
    texts = table[columns.text]
    return [
        f"{prompt or ''}{text}"
        for prompt, text in zip(table.get(columns.prompt, [""] * len(texts)), texts, strict=True)
    ]


def _read_table(path: Path) -> dict[str, list[Any]]:
    """The columns of a table, whole."""
    import pyarrow
    from pyarrow import csv, parquet

    if not path.exists():
        raise FileNotFoundError(f"data must be a file or folder; {path} does not exist; check the path.")
    if path.is_dir() or path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"data must be a folder of images in class folders, .npz, .csv or .parquet; got {path}.")
    try:
        table: Any = cast(Any, csv).read_csv(path) if path.suffix == ".csv" else cast(Any, parquet).read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} must be a {path.suffix} file; it cannot be read ({error}).") from error
    found = cast("dict[str, list[Any]]", table.to_pydict())
    if table.num_rows == 0:
        raise ValueError(f"{path} must hold at least one row; it is empty.")
    return found


def _column(table: dict[str, list[Any]], name: str, path: Path) -> list[Any]:
    if name not in table:
        raise ValueError(f"{path} must have a column '{name}'; got {_few(list(table))}; name it with --columns.")
    missing = sum(value is None for value in table[name])
    if missing:
        raise ValueError(f"the column '{name}' of {path} must have a value in every row; {missing} are missing.")
    return table[name]


def _whole_or_names(labels: list[Any], path: Path) -> list[str] | list[int]:
    if all(isinstance(label, str) for label in labels):
        return cast("list[str]", labels)
    try:
        if all(float(label).is_integer() for label in labels):
            return [int(label) for label in labels]
    except (TypeError, ValueError):
        # A date, say; the sentence below shows it.
        pass
    raise ValueError(f"labels of {path} must be whole numbers or names; got {_few(sorted(set(map(str, labels))))}.")


def _read_npz(path: Path) -> _Raw:
    try:
        with numpy.load(path, allow_pickle=False) as file:
            inputs, labels = _array(file, INPUT_KEYS), _array(file, LABEL_KEYS)
    # A single array (.npy) under this name is no archive, and cannot be opened as one.
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be an .npz file of plain arrays; it cannot be read ({error}).") from error
    if len(inputs) == 0:
        raise ValueError(f"{path} must hold at least one example; it is empty.")
    if labels.ndim != 1 or len(labels) != len(inputs):
        raise ValueError(
            f"{path} must hold one label an example; got inputs of shape {inputs.shape} and labels of shape "
            f"{labels.shape}."
        )
    if inputs.ndim < 2 or inputs.dtype.kind not in "biuf":
        raise ValueError(
            f"{path} must hold a row of numbers for each example; got inputs of shape {inputs.shape}, {inputs.dtype}."
        )
    if inputs.ndim > 2 and inputs.dtype.kind in "iu" and inputs.dtype != numpy.uint8:
        raise ValueError(f"whole-number images of {path} must be bytes (uint8); got {inputs.dtype}; convert them.")
    numbers = torch.from_numpy(inputs.astype(numpy.float32))
    if inputs.dtype == numpy.uint8:
        numbers = numbers / 255
        if inputs.ndim == 3:
            numbers = numbers.unsqueeze(1)
        elif inputs.ndim == 4 and inputs.shape[-1] in (1, 3) and inputs.shape[1] not in (1, 3):
            numbers = numbers.movedim(-1, 1).contiguous()
    return _Raw(_whole_or_names(labels.tolist(), path), inputs=numbers)


def _array(file: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        if key in file:
            return file[key]
    raise ValueError(f"it must hold an array named {' or '.join(keys)}; got {_few(list(file))}")


def _read_folder(path: Path) -> _Raw:
    files = [
        (folder.name, file)
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGE_ENDINGS
    ]
    if not files:
        raise ValueError(
            f"{path} must hold a folder of images for each class; found none ({', '.join(IMAGE_ENDINGS)})."
        )
    images = [_read_image(file) for _, file in files]
    for (_, file), image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"all images must have one shape; {files[0][1]} has {tuple(images[0].shape)} and {file} has "
                f"{tuple(image.shape)} (channels, height, width); resize them."
            )
    names = [name for name, _ in files]
    labels = [int(name) for name in names] if all(name.isdecimal() for name in names) else names
    return _Raw(labels, inputs=torch.stack(images))


def _read_image(path: Path) -> Tensor:
    """Pixels from 0 to 1, (channels, height, width): one channel for grey images, else three."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = numpy.asarray(image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be an image; it cannot be read ({error}).") from error
    numbers = torch.from_numpy(pixels.astype(numpy.float32)) / 255
    return numbers.unsqueeze(0) if numbers.dim() == 2 else numbers.movedim(-1, 0).contiguous()


def _few(names: Sequence[object]) -> str:
    shown = ", ".join(str(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
