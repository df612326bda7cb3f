"""The three gathers of `tables` in torch's own operators.

For 4,096 tokens, k 32 and 21,490 rows of 768 in float32, on two threads of an AMD EPYC (benchmarks/kernels.py):
`weighted_rows` takes 7 ms where a dense code times the table takes 645, `row_dots` 21 ms where gathered rows and bmm
take 86, and `row_sums` 6 ms where adding up contributions takes 41 (and is not deterministic on every device).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from mxd.kernels.turned import Turned

BLOCK_ELEMENTS = 2**23
"""Elements of the largest temporary, where there is no gathering product: rows are gathered in blocks of this size."""
RUN = 64
"""Pairs that one bag sums up at most on a CUDA device. Not measured there yet (`make bench-gpu`)."""


def weighted_rows(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens d"]:
    """Return the sum of the named table rows, each times its value."""
    if len(values) == 0:
        return table.new_zeros(0, table.shape[1])
    return embedding_bag(indices, table, per_sample_weights=values.to(table.dtype), mode="sum")


def row_dots(
    dense: Float[Tensor, "tokens d"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens k"]:
    """Return each token's dot products with the table rows that it names."""
    if _has_gathering_dot(dense, table):
        return _gathering_dot(dense.to(table.dtype), indices, table).to(dense.dtype)
    products = table.new_empty(indices.shape)
    block = max(1, BLOCK_ELEMENTS // (indices.shape[1] * table.shape[1]))
    for start in range(0, len(indices), block):
        rows = slice(start, start + block)
        torch.bmm(table[indices[rows]], dense[rows].to(table.dtype)[..., None], out=products[rows][..., None])
    return products.to(dense.dtype)


def row_sums(
    values: Float[Tensor, "tokens k"], named: Turned, dense: Float[Tensor, "tokens d"]
) -> Float[Tensor, "num_rows d"]:
    """Return for each table row the sum of the tokens' vectors that name it, each times its value."""
    num_rows = len(named.bounds) - 1
    if values.numel() == 0:
        return dense.new_zeros(num_rows, dense.shape[1])
    weights, first = values.flatten()[named.order].to(dense.dtype), named.bounds[:-1]
    if dense.is_cuda:
        return sums_by_runs(weights, named.tokens, first, dense)
    return embedding_bag(named.tokens, dense, first, per_sample_weights=weights, mode="sum")


def sums_by_runs(
    weights: Float[Tensor, " pairs"],
    tokens: Int[Tensor, " pairs"],
    first: Int[Tensor, " num_rows"],
    dense: Float[Tensor, "tokens d"],
) -> Float[Tensor, "num_rows d"]:
    """Return for each row the sum over its pairs, from its first one to the next row's, as a sum of sums of few.

    A CUDA thread goes through one column of a whole bag of `embedding_bag`, pair after pair, so a row that every token
    names keeps one thread busy when all others have long finished. Here no bag has more than `RUN` pairs, and as a bag
    of bags no more than one for each `RUN` pairs, plus those that row bounds cut short. Sizes do not depend on what the
    indices are, so nothing waits for the device.
    """
    cuts = torch.arange(0, len(tokens), RUN, dtype=first.dtype, device=first.device)
    starts = torch.sort(torch.cat([first, cuts])).values
    # Sums of bfloat16 are kept in float32 until all are added up.
    wide = torch.promote_types(dense.dtype, torch.float32)
    sums = embedding_bag(tokens, dense.to(wide), starts, per_sample_weights=weights.to(wide), mode="sum")
    runs = torch.arange(len(starts), dtype=first.dtype, device=first.device)
    return embedding_bag(runs, sums, torch.searchsorted(starts, first), mode="sum").to(dense.dtype)


def _has_gathering_dot(dense: Tensor, table: Tensor) -> bool:
    if dense.numel() == 0 or torch.compiler.is_compiling():
        return False
    return dense.is_cuda or (
        dense.device.type == "cpu" and dense.dtype == table.dtype and dense.dtype in (torch.float32, torch.float64)
    )


def _gathering_dot(dense: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """The derivative of `embedding_bag` in its weights is this product, and builds no temporary."""
    tokens, k = indices.shape
    offsets = torch.arange(0, tokens * k, k, device=indices.device)
    # repeat_interleave would wait for the device.
    token_of = torch.arange(tokens * k, device=indices.device) // k
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dense, table, indices.flatten(), offsets, token_of, 0, -1
    )
    return products.view(tokens, k)
