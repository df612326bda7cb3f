"""The data sets of the paper, by their names on the Hugging Face hub or from local copies in the same layout.

The eight sample-level sets are those of SAEBench (Karvonen et al., 2025, `sae_bench_utils/dataset_utils.py`), as in
the MxD paper; the token-level ones are in the layout of Gurnee et al. (2023, `probing_datasets/wikidata.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, cast

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


def _labelled(text: str, label: str, row: Row, where: str) -> Example:
    return Example(text_of(row, text, where), label_of(_field(row, label, where), where))


def _translated(language: str, row: Row, where: str) -> Example | None:
    translation = _field(row, "translation", where)
    text = cast("dict[str, object]", translation).get(language) if isinstance(translation, dict) else None
    return Example(text, language) if isinstance(text, str) and text.strip() else None


_EXTENSIONS = {".c": "C", ".h": "C", ".html": "HTML", ".java": "Java", ".php": "PHP", ".py": "Python"}


def _source_file(row: Row, where: str) -> Example | None:
    # The data set's own script, too, tells the language by the extension.
    language = _EXTENSIONS.get(Path(str(_field(row, "path", where))).suffix)
    text = str(_field(row, "content", where))
    if language is None or len(text) <= SKIPPED_CHARACTERS + LEAST_CHARACTERS:
        return None
    return Example(text[SKIPPED_CHARACTERS:], language)


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
    examples: list[Example] = []
    for part in found.parts:
        rows = open_rows(source or found.repository, config=part.config, data_files=found.data_files)
        examples += _take(rows, part, found.group, source or found.repository)
    return make_text_set(name, examples, keep=found.keep, total=texts)


def _take(rows: Iterable[Row], part: HubPart, group: str | None, where: str) -> Iterator[Example]:
    most = PER_CLASS if group is None else PER_CLASS // 2
    wanted = len(part.labels) * (1 if group is None else 2)
    taken: Counter[tuple[str, object]] = Counter()
    for number, row in enumerate(rows, start=1):
        place = f"{where}, row {number}"
        example = part.read(row, place)
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
    person lives. Codes are averaged over the tokens of the surname, which is what follows the name's first word.

    Args:
        source: A folder that `save_to_disk` wrote, a .jsonl or .parquet file, or an id on the hub.
        texts: Names in context that are used, at most.

    Raises:
        FileNotFoundError: If there is no such folder or file, or the hub does not give it out.
        ValueError: If a row lacks a field or its name, or fewer than two classes have enough texts.
    """
    examples: list[Example] = []
    for number, row in enumerate(open_rows(source), start=1):
        where = f"{source}, row {number}"
        text, name = text_of(row, "text", where), text_of(row, "name", where).strip()
        start = text.rfind(name)
        first, _, surname = name.partition(" ")
        if start < 0 or not surname:
            raise ValueError(
                f"A row must have its name of two words or more in its text; {where} has {name!r}. Remove the row."
            )
        end = start + len(name)
        span = (start + len(first) + 1, end)
        examples.append(Example(text[:end], label_of(_field(row, "class", where), where), span))
        if number >= MOST_ROWS:
            break
    return make_text_set(Path(source).stem, examples, per_class=PER_CLASS, total=texts)


def open_rows(source: str, *, config: str | None = None, data_files: str | None = None) -> Iterable[Row]:
    """Return the rows of the training split of a data set, streamed; nothing that it brings is run.

    Args:
        source: A local folder in the layout of a repository of the hub, one that `save_to_disk` wrote, a .jsonl or
            .parquet file, or an id on the hub.
        config: The configuration, where the data set has several.
        data_files: A pattern of Parquet files to read instead of what the repository says.

    Raises:
        FileNotFoundError: If it cannot be opened.
    """
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
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise FileNotFoundError(
            f"Data to probe with must be a local copy or a data set that the hub gives out; {source} cannot be opened "
            f"({reason}). Check the name and the network, or give NAME=FOLDER, a local copy."
        ) from error
