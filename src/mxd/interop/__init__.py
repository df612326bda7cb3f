"""Layers in the formats of other tools, and layers of other tools: files whose own loader computes what mxd computes.

What a format cannot say is refused by name, never approximated (`docs/export.md` has the table).
"""

from mxd.interop.export import Exported, LeftOut, export_layers, export_run
from mxd.interop.plain import FORMATS, DoesNotFit, Format
from mxd.interop.sparsify import load_sparsify

__all__ = [
    "FORMATS",
    "DoesNotFit",
    "Exported",
    "Format",
    "LeftOut",
    "export_layers",
    "export_run",
    "load_sparsify",
]
