"""Which implementation the kernels use: chosen by device, or for the whole process by name.

| backend | what it is |
|---|---|
| `reference` | the one-liners of `reference.py`: dense, for finding out whether a fast path is at fault |
| `torch` | row blocks and gathers in torch's own operators, on any device |
| `onednn` | the same, with oneDNN's matrix products: x86 processors |
| `triton` | the same, with gathers and selection as Triton kernels: CUDA |

Left to itself, a tensor on an x86 processor takes `onednn` (benchmarks/kernels.py measured it), and any other `torch`.
CUDA takes `torch` too: the Triton kernels are tested in Triton's interpreter and have not been timed on a GPU yet
(`make bench-gpu` does that), so there is no measured reason to prefer them.
"""

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch

Backend = Literal["reference", "torch", "onednn", "triton"]
"""An implementation of the kernels."""

VARIABLE = "MXD_KERNELS"
"""Environment variable that names the backend of the whole process; `auto`, or nothing, leaves it to the device."""


def set_backend(name: str) -> None:
    """Use this backend for everything from now on; `auto` chooses by device again.

    Raises:
        ValueError: If there is no such backend, or it does not work on this machine.
    """
    global _chosen
    names = ("auto", *get_args(Backend))
    if name not in names:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(names)}; got {name!r}.")
    if name == "onednn" and not has_onednn():
        raise ValueError("kernels onednn need an x86 processor and a PyTorch with oneDNN; use torch here.")
    if name == "triton" and find_spec("triton") is None:
        raise ValueError("kernels triton need the package triton; install it (pip install triton), or use torch.")
    _chosen = name


@contextmanager
def using_backend(name: Backend) -> Generator[None, None, None]:
    """Use this backend inside, and afterwards what was used before.

    Raises:
        ValueError: If it does not work on this machine.
    """
    before = chosen_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def backend(device: torch.device) -> Backend:
    """Return what kernels on this device use."""
    chosen = chosen_backend()
    if chosen == "auto" or (chosen == "onednn" and device.type != "cpu"):
        return automatic_backend(device.type)
    if chosen == "triton" and device.type == "cpu" and not _is_interpreting():
        return automatic_backend("cpu")
    return chosen


def chosen_backend() -> Backend | Literal["auto"]:
    """Return what was chosen by name, by the environment if by nobody else.

    Raises:
        ValueError: If the environment names what there is not, or what does not work on this machine.
    """
    if _chosen is None:
        set_backend(os.environ.get(VARIABLE, "") or "auto")
    return cast("Backend | Literal['auto']", _chosen)


def automatic_backend(device_type: str) -> Backend:
    """Return what kernels on this sort of device use when nobody chooses."""
    # What torch.compile traces, it hands to oneDNN itself.
    return "onednn" if device_type == "cpu" and not torch.compiler.is_compiling() and has_onednn() else "torch"


@cache
def has_onednn() -> bool:
    """Whether oneDNN's products can be called here."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    )


@cache
def has_onednn_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


_chosen: str | None = None
"""What was chosen by name; None until somebody asks, and then what the environment says."""
