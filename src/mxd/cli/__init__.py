"""The command line: parse, call, print."""

from mxd.cli.main import main

__all__ = ["main"]
