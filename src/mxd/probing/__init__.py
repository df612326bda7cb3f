"""What latents know: sample-level and token-level probes of sparse codes."""

PROBING_FILE = "probing.json"
"""The results' name in a run."""
VERSION = 1
"""Raised whenever a key of the file comes to mean something else."""
