"""Files of weights and settings, and a folder that is there whole or not at all."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mxd.atomic import JSON, nearest_folder, partial_path, settle_file, sync_file, sync_folder


def require_new_folder(folder: Path) -> None:
    """Check that a folder can be filled: it does not exist, or is empty.

    Raises:
        ValueError: If something stands there, or no folder can be made there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"An export needs a new or empty folder; {folder} holds something. Name another --out.")
    parent = nearest_folder(folder.absolute().parent)
    if not parent.is_dir():
        raise ValueError(f"{folder} must be where a folder can be made; {parent} is a file. Name another --out.")


def fill_folder(folder: Path, fill: Callable[[Path], None]) -> list[Path]:
    """Fill a folder beside its place and move it there when it is whole; return its files.

    Args:
        folder: A place for a folder, as `require_new_folder` wants it.
        fill: Writes the files into the folder that it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        fill(partial)
        names = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
        for inner in {partial, *(partial / name.parent for name in names)}:
            sync_folder(inner)
        if folder.exists():
            # Not every system renames onto a folder, be it empty.
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(folder.absolute().parent)
    return [folder / name for name in names]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, row by row."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    settle_file(path)


def write_text(path: Path, text: str) -> None:
    """Write text and wait until it is on the disk."""
    path.write_text(text, encoding="utf-8")
    sync_file(path)


def yaml_text(values: Mapping[str, JSON]) -> str:
    """Return values as YAML, one a line, each as JSON has it, which YAML reads alike."""
    lines = [f"{name}: {json.dumps(value, ensure_ascii=True, allow_nan=False)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"
