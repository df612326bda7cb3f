"""Resumable state on disk: one folder of named tensors per snapshot, whole or absent.

A snapshot is `<snapshots>/<step>/` with

- `tensors.safetensors`, the tensors;
- `state.json`, `{"format", "step", "state", "tensors_sha256", "sha256"}`, where `sha256` is that of the
  canonical JSON of the other four.

It is written as `.<step>.partial`, reaches the disk and is renamed into place, so a process that dies
at any moment leaves whole snapshots and hidden leftovers, which the next save removes. Loading writes
nothing: it may look at the folder of a run that is still going on.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxd.atomic import JSON, canonical_json, file_sha256, json_text, partial_path, settle_file, sync_file, sync_folder

logger = logging.getLogger(__name__)

TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
FORMAT = 1
KEPT = 2
"""Number of snapshots that remain after a save."""


class Snapshot(NamedTuple):
    """What was saved at one step."""

    step: int
    """The step it was saved under."""
    tensors: Mapping[str, Tensor]
    """On the CPU, bit for bit what was saved, each with memory of its own."""
    state: Mapping[str, JSON]
    """The rest; tuples have become lists and keys strings, as in any JSON."""


class SnapshotError(OSError):
    """A snapshot could not be written; the earlier ones are untouched."""


def save_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON]) -> Path:
    """Write a snapshot and remove all but the newest two.

    A snapshot of the same step is replaced. Snapshots of later steps are removed: a run's step only
    grows, so they are damaged ones that loading passed over.

    Args:
        folder: Where the run's snapshots are; made if it does not exist.
        step: Number of optimiser steps taken, at least 0.
        tensors: Of any dtype, shape and device that safetensors knows; they may share memory. Contiguous CPU
            tensors that do not overlap are written without a copy.
        state: Everything that is no tensor. NaN and infinity are refused.

    Returns:
        The snapshot's folder.

    Raises:
        SnapshotError: If it cannot be written, for instance because the disk is full.
        ValueError: If step, a tensor's dtype or name, or a number in the state cannot be stored.
        TypeError: If the state holds something that is no JSON value.
    """
    if step < 0:
        raise ValueError(f"A snapshot's step must be at least 0; got {step}.")
    # As it will be read back: a key that is no string becomes one, and sorts differently.
    content: dict[str, JSON] = json.loads(canonical_json({"format": FORMAT, "step": step, "state": state}))
    final = folder / f"{step:010d}"
    partial = partial_path(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        partial.mkdir()
        _write_tensors(partial / TENSORS_FILE, tensors)
        content["tensors_sha256"] = file_sha256(partial / TENSORS_FILE)
        content["sha256"] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
        (partial / STATE_FILE).write_text(json_text(content), encoding="utf-8")
        sync_file(partial / STATE_FILE)
        sync_folder(partial)
        _rename_into_place(partial, final)
    except (OSError, SafetensorError) as error:
        raise SnapshotError(_write_failure(folder, step, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _prune(folder, step)
    return final


def load_newest_snapshot(folder: Path) -> Snapshot | None:
    """The newest snapshot whose checksums hold, or None where none was ever saved.

    A damaged snapshot is passed over with a logged warning.

    Raises:
        ValueError: If there are snapshots and all of them are damaged.
    """
    candidates = _candidates(folder)
    for path in candidates:
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("Snapshot %s is damaged and passed over: %s", path, error)
    if candidates:
        raise ValueError(
            f"All {len(candidates)} snapshots in {folder} are damaged; restore one from a copy, "
            "or remove that folder to start anew."
        )
    return None


def has_snapshot(folder: Path) -> bool:
    """Whether there is a snapshot, damaged or not: `load_newest_snapshot` then returns one or raises."""
    return bool(_candidates(folder))


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if "__metadata__" in tensors:
        raise ValueError("A tensor must not be named '__metadata__', which safetensors reserves; rename it.")
    try:
        save_file(_without_overlap(tensors), path)
    except KeyError as error:
        raise ValueError(
            f"Tensors must have a dtype that safetensors can store; got {error.args[0]}; convert it."
        ) from error
    settle_file(path)


def _without_overlap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, with a copy of each that shares memory with one before it."""
    plain = {name: tensor.detach().resolve_conj().resolve_neg().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name in sorted(plain, key=lambda name: plain[name].data_ptr()):
        tensor = plain[name]
        if tensor.data_ptr() < end:
            plain[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return plain


def _read(path: Path) -> Snapshot:
    value: object = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{STATE_FILE} holds no JSON object.")
    content = cast("dict[str, Any]", value)
    claimed = content.pop("sha256")
    if hashlib.sha256(canonical_json(content).encode()).hexdigest() != claimed:
        raise ValueError(f"the checksum of {STATE_FILE} does not hold.")
    if content["format"] != FORMAT:
        raise ValueError(f"its format must be {FORMAT}; got {content['format']}.")
    if file_sha256(path / TENSORS_FILE) != content["tensors_sha256"]:
        raise ValueError(f"the checksum of {TENSORS_FILE} does not hold.")
    return Snapshot(content["step"], load_file(path / TENSORS_FILE), content["state"])


def _snapshots(folder: Path) -> list[Path]:
    """The snapshots' folders, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"\d{10,}", path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _candidates(folder: Path) -> list[Path]:
    """The snapshots to try, the newest first; one that was about to be replaced counts where it is all there is."""
    if not folder.is_dir():
        return []
    replaced = [path for path in folder.glob(".*.replaced") if not _unreplaced(path).exists()]
    return sorted([*_snapshots(folder), *replaced], key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.strip(".").split(".")[0])


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _unreplaced(path: Path) -> Path:
    return path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))


def _rename_into_place(partial: Path, final: Path) -> None:
    """Rename a folder; one that is there already is set aside first, since folders cannot be exchanged atomically."""
    aside = _replaced(final)
    if final.exists():
        final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove what a killed process left; a snapshot that it had set aside and not replaced comes back."""
    for path in folder.glob(".*.replaced"):
        if _unreplaced(path).exists():
            shutil.rmtree(path)
        else:
            path.rename(_unreplaced(path))
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path)


def _prune(folder: Path, step: int) -> None:
    found = _snapshots(folder)
    later = [path for path in found if _step(path) > step]
    earlier = [path for path in found if _step(path) <= step]
    for path in later + earlier[KEPT:]:
        # Renamed first, so that one half removed is never taken for a snapshot.
        try:
            shutil.rmtree(path.rename(partial_path(path)))
        except OSError as error:
            logger.warning("Old snapshot %s could not be removed: %s", path, error)


def _write_failure(folder: Path, step: int, error: Exception) -> str:
    kept = _snapshots(folder)
    remedy = f"the newest kept is {kept[0]}" if kept else "none was kept before it"
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return (
        f"The snapshot of step {step} could not be written to {folder} ({reason}); {remedy}; "
        "free space or permit writing there, then continue with --resume."
    )
