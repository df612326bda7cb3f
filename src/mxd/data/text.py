"""Where text comes from: `stdlib`, local files, or a dataset of the Hugging Face hub that is streamed."""

import glob
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mxd.data.documents import (
    ENDINGS,
    Document,
    check_fields,
    kind_of,
    read_documents,
    row_document,
    text_document,
)
from mxd.data.holdout import is_held_out
from mxd.data.stdlib import stdlib_modules

if TYPE_CHECKING:
    from datasets import IterableDataset

STDLIB = "stdlib"
"""The specification that stands for the source of Python's standard library."""


class TextIdentity(NamedTuple):
    """What was read, for the record of a run; two texts with equal identities are the same text."""

    names: tuple[str, ...]
    """Names of the local files without their folders, `stdlib`, or the hub id."""
    digest: str | None
    """Digest of the documents and of which are held out; None for a hub dataset."""
    revision: str | None
    """Commit of the hub dataset; None for local text."""
    split: str | None
    """Split of the hub dataset; None for local text."""


class Counts(NamedTuple):
    """How many documents a text has."""

    documents: int
    """All of them."""
    held_out: int
    """Those that no training sees."""


class TextSource(ABC):
    """Documents in a fixed order, each either for training or held out."""

    is_local: bool
    """Whether the whole text was read and checked when it was opened."""
    identity: TextIdentity
    """What was read."""
    counts: Counts | None
    """How many documents there are; None where nobody knows before all is read, as of a hub dataset."""

    @abstractmethod
    def documents(self, held_out: bool, skip: int = 0) -> Iterator[Document]:
        """Yield the held-out documents, or the training documents, in order.

        Args:
            held_out: Which of the two.
            skip: Rows of the source to leave out at its beginning, whichever kind they are, so that
                `skip=document.row` begins with that document.
        """

    @property
    def name(self) -> str:
        """The text's name for messages."""
        names = self.identity.names
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class LocalText(TextSource):
    """Text that is held in memory, and was checked whole.

    Args:
        names: What the documents were read from.
        documents: The documents; they are numbered anew.
        held_out_identities: Documents held out beside those that `is_held_out` names.

    Raises:
        ValueError: If there is no document.
    """

    def __init__(
        self, names: Iterable[str], documents: Iterable[Document], held_out_identities: Collection[str] = ()
    ) -> None:
        self.is_local = True
        self._documents = [document._replace(row=row) for row, document in enumerate(documents)]
        names = tuple(names)
        if not self._documents:
            raise ValueError(f"Text must hold at least one document; {', '.join(names)} holds none. Give other text.")
        extra = frozenset(held_out_identities)
        self._held_out = [d.identity in extra or is_held_out(d.identity) for d in self._documents]
        self.identity = TextIdentity(names, self._digest(), None, None)
        self.counts = Counts(len(self._documents), sum(self._held_out))

    def documents(self, held_out: bool, skip: int = 0) -> Iterator[Document]:
        """Yield the held-out documents, or the training documents, in order; see `TextSource.documents`."""
        for document in itertools.islice(self._documents, skip, None):
            if self._held_out[document.row] == held_out:
                yield document

    def _digest(self) -> str:
        digest = blake2b(digest_size=16)
        for document, held_out in zip(self._documents, self._held_out, strict=True):
            content = document.text.encode() if document.ids is None else repr(document.ids).encode()
            digest.update(f"{held_out} {document.ids is None} {len(content)} ".encode())
            digest.update(content)
        return digest.hexdigest()


class HubText(TextSource):
    """A dataset of the hub, streamed in its own order: nothing is downloaded before it is read.

    Args:
        dataset: Id on the hub, or a local folder in the layout of one.
        config: Name of the dataset's configuration, where it has several.
        text_field: Column that holds the text; a column `input_ids` is taken before it.
        split: Split of the dataset.
        revision: Branch, tag or commit; the newest commit of the main branch where None. Resolved to a commit once,
            which `identity` records.

    Raises:
        FileNotFoundError: If the hub does not give out such a dataset, or cannot be reached.
        ValueError: If the dataset has no such split or column.
    """

    def __init__(
        self,
        dataset: str,
        *,
        config: str | None = None,
        text_field: str = "text",
        split: str = "train",
        revision: str | None = None,
    ) -> None:
        self.is_local = False
        self.counts = None
        commit = revision if Path(dataset).is_dir() else _resolve_commit(dataset, revision)
        rows = _stream(dataset, config, split, commit)
        name = dataset if config is None else f"{dataset}:{config}"
        # A dataset whose columns are only known by reading is checked row by row.
        if rows.column_names is not None:
            check_fields(rows.column_names, text_field, name)
            rows = rows.select_columns("input_ids" if "input_ids" in rows.column_names else text_field)
        self._rows = rows
        self._text_field = text_field
        self.identity = TextIdentity((name,), None, commit, split)

    def documents(self, held_out: bool, skip: int = 0) -> Iterator[Document]:
        """Yield the held-out documents, or the training documents, in order; see `TextSource.documents`."""
        name = self.name
        for row, fields in enumerate(self._rows.skip(skip), start=skip):
            document = row_document(fields, self._text_field, f"{name}, row {row + 1}", row)
            if document is not None and is_held_out(document.identity) == held_out:
                yield document


