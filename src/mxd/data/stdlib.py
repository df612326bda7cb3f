"""Python's own standard library as text: every machine with Python has it, and nobody has to download it."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
"""Folders that hold the library's own tests."""

LEFT_OUT_FOLDERS = TEST_FOLDERS | {"encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages"}
"""Folders whose modules are no documents of `stdlib`: installed packages, tests (Linux distributions leave them out),
generated tables (`encodings`, `pydoc_data`) and the test-like grammar fixtures of `lib2to3`."""

GENERATED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "_distutils_system_mod")
"""Modules and folders that a build or a distribution writes, so that they differ from machine to machine."""


class Module(NamedTuple):
    """One module of the standard library."""

    path: str
    """Path below the standard library's folder, with forward slashes: the document's identity."""
    source: str
    """The module's text."""


def stdlib_modules() -> Iterator[Module]:
    """Yield the standard library's modules of this Python in the order of their paths, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path, relative in _python_files(root):
        if LEFT_OUT_FOLDERS.isdisjoint(relative.parts) and not relative.parts[0].startswith(GENERATED_PREFIXES):
            yield from _read(path, relative)


def stdlib_test_modules() -> Iterator[Module]:
    """Yield the standard library's own tests where this Python has them; they are documents of no evaluation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path, relative in _python_files(root):
        folders = set(relative.parts)
        if folders & TEST_FOLDERS and not folders & {"lib2to3", "site-packages", "dist-packages"}:
            yield from _read(path, relative)


def _python_files(root: Path) -> Iterator[tuple[Path, Path]]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        yield path, path.relative_to(root)


def _read(path: Path, relative: Path) -> Iterator[Module]:
    # A few of Python's tests are deliberately not UTF-8; they are no text for a model.
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    if source.strip():
        yield Module(relative.as_posix(), source)
