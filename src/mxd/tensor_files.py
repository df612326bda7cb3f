"""Tensors of a model in a safetensors file: read, and compared with what the model's configuration describes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: If the file is damaged, or a tensor holds NaN or infinity.
        OSError: If the file cannot be read.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file; it does not parse ({error}).") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path} must hold finite weights; {name} has not. Train it anew.")
    return tensors


def require_described(place: Path, described: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Check that tensors have the names and shapes that a configuration describes.

    Args:
        place: Where the tensors are, or are to be, for the message.
        described: Those of a model that was built from the configuration.
        found: The tensors.

    Raises:
        ValueError: If not.
    """
    wanted, got = ({name: tuple(tensor.shape) for name, tensor in group.items()} for group in (described, found))
    wrong = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if wrong:
        first = f"{wrong[0]} is {got.get(wrong[0], 'absent')} and should be {wanted.get(wrong[0], 'absent')}"
        raise ValueError(
            f"{place} must hold the tensors that config.json describes; {len(wrong)} differ in name or shape "
            f"({first}). Take both files from the same source."
        )
