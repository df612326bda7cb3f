"""Checks of layers on disk."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import torch

from mxd.checkpoint import load_layer, save_layer
from mxd.conformance.example import example, require
from mxd.layers import LAYERS, SparseLayer

_RESAVE = """
import sys, mxd.checkpoint as disk
for first, second in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    disk.save_layer(disk.load_layer(first), second)
"""


def check_saving(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that saving and loading is the identity, and that another process writes the same bytes.

    It applies to the registered kinds only: others have no name under which they could be found again. The other
    process is asked about the library's own kinds only.
    """
    check_resaving([layer], seed=seed)


def check_resaving(layers: Sequence[SparseLayer], *, seed: int = 0) -> None:
    """Check of several layers what `check_saving` checks of one, with one other process for all."""
    known = [layer for layer in layers if layer.kind in LAYERS and type(layer) is LAYERS[layer.kind].layer]
    if not known:
        return
    with tempfile.TemporaryDirectory() as folder:
        places = [(Path(folder) / f"{number}-first", Path(folder) / f"{number}-second") for number in range(len(known))]
        for layer, (first, _) in zip(known, places, strict=True):
            _require_identity(example(layer, seed).layer, first)
        # Another process knows our own kinds.
        ours = [type(layer).__module__.startswith("mxd.") for layer in known]
        places = list(compress(places, ours))
        if not places:
            return
        command = [sys.executable, "-c", _RESAVE, *(str(path) for pair in places for path in pair)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        require(process.returncode == 0, f"another process must be able to load and save it; {process.stderr[-500:]}")
        for pair in places:
            written, again = ({file.name: file.read_bytes() for file in path.iterdir()} for path in pair)
            require(written == again, "another process that loads and saves a layer must write the same bytes.")


def _require_identity(layer: SparseLayer, folder: Path) -> None:
    save_layer(layer, folder)
    loaded = load_layer(folder)
    require(loaded.config == layer.config, "a saved and loaded layer must have the same configuration.")
    state, expected = loaded.state_dict(), layer.state_dict()
    same = state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    require(same, "a saved and loaded layer must have the same weights, bit for bit.")
