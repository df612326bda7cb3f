"""The exact largest entries of each row, without looking at most of them twice."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUP = 8
"""Entries of which only the largest is looked at first."""
NARROWEST = 512
"""Rows at most this wide are left to `torch.topk`.

Measured with benchmarks/kernels.py on two threads of an AMD EPYC: at 512 both take the same, at 1,024 `torch.topk`
takes 1.6 times as long as `largest`, at 21,490 1.7 times (float32) and 1.3 times (bfloat16). Not measured on a GPU.
"""


def largest(scores: Float[Tensor, "tokens n"], k: int) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """Return the `k` largest entries of each row and where they stand, in no particular order.

    Entries are taken in groups, and a row's k largest lie in the k groups with the largest maxima: if one lay in
    another group, k maxima that are not smaller would stand before it. So the maxima are selected from, then the
    entries of the selected groups. The maxima form rows of the same kind, which are treated in the same way.
    """
    width = scores.shape[1]
    num_groups = width // GROUP
    if width <= NARROWEST or num_groups < 2 * k or len(scores) == 0:
        return torch.topk(scores, k, dim=1, sorted=False)
    # A group is a column of this view: neighbours in memory belong to neighbouring groups, so the maxima are taken
    # of whole vectors.
    grouped = scores[:, : GROUP * num_groups].unflatten(1, (GROUP, num_groups))
    _, groups = largest(grouped.amax(1), k)
    members = torch.arange(0, GROUP * num_groups, num_groups, device=scores.device)
    left_over = torch.arange(GROUP * num_groups, width, device=scores.device)
    candidates = torch.cat([(groups[:, None] + members[:, None]).flatten(1), left_over.expand(len(scores), -1)], dim=1)
    values, places = torch.topk(scores.gather(1, candidates), k, dim=1, sorted=False)
    return values, candidates.gather(1, places)
