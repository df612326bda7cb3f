"""The pages as static files that open from disk."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from mxd.atomic import JSON, filled_folder
from mxd.explorer.library import Library, whole_end
from mxd.explorer.pages import PAGE_FILES, page_file

SHARD = 128
"""Latents in one file."""

MARKER = "index.html"


def export(library: Library, folder: Path) -> int:
    """Write the pages, without what needs the model, to a folder, whole or not at all.

    Args:
        library: What is shown.
        folder: Where; it must not exist, or be an earlier export.

    Returns:
        The number of files.

    Raises:
        ValueError: If something else stands there.
    """
    if folder.exists() and not _is_export(folder):
        raise ValueError(
            f"{folder} must not exist, be empty or be an earlier export; it is not. Name another --export."
        )
    count = 0
    with filled_folder(folder) as partial:
        (partial / "data").mkdir()
        (partial / "page").mkdir()
        for name in PAGE_FILES:
            target = partial / name if name == MARKER else partial / "page" / name
            target.write_text(page_file(name, live=False), encoding="utf-8")
            count += 1
        for name, value in _data(library):
            (partial / "data" / f"{name}.js").write_text(_script(name, value), encoding="utf-8")
            count += 1
        shutil.rmtree(folder, ignore_errors=True)
    return count


def _is_export(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or (names == {MARKER, "page", "data"} and (folder / "data" / "run.js").is_file())


def _data(library: Library) -> Iterator[tuple[str, JSON]]:
    """Yield what the pages load, by the names under which they do."""
    overview = library.overview()
    yield "run", {**overview, "shard": SHARD}
    for number, student in enumerate(cast("list[dict[str, Any]]", overview["students"])):
        name = str(student["name"])
        yield f"map-{number}", json.loads(library.map(name))
        yield f"labels-{number}", library.labels(name)
        found: list[JSON] = []
        for first in range(0, student["num_latents"], SHARD):
            latents = range(first, min(first + SHARD, student["num_latents"]))
            shard = [library.latent(name, latent) for latent in latents]
            found += [_found_by(latent) for latent in shard]
            yield f"latents-{number}-{first // SHARD}", shard
        yield f"search-{number}", found


def _found_by(latent: dict[str, Any]) -> JSON:
    """Return the tokens a latent fires on, those it promotes, and the text before the peak of its best context."""
    example = next(iter(latent["examples"]), None)
    text = "" if example is None else "".join(example["tokens"][: whole_end(example["tokens"], example["peak"] + 1)])
    return [[entry[0] for entry in latent["fires_on"]], [entry[0] for entry in latent["promoted"]], text]


def _script(name: str, value: JSON) -> str:
    # Escaped, so that no text can end a script element wherever the file's content is put.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return f"explorerData({json.dumps(name)},{text});\n"
