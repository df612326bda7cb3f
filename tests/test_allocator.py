"""Memory that is freed and asked for again: counted in pages that the kernel had to hand out."""

import os
import platform
import subprocess
import sys

import pytest

BLOCK, ROUNDS = 16 * 2**20, 8
SCRIPT = f"""
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size, whatever the host's choice
from mxd.allocator import keep_freed_memory

{{call}}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def fill():
    held = [b"x" * {BLOCK} for _ in range(2)]

fill()
before = faults()
for _ in range({ROUNDS} // 2):
    fill()
print(faults() - before)
"""


def faults(call: str, **environment: str) -> int:
    names = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", SCRIPT.format(call=call)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=clean | environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the settings that are chosen")
def test_blocks_are_used_again_unless_the_environment_says_otherwise() -> None:
    pages = ROUNDS * BLOCK // os.sysconf("SC_PAGE_SIZE")
    assert faults("keep_freed_memory()") < pages / 100
    assert faults("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_=str(2**20)) > pages / 2
    assert faults("") > pages / 2
