"""The embedded default: a small language model of Python source, trained by `scripts/train_bundled_model.py`."""

import json
from pathlib import Path

MODEL_NAME = "bundled"
"""What stands for the bundled model where a model's name is asked for."""


def bundled_model_folder() -> Path:
    """Return the folder of the bundled model, in Hugging Face's layout."""
    return Path(__file__).parent / "model"


def held_out_modules() -> frozenset[str]:
    """Return the modules of the standard library that no training sees, as paths below the library's folder."""
    listed = bundled_model_folder() / "held_out_modules.json"
    return frozenset(json.loads(listed.read_text(encoding="utf-8")))
