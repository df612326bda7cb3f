"""Locks on files, which end with the process that holds them, however that ends.

Where files cannot be locked, as on Windows and some network file systems, nothing is kept out and nothing waited for.
"""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

_NO_LOCKS_HERE = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def exclusive(lock: Path, refusal: str) -> Generator[None, None, None]:
    """Hold the lock on a file, which is made if need be, for as long as this is open.

    Whoever holds it may remove the file.

    Args:
        lock: The file; nothing is written to it.
        refusal: What is said where another process, or this one elsewhere, has the lock.

    Raises:
        ValueError: If somebody else has the lock.
    """
    if not has_locks():
        yield
        return
    with lock.open("ab") as file:
        try:
            is_locked = _lock(file, wait=False)
        except BlockingIOError as error:
            raise ValueError(refusal) from error
        try:
            # Its last holder may have removed the file since it was opened, and the next one made another.
            if is_locked and not _is_same(lock, file):
                raise ValueError(refusal)
            yield
        finally:
            _unlock(file)


@contextmanager
def alone(path: Path, refusal: str) -> Generator[None, None, None]:
    """Keep others who ask for the same from a file or folder, by a lock beside it of which nothing stays behind.

    Args:
        path: The file or folder, which need not be there; the folder that it is in must.
        refusal: What is said where another process, or this one elsewhere, has the lock.

    Raises:
        ValueError: If somebody else has the lock.
    """
    lock = path.with_name(f".{path.name}.lock")
    with exclusive(lock, refusal):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def in_turn(lock: Path) -> Generator[None, None, None]:
    """Wait for the lock on a file, which is made if need be and stays, and hold it for as long as this is open."""
    if not has_locks():
        yield
        return
    with lock.open("ab") as file:
        _lock(file, wait=True)
        try:
            yield
        finally:
            _unlock(file)


def has_locks() -> bool:
    """Whether this system has locks on files."""
    return find_spec("fcntl") is not None


def _lock(file: IO[bytes], *, wait: bool) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        return False
    return True


def _unlock(file: IO[bytes]) -> None:
    import fcntl

    try:
        # Closing alone would leave the lock to forked children, which share the open file.
        fcntl.flock(file, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise


def _is_same(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
