"""Sparse linear algebra behind one small interface.

`route` selects, `mix` sums table rows, `dots` multiplies with them; all are differentiable, and none keeps or builds
anything of size tokens × latents beyond one block of rows. `score_blocks` yields such blocks, for other selections.
`linear` is the dense product beside them, and `factors` joins the factors of CP and tensor-ring experts. `reference`
restates each of the others in one line, and `backends` says which implementation is used where.
"""

from mxd.kernels.factors import cp_combine, cp_matrix, ring_combine, ring_link, ring_matrix
from mxd.kernels.products import linear
from mxd.kernels.routing import route, score_blocks
from mxd.kernels.tables import dots, mix

__all__ = [
    "cp_combine",
    "cp_matrix",
    "dots",
    "linear",
    "mix",
    "ring_combine",
    "ring_link",
    "ring_matrix",
    "route",
    "score_blocks",
]