def open_text(
    spec: Sequence[str],
    *,
    text_field: str = "text",
    split: str = "train",
    revision: str | None = None,
    held_out_modules: Collection[str] = (),
) -> TextSource:
    """Open the text that a specification names.

    Args:
        spec: `stdlib`, local files, folders and globs in any number, or one hub dataset id (`ID:CONFIG` where the
            dataset has several configurations). A path that exists is taken before a hub id of the same name.
        text_field: Field of a row, or column of a table, that holds the text.
        split: Split of a hub dataset.
        revision: Revision of a hub dataset.
        held_out_modules: Paths of `stdlib` modules that are held out beside those that the hash names.

    Raises:
        FileNotFoundError: If a file is missing, a pattern matches nothing, or the hub has no such dataset.
        ValueError: If the content cannot be used; the sentence says where, and what to do.
    """
    if isinstance(spec, str) or not spec:
        raise ValueError(f"Text must be given as at least one name; got {spec!r}. Give stdlib, files or a hub id.")
    if any(map(is_hub_dataset, spec)):
        if len(spec) > 1:
            hub_id = next(filter(is_hub_dataset, spec))
            raise ValueError(
                f"A hub dataset must be the only text; got {hub_id} (no such local file) among {len(spec)} names. "
                "Correct the file's name, or give the dataset alone."
            )
        dataset, _, config = spec[0].partition(":")
        return HubText(dataset, config=config or None, text_field=text_field, split=split, revision=revision)
    paths = dict.fromkeys(path for name in spec if name != STDLIB for path in local_files(name))
    modules = stdlib_modules() if STDLIB in spec else ()
    documents = itertools.chain(
        (text_document(module.source, 0, identity=module.path) for module in modules),
        *(read_documents(path, text_field) for path in paths),
    )
    names = ([STDLIB] if STDLIB in spec else []) + [path.name for path in paths]
    return LocalText(names, documents, held_out_modules if STDLIB in spec else ())


def local_files(name: str) -> list[Path]:
    """Return the text files that a path, a folder (with all below it) or a glob names, in the order of their paths.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and kind_of(file) is not None]
        problem = f"The folder {name} holds no file that ends in {ENDINGS}"
    elif glob.has_magic(name):
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
        problem = f"No file matches the pattern {name}"
    else:
        files = []
        problem = f"There is no file {name}"
    if not files:
        raise FileNotFoundError(f"{problem}. Check the path; it is relative to {Path.cwd()}.")
    return sorted(files)


def is_hub_dataset(name: str) -> bool:
    """Whether a name of text can only be that of a dataset on the hub, and is no file's or folder's here."""
    if name == STDLIB or Path(name).expanduser().exists() or kind_of(Path(name)) is not None:
        return False
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", name) is not None


def _resolve_commit(dataset: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, revision=revision).sha
    # The hub's client lets the exceptions of whichever transport it uses pass, and they share no narrower base.
    except Exception as error:
        at = "" if revision is None else f" at revision {revision}"
        raise FileNotFoundError(
            f"{dataset}{at} is neither a local file or folder nor a dataset that the hub gives out ({_reason(error)}). "
            "Check the name and the network, or give local text."
        ) from error


def _stream(dataset: str, config: str | None, split: str, commit: str | None) -> "IterableDataset":
    from datasets import load_dataset

    try:
        return load_dataset(dataset, name=config, split=split, revision=commit, streaming=True)
    # The same as above; a missing split or configuration comes as one of several types, too.
    except Exception as error:
        raise ValueError(
            f"The hub dataset {dataset} must have the split {split!r}"
            f"{'' if config is None else f' of the configuration {config!r}'}; it cannot be opened ({_reason(error)}). "
            "Choose another --split, or write the dataset as ID:CONFIG."
        ) from error


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return (words if len(words) <= 300 else words[:297] + "...").rstrip(".")
