"""`python -m mxd` is the command line."""

from mxd.cli import main

main()
