"""Files that are either the old or the new content, never half of it, whenever the process dies."""

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

JSON: TypeAlias = bool | int | float | str | Sequence[object] | Mapping[str, object] | None
"""A value that JSON can hold; nested values are checked when they are written."""


def json_text(value: JSON) -> str:
    """The value as indented JSON in the order of its keys, for files that people read.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON cannot hold.
        TypeError: If a value, however deep, is no JSON value.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def canonical_json(value: JSON) -> str:
    """The value as JSON without spaces and with sorted keys, the same for equal values: for checksums.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON cannot hold.
        TypeError: If a value, however deep, is no JSON value.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file such that a reader finds the whole old or the whole new content, also after a power cut.

    The content goes to `.<name>.partial` beside the file, reaches the disk, and is renamed into
    place. One process at a time may write a given file; the folder must exist.

    Raises:
        OSError: If it cannot be written (disk full, no permission); the old content is then untouched.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files such that a failure (disk full, no permission) leaves all the old ones; readers see no half file.

    Raises:
        OSError: If one cannot be written.
    """
    try:
        for path, content in files.items():
            partial = partial_path(path)
            partial.write_bytes(content)
            sync_file(partial)
        for path in files:
            partial_path(path).replace(path)
    finally:
        for path in files:
            partial_path(path).unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        sync_folder(folder)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file as `write_bytes_atomically` does."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_json_atomically(path: Path, value: JSON) -> None:
    """Write an indented JSON file as `write_bytes_atomically` does.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON cannot hold.
        TypeError: If a value, however deep, is no JSON value.
    """
    write_text_atomically(path, json_text(value))


def partial_path(path: Path) -> Path:
    """Where a file or folder stands while it is being written: hidden, beside its final place."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def filled_folder(folder: Path) -> Generator[Path]:
    """Make a folder beside a place, and move it there if it could be filled; else nothing of it stays.

    What is put into it is on the disk only where that was waited for. What stood at the place must be gone by the end,
    or be an empty folder.

    Args:
        folder: The place; folders above it are made where they do not exist.

    Yields:
        The folder to fill, which is empty.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for inner in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            sync_folder(inner)
        if folder.exists():
            # Not every system renames onto a folder, be it empty.
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(folder.parent)


def is_new_or_empty(folder: Path) -> bool:
    """Whether nothing stands at a place but, at most, an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def require_new_folder(folder: Path, what: str) -> None:
    """Check that a place is one for `filled_folder`: nothing is there, or an empty folder that can be replaced.

    Args:
        folder: The place.
        what: What is to be written there, for messages.

    Raises:
        ValueError: If it is not, or no folder can be made there.
    """
    placed = folder.absolute()
    partial, above = partial_path(placed) if placed.name else placed, nearest_folder(placed.parent)
    broken = [path for path in placed.parents if path.is_symlink() and not path.exists()]
    if placed.is_symlink():
        wrong = f"{folder} is a link. Name where it leads, or another"
    elif placed.name in ("", "..") or not is_new_or_empty(placed):
        wrong = f"{folder} holds something. Name another"
    elif placed.exists() and (placed.samefile(Path.cwd()) or placed.is_mount()):
        wrong = f"{folder} is where this runs or a volume is mounted, and cannot be replaced. Name a new folder in it"
    elif broken or not above.is_dir():
        wrong = f"none can be made at {folder}, since {broken[0] if broken else above} is a file. Name another"
    elif partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        wrong = f"{partial}, where it would be filled, is a link or a file. Remove that, or name another"
    else:
        return
    raise ValueError(f"{what} needs a new or empty folder; {wrong}.")


def nearest_folder(path: Path) -> Path:
    """The path, or the first above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def sync_file(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def settle_file(path: Path) -> None:
    """Wait until a file that safetensors wrote is on the disk, and let those read it whom its folder lets.

    safetensors makes files readable by their owner alone, whatever the umask says.
    """
    path.chmod(path.parent.stat().st_mode & 0o666)
    sync_file(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries (new names, renames) are on the disk, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
