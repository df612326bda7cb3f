"""The data sets of the paper, by their names on the Hugging Face hub or from local copies in the same layout.

The eight sample-level sets are those of SAEBench (Karvonen et al., 2025, `sae_bench_utils/dataset_utils.py`), as in
the MxD paper; the token-level ones are in the layout of Gurnee et al. (2023, `probing_datasets/wikidata.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, cast

from mxd.printable import printable
from mxd.probing.examples import TEXTS, Example, TextSet, make_text_set
from mxd.probing.files import label_of, text_of

PER_CLASS = 5_000
"""Texts of a class, at most, as the paper asks for."""
SKIPPED_CHARACTERS = 150
"""Beginning of a source file that is left out: its licence, mostly (50 tokens of 3 characters)."""
LEAST_CHARACTERS = 3 * 128
"""What a source file must have beyond that."""
MOST_ROWS = 2_000_000
"""Rows of a table that are streamed in search of texts of all classes."""

SURNAMES = "surnames"
"""Names, in `--data`, the token-level sets in the layout of Gurnee et al."""

_SUFFIXES = frozenset({"jr", "sr", "ii", "iii", "iv"})

Row = Mapping[str, object]


class HubPart(NamedTuple):
    """One table of a data set."""

    config: str | None
    """The configuration, where the data set has several."""
    labels: tuple[str, ...]
    """The classes that are taken from it."""
    read: Callable[[Row, str], Example | None]
    """What a row is, given its place for messages; None for one that is not asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HubSet:
    """How a data set of the hub is read."""

    repository: str
    """Its id on the hub."""
    parts: tuple[HubPart, ...]
    """Its tables."""
    keep: Literal["first", "last"] = "first"
    """Which tokens stay of a long text."""
    group: str | None = None
    """A second attribute of two values, of each of which a class has half of its texts."""
    data_files: str | None = None
    """The files to read, for a data set that otherwise needs Python code of its own."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Its classes."""
        return tuple(label for part in self.parts for label in part.labels)


class _Blank(Exception):
    """A row without a text, of which a corpus has some."""


def _text(row: Mapping[str, object], name: str, where: str) -> str:
    value = row.get(name)
    if name in row and (value is None or (isinstance(value, str) and not value.strip())):
        raise _Blank
    return text_of(row, name, where)


def _labelled(text: str, label: str, row: Row, where: str) -> Example:
    return Example(_text(row, text, where), label_of(_field(row, label, where), where))


def _translated(language: str, row: Row, where: str) -> Example:
    translation = _field(row, "translation", where)
    if not isinstance(translation, dict):
        raise ValueError(
            f"Every row must have a text for each language in 'translation'; {where} has {str(translation)[:60]!r}. "
            "Give a copy as the hub has the data set."
        )
    return Example(_text(cast("dict[str, object]", translation), language, where), language)


_EXTENSIONS = {".c": "C", ".h": "C", ".html": "HTML", ".java": "Java", ".php": "PHP", ".py": "Python"}


def _source_file(row: Row, where: str) -> Example | None:
    # The data set's own script, too, tells the language by the extension.
    language = _EXTENSIONS.get(Path(str(_field(row, "path", where))).suffix)
    if language is None:
        return None
    text = _text(row, "content", where)
    if len(text) <= SKIPPED_CHARACTERS + LEAST_CHARACTERS:
        return None
    repository = row.get("repo_name")
    return Example(text[SKIPPED_CHARACTERS:], language, group=None if repository is None else str(repository))


def _field(row: Row, name: str, where: str) -> object:
    if row.get(name) is None:
        found = ", ".join(map(repr, row)) or "none"
        raise ValueError(
            f"Every row must have the field {name!r}; {where} has {found}. Give a copy as the hub has the data set."
        )
    return row[name]


def _bios(*professions: str) -> HubSet:
    part = HubPart(None, professions, partial(_labelled, "hard_text", "profession"))
    return HubSet(repository="LabHC/bias_in_bios", parts=(part,), group="gender")


def _amazon(label: str, *labels: str, group: str | None = None) -> HubSet:
    part = HubPart(None, labels, partial(_labelled, "text", label))
    return HubSet(repository="canrager/amazon_reviews_mcauley_1and5", parts=(part,), group=group)


_PAIRS = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}

HUB_SETS: dict[str, HubSet] = {
    "ag-news": HubSet(
        repository="fancyzhx/ag_news",
        parts=(HubPart(None, ("0", "1", "2", "3"), partial(_labelled, "text", "label")),),
    ),
    "europarl": HubSet(
        repository="Helsinki-NLP/europarl",
        parts=tuple(HubPart(pair, (name,), partial(_translated, name)) for name, pair in _PAIRS.items()),
    ),
    "github-code": HubSet(
        repository="codeparrot/github-code",
        parts=(HubPart(None, tuple(sorted(set(_EXTENSIONS.values()))), _source_file),),
        keep="last",
        data_files="data/train-*.parquet",
    ),
    "amazon-category": _amazon("category", "1", "2", "3", "5", "6", group="rating"),
    "amazon-sentiment": _amazon("rating", "1.0", "5.0"),
    "bias-in-bios-1": _bios("0", "1", "2", "6", "9"),
    "bias-in-bios-2": _bios("11", "13", "14", "18", "19"),
    "bias-in-bios-3": _bios("20", "21", "22", "25", "26"),
}
"""The eight sets, by the names that `--data` takes."""


