"""The folder of a run: its immutable configuration and whether it has finished."""

import json
import os
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, cast

from mxd.atomic import JSON, json_text, nearest_folder, partial_path, write_json_atomically
from mxd.locks import exclusive, has_locks

CONFIGURATION_FILE = "run.json"
FINISHED_FILE = "finished.json"
VERSIONS = "versions"
"""The field of a configuration that says with what a run was begun."""
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
SNAPSHOTS = "snapshots"
"""The folder of the snapshots from which a run goes on."""


def create_run(path: Path, configuration: Mapping[str, JSON]) -> None:
    """Make the run's folder and write its configuration to `run.json`, once and for all.

    Raises:
        ValueError: If `require_place` refuses the folder, or the configuration holds NaN or infinity.
        TypeError: If the configuration holds something that is no JSON value.
    """
    json_text(configuration)
    require_place(path, resume=False)
    path.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path / CONFIGURATION_FILE, configuration)


def require_place(path: Path, resume: bool) -> None:
    """Check that a run can be made here, or goes on here, before anything long begins; nothing is written.

    Args:
        path: The run's folder.
        resume: Whether a run that is there is to be continued.

    Raises:
        ValueError: If a run is there and is not to be continued, the folder holds anything else but the lock, or it
            cannot be made.
    """
    if is_run(path):
        if not resume:
            raise ValueError(f"{path} exists; pass --resume to continue it or name another --out.")
        return
    _refuse_file(path)
    harmless = {partial_path(path / CONFIGURATION_FILE), path / LOCK_FILE}
    if path.exists() and any(entry not in harmless for entry in path.iterdir()):
        raise ValueError(f"{path} exists, is not empty and holds no {CONFIGURATION_FILE}; name another --out.")
    parent = nearest_folder(path)
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(
            f"{path} must be where a folder can be made; {parent} is none to write in; name another --out."
        )


def require_command(configuration: Mapping[str, JSON], command: str) -> None:
    """Check that a run was begun by the command that is to continue it.

    Args:
        configuration: What its `run.json` holds.
        command: What stands there as `command`; runs of `train` of an earlier version have none.

    Raises:
        ValueError: If it was begun by another.
    """
    began = configuration.get("command", "induce" if "task" in configuration else "train")
    if began != command:
        raise ValueError(
            f"a run must be one of mxd {command} to be continued by it; this one is of {began!r}; name another --out."
        )


def is_run(path: Path) -> bool:
    """Whether the folder holds a run, finished or not."""
    return (path / CONFIGURATION_FILE).is_file()


def read_configuration(path: Path) -> dict[str, JSON]:
    """The configuration with which the run was created.

    Raises:
        ValueError: If the folder holds no run, or its `run.json` is damaged.
    """
    if not is_run(path):
        raise ValueError(f"{path} must be the folder of a run; it holds no {CONFIGURATION_FILE}; check the path.")
    try:
        value: object = json.loads((path / CONFIGURATION_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / CONFIGURATION_FILE} must hold JSON ({error}); restore it from a copy.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path / CONFIGURATION_FILE} must hold a JSON object; restore it from a copy.")
    return cast("dict[str, JSON]", value)


def reopen_run(path: Path, configuration: Mapping[str, JSON], ignore: Collection[str] = ()) -> dict[str, JSON]:
    """The stored configuration, after it was found equal to the one asked for; writes nothing.

    Of a finished run, for which nothing is computed any more, versions may differ, and so may what only one of the two
    has a name for: a later version of mxd has other options.

    Args:
        path: The run's folder.
        configuration: What is asked for now.
        ignore: Dotted names of fields that may differ; a name covers all that is beneath it.

    Returns:
        What `run.json` holds, which is what the run goes on with.

    Raises:
        ValueError: If the folder holds no run, or a field differs: the message names every one.
    """
    stored = read_configuration(path)
    asked = cast("dict[str, JSON]", json.loads(json_text(configuration)))
    differing = [
        difference
        for difference in _differences("", stored, asked)
        if not any(difference.is_of(ignored) for ignored in ignore)
        and not (is_finished(path) and (difference.is_of(VERSIONS) or difference.is_of_one_alone))
    ]
    refusal = _refusal(path, differing)
    if refusal:
        raise ValueError(refusal)
    return stored


