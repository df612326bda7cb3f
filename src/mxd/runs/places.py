"""Where the files lie that a run names: names may be relative to the folder in which it was begun, and files move."""

import glob
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORKING_FOLDER = "working_folder"
"""The field of a configuration that says to which folder its names of files are relative."""


def recorded_place(name: str, description: Mapping[str, Any], *, alias: str = "") -> str:
    """Return where the file, folder or glob is that a run calls by a name.

    It is looked for below the folder in which the run was begun, which runs of earlier versions do not tell. What is
    not there (an id on the hub, or because both have moved together) keeps its name.

    Args:
        name: What was asked for when the run was begun.
        description: The run's run.json.
        alias: Name that stands for something else than a file, whatever files there are.
    """
    folder, path = description.get(WORKING_FOLDER), Path(name).expanduser()
    if not isinstance(folder, str) or path.is_absolute() or name == alias:
        return name
    if (there := Path(folder, path)).exists():
        return str(there)
    pattern = str(Path(glob.escape(folder), path))
    is_found = glob.has_magic(name) and any(glob.iglob(pattern, recursive=True))
    return pattern if is_found else name


@contextmanager
def finding_model(run: str, place: str, *, is_given: bool) -> Generator[None]:
    """Say which option names a model that is not where its run found it.

    Args:
        run: The run, for messages.
        place: Where the model is looked for.
        is_given: Whether the place was given just now, so that the option is known.

    Raises:
        FileNotFoundError: If what is done meanwhile finds no model there.
    """
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if is_given or Path(place).expanduser().is_dir():
            raise
        raise FileNotFoundError(
            f"{error} {run} was trained on it; if it lies elsewhere now, name its folder with --model."
        ) from error


@contextmanager
def finding_text(run: str, *, is_given: bool) -> Generator[None]:
    """Say which option names text that is not where its run found it; see `finding_model`.

    Raises:
        FileNotFoundError: If what is done meanwhile finds no text there.
    """
    try:
        yield
    except FileNotFoundError as error:
        if is_given:
            raise
        raise FileNotFoundError(
            f"{error} {run} was trained on it; if it lies elsewhere now, name its files with --text."
        ) from error
