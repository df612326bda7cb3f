"""The memory that this process may still take."""

import os
from pathlib import Path

import torch


def available_memory(device: str) -> int | None:
    """Return the bytes that this process may still take on a device, or None where that cannot be told.

    On CUDA devices that is what the driver calls free, and what PyTorch holds without using it. Elsewhere it is the
    host's memory: what the kernel expects to have available without swapping (Linux), at most what the control groups
    of this process still allow; on other systems all that is installed.
    """
    place = torch.device(device)
    if place.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place)
        return free + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    if place.type not in ("cpu", "mps"):
        return None
    host = _available_on_linux()
    if host is None:
        return _installed()
    return min([host, *_left_to_control_groups()])


def _available_on_linux(file: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def _installed() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _left_to_control_groups(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the bytes that each control group above this process, of version 2, still allows it."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    inside = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), None)
    if inside is None:
        return []
    group = root / inside
    left = [_left_to(folder) for folder in (group, *group.parents) if folder == root or root in folder.parents]
    return [amount for amount in left if amount is not None]


def _left_to(group: Path) -> int | None:
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        statistics = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        # Pages of files that nobody has used for a while are counted as used, and given up when memory is wanted.
        given_up = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        return None if limit == "max" else max(0, int(limit) - int(used) + given_up)
    except (OSError, ValueError):
        return None
