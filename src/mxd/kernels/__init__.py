"""Sparse linear algebra behind one small interface.

`route` selects, `mix` sums table rows; both are differentiable, and neither keeps or builds anything of size
tokens × latents beyond one block of rows. `reference` restates both in one line each.
"""

from mxd.kernels.routing import route
from mxd.kernels.tables import mix

__all__ = ["mix", "route"]
