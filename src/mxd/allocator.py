"""How the host hands out memory to a process that asks for the same blocks again in every step of training."""

import ctypes
import os
import sys

MAPPED_FROM = 24 * 2**20
"""Bytes of the smallest block that is mapped apart, and so handed out anew each time; glibc begins with 128 KiB and
goes up to 32 MiB, depending on what was freed before. Blocks of scores, codes and activations of GPT-2's shape are
smaller. From 64 MiB on nothing would be mapped anew, and a step be a twentieth faster, for 100 to 250 MiB of holes."""
KEPT = 2**29
"""Bytes at the heap's end that stay with the process."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings, from its malloc.h."""
_CHOSEN_BY = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> None:
    """Have this process use again what it has freed, and take large tensors in pages of 2 MiB.

    Left alone, glibc gives blocks back to the kernel, which clears them and hands them out again, in pages of 4 KiB.
    How many depends on what the process did before: training steps of one shape then take up to half as long again in
    one process as in another (docs/performance.md). What is computed stays the same. Where environment variables of
    malloc or of PyTorch choose otherwise, they hold. PyTorch reads its own when it first allocates; elsewhere than on
    Linux with glibc nothing more happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform != "linux" or any(name in os.environ for name in _CHOSEN_BY):
        return
    # musl has no such function.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
        mallopt(_M_TRIM_THRESHOLD, KEPT)
