"""`mxd` in processes that can be killed."""

import os
import subprocess
import sys
from pathlib import Path

SERVER = """
import os, sys, torch, transformers
from mxd.cli import main
import mxd.training.decompose, transformers.models.llama.modeling_llama
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv = ["mxd", *line.rstrip("\\n").split("\\t")]
        os.dup2(os.open(sys.argv.pop(), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        try:
            main()
        except SystemExit as end:
            os._exit(end.code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs one `mxd` after the other, each in a process of its own, and pays for the imports once."""


class Server:
    """Starts `mxd` processes that can be killed."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._said()

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, arguments: list[str], errors: Path) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write("\t".join([*arguments, str(errors)]) + "\n")
        self._process.stdin.flush()
        return int(self._said())

    def status(self) -> int:
        return int(self._said())

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
