"""The concepts that probing found for latents, where a run has been probed."""

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from mxd.checkpoint import edits_digest
from mxd.probing import PROBING_FILE, VERSION

logger = logging.getLogger(__name__)


class Concept(NamedTuple):
    """What a latent detects best."""

    concept: str
    """The concept's name."""
    score: float
    """F1 on the tokens that nothing was chosen on."""


def read_concepts(run: Path) -> Mapping[str, Mapping[int, Concept]]:
    """Return the best concept of each latent by `<layer>/<id>` and number; nothing where the run was not probed.

    A file of another version, of layers that have been edited since, or one that is damaged, is as good as none; that
    is logged.
    """
    path = run / PROBING_FILE
    try:
        found = path.stat()
    except FileNotFoundError:
        return {}
    return _read(path, found.st_mtime_ns, found.st_size, edits_digest(run))


@lru_cache(maxsize=4)
def _read(path: Path, changed: int, size: int, edits: str | None) -> Mapping[str, Mapping[int, Concept]]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']}, not {VERSION}")
        # An earlier version of mxd did not write it.
        if content.get("identity", {}).get("edits") != edits:
            raise ValueError("the layers have been edited since; run mxd probe again")
        students = cast("dict[str, Any]", content["token_level"]["students"])
        return {name: _concepts(student["latents"]) for name, student in students.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is left out: it must be what mxd probe writes (%s).", path, error)
        return {}


def _concepts(latents: list[dict[str, Any]]) -> dict[int, Concept]:
    return {int(entry["latent"]): Concept(str(entry["concept"]), float(entry["f1"] or 0)) for entry in latents}