def load_hub_set(name: str, source: str | None = None, texts: int = TEXTS) -> TextSet:
    """Return one of the eight sets: at most 5,000 texts of each class, of all of which 10,000 are used.

    Rows are streamed in their own order until every class has its texts.

    Args:
        name: A key of `HUB_SETS`.
        source: A local folder in the layout of the hub's repository; the hub where None.
        texts: Texts that are used, at most.

    Raises:
        FileNotFoundError: If the folder does not exist, or the hub does not give the data set out.
        ValueError: If a row lacks a field, or fewer than two classes have enough texts.
    """
    found = HUB_SETS[name]
    taken = _Taken()
    for part in found.parts:
        rows = open_rows(source or found.repository, config=part.config, data_files=found.data_files)
        taken.examples += _take(rows, part, found.group, source or found.repository, taken)
    return make_text_set(name, taken.examples, keep=found.keep, total=texts, blank=taken.blank)


@dataclass(eq=False)
class _Taken:
    examples: list[Example] = field(default_factory=list[Example])
    blank: int = 0

    def read(self, read: Callable[[Row, str], Example | None], row: Row, where: str) -> Example | None:
        """Return what a row is, None where it is blank, and count those."""
        try:
            return read(row, where)
        except _Blank:
            self.blank += 1
            return None


def _take(rows: Iterable[Row], part: HubPart, group: str | None, where: str, so_far: _Taken) -> Iterator[Example]:
    most = PER_CLASS if group is None else PER_CLASS // 2
    wanted = len(part.labels) * (1 if group is None else 2)
    taken: Counter[tuple[str, object]] = Counter()
    for number, row in enumerate(rows, start=1):
        place = f"{where}, row {number}"
        example = so_far.read(part.read, row, place)
        if example is not None and example.label in part.labels:
            key = (example.label, None if group is None else _field(row, group, place))
            if taken[key] < most:
                taken[key] += 1
                yield example
                if sum(count == most for count in taken.values()) >= wanted:
                    return
        if number >= MOST_ROWS:
            return


def load_surnames(source: str, texts: int = TEXTS) -> TextSet:
    """Return a set of names in context, each labelled by an attribute of its bearer, in the layout of Gurnee et al.

    A row has `text`, which ends with the name (and padding), `name`, and `class`: an occupation, a gender, whether the
    person lives. Codes are averaged over the tokens of the surname, which is what follows the name's first word. All
    bearers of a surname are in one part: a latent that knows a surname would tell the class of a person met before.

    Args:
        source: A folder that `save_to_disk` wrote, a .jsonl or .parquet file, or an id on the hub.
        texts: Names in context that are used, at most.

    Raises:
        FileNotFoundError: If there is no such folder or file, or the hub does not give it out.
        ValueError: If a row lacks a field or its name, or fewer than two classes have enough texts.
    """
    taken = _Taken()
    for number, row in enumerate(open_rows(source), start=1):
        example = taken.read(_surname, row, f"{source}, row {number}")
        if example is not None:
            taken.examples.append(example)
        if number >= MOST_ROWS:
            break
    name = printable(Path(source).stem)
    return make_text_set(name, taken.examples, per_class=PER_CLASS, total=texts, blank=taken.blank)


def _surname(row: Row, where: str) -> Example:
    text, name = _text(row, "text", where), text_of(row, "name", where).strip()
    start = text.rfind(name)
    first, _, surname = name.partition(" ")
    if start < 0 or not surname.strip():
        raise ValueError(
            f"A row must have its name of two words or more in its text; {where} has {name[:60]!r}. Remove the row."
        )
    end = start + len(name)
    span = (start + len(first) + 1, end)
    return Example(text[:end], label_of(_field(row, "class", where), where), span, _family(surname))


def _family(surname: str) -> str:
    """Return the last word, so that those of one family are together with whatever middle names and particles."""
    words = surname.casefold().split()
    return next((word for word in reversed(words) if word.strip(".,") not in _SUFFIXES), words[-1])


def open_rows(source: str, *, config: str | None = None, data_files: str | None = None) -> Iterable[Row]:
    """Return the rows of the training split of a data set, streamed; nothing that it brings is run.

    Args:
        source: A local folder in the layout of a repository of the hub, one that `save_to_disk` wrote, a .jsonl or
            .parquet file, or an id on the hub.
        config: The configuration, where the data set has several.
        data_files: A pattern of Parquet files to read instead of what the repository says.

    Raises:
        FileNotFoundError: If it cannot be opened.
        ValueError: If a row cannot be read, once rows are asked for.
    """
    return _to_the_end(_opened(source, config, data_files), source)


def _to_the_end(rows: Iterable[Row], source: str) -> Iterator[Row]:
    number, stream = 0, iter(rows)
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        # Files in any format, from any server: what reads them shares no narrower base.
        except Exception as error:
            raise ValueError(
                f"Data to probe with must be readable row by row; {source} is not behind row {number:,} "
                f"({_reason(error)}). Check the network or the copy, and try again."
            ) from error
        number += 1
        yield row


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _opened(source: str, config: str | None, data_files: str | None) -> Iterable[Row]:
    from datasets import load_dataset, load_from_disk

    path = Path(source).expanduser()
    try:
        if (path / "state.json").is_file():
            return cast("Iterable[Row]", load_from_disk(str(path)).with_format(None))
        if path.is_file():
            builder = "parquet" if path.suffix == ".parquet" else "json"
            return load_dataset(builder, data_files=str(path), split="train", streaming=True)
        if data_files is not None:
            files = str(path / data_files) if path.is_dir() else f"hf://datasets/{source}/{data_files}"
            return load_dataset("parquet", data_files=files, split="train", streaming=True)
        return load_dataset(str(path) if path.is_dir() else source, name=config, split="train", streaming=True)
    # The hub's client and the libraries beneath it share no narrower base.
    except Exception as error:
        raise FileNotFoundError(
            f"Data to probe with must be a local copy or a data set that the hub gives out; {source} cannot be opened "
            f"({_reason(error)}). Check the name and the network, or give NAME=FOLDER, a local copy."
        ) from error