def _refusal(path: Path, differing: "Sequence[_Difference]") -> str:
    """Return what differs and what to do about it: options can be asked for, versions have to be installed."""
    versions = [difference for difference in differing if difference.name.startswith(f"{VERSIONS}.")]
    others = [difference for difference in differing if difference not in versions]
    sentences: list[str] = []
    if others:
        # What comes out otherwise of the same options cannot be asked for.
        is_of_version = all("." not in difference.name for difference in others)
        remedy = "continue it with the version of mxd that began it" if is_of_version else "ask for the stored values"
        sentences.append(
            f"{path} was started with another configuration (stored → asked): {', '.join(map(str, others))}; "
            f"{remedy} or name another --out."
        )
    if versions:
        packages = [
            f"'{difference.name.removeprefix(f'{VERSIONS}.')}=={difference.stored}'"
            for difference in versions
            if isinstance(difference.stored, str) and not difference.name.endswith(".python")
        ]
        install = f", with pip install {' '.join(packages)}," if packages else ""
        sentences.append(
            f"{path} was started with other versions (stored → installed): {', '.join(map(str, versions))}, which may "
            f"round otherwise; install the stored ones{install} to continue it, or name another --out."
        )
    return " ".join(sentences)


def mark_finished(path: Path, step: int) -> None:
    """Record in `finished.json` that the run has come to its end, after how many steps and when."""
    write_json_atomically(path / FINISHED_FILE, {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")})


def is_finished(path: Path) -> bool:
    """Whether `mark_finished` was called on this run."""
    return (path / FINISHED_FILE).is_file()


@contextmanager
def locked(path: Path) -> Generator[None, None, None]:
    """Keep other processes from training in the run's folder, which is made if need be, for as long as this is open.

    The lock is on the file `.lock`, which stays. Where files cannot be locked, nothing is kept out.

    Raises:
        ValueError: If another process, or this one elsewhere, has the lock, or the path is a file.
    """
    if not has_locks():
        yield
        return
    _refuse_file(path)
    path.mkdir(parents=True, exist_ok=True)
    with exclusive(path / LOCK_FILE, f"another process is training in {path}; wait for it or stop it."):
        yield


def _refuse_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} must be a folder or not exist; got a file; name another --out.")


class _Absent:
    """Stands for a field that one of two configurations does not have."""


class _Difference(NamedTuple):
    """A leaf in which two JSON values differ."""

    name: str
    """Dotted."""
    stored: object
    asked: object

    def is_of(self, name: str) -> bool:
        """Whether it is this field or beneath it."""
        return self.name == name or self.name.startswith(f"{name}.")

    @property
    def is_of_one_alone(self) -> bool:
        """Whether only one of the two has a field of this name; an element more of a list is another value."""
        is_element = self.name.rsplit(".", 1)[-1].isdigit()
        return not is_element and (isinstance(self.stored, _Absent) or isinstance(self.asked, _Absent))

    def __str__(self) -> str:
        return f"{self.name} ({_shown(self.stored)} → {_shown(self.asked)})"


def _differences(name: str, stored: object, asked: object) -> list[_Difference]:
    """Return each leaf in which two JSON values differ."""
    old, new = _children(stored), _children(asked)
    same_kind = type(stored) is type(asked)
    if old is None or new is None or not same_kind:
        # JSON's true equals Python's 1, while 1 and 1.0 are the same number.
        same = stored == asked and isinstance(stored, bool) == isinstance(asked, bool)
        return [] if same else [_Difference(name, stored, asked)]
    found: list[_Difference] = []
    for key in [*old, *(key for key in new if key not in old)]:
        dotted = f"{name}.{key}" if name else key
        found += _differences(dotted, old.get(key, _Absent()), new.get(key, _Absent()))
    return found


def _children(value: object) -> dict[str, object] | None:
    if isinstance(value, dict):
        return cast("dict[str, object]", value)
    if isinstance(value, list):
        return {str(index): child for index, child in enumerate(cast("list[object]", value))}
    return None


def _shown(value: object) -> str:
    if isinstance(value, _Absent):
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
