"""Changes to what latents are worth, written once against the code and so the same for every kind of layer.

Every sparse layer is affine in its code, so `layer.decode(x, edit(layer.encode(x)))` is steering. What is edited at all
positions can stay: it is saved beside the layer (`mxd.checkpoint`), and where the algebra allows, folded into weights.
"""

from mxd.edits.editor import CodeEditor, edit_code, edits_of, with_edits
from mxd.edits.folding import fold_edits
from mxd.edits.operations import OPERATIONS, Ablate, Add, Clamp, Edit, Operation, Scale, Set, Span

__all__ = [
    "OPERATIONS",
    "Ablate",
    "Add",
    "Clamp",
    "CodeEditor",
    "Edit",
    "Operation",
    "Scale",
    "Set",
    "Span",
    "edit_code",
    "edits_of",
    "fold_edits",
    "with_edits",
]
