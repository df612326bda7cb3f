"""Sparse linear algebra behind one small interface.

`route` selects, `mix` sums table rows, `dots` multiplies with them; all are differentiable, and none keeps or builds
anything of size tokens × latents beyond one block of rows. `score_blocks` yields such blocks, for other selections.
`linear` is the dense product beside them. `reference` restates each in one line, and `backends` says which
implementation is used where.
"""

from mxd.kernels.products import linear
from mxd.kernels.routing import route, score_blocks
from mxd.kernels.tables import dots, mix

__all__ = ["dots", "linear", "mix", "route", "score_blocks"]
