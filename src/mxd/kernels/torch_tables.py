"""The three gathers of `tables` in torch's own operators.

For 4,096 tokens, k 32 and 21,490 rows of 768 in float32, on two threads of an AMD EPYC (benchmarks/kernels.py):
`weighted_rows` takes 7 ms where a dense code times the table takes 645, `row_dots` 21 ms where gathered rows and bmm
take 86, and `row_sums` 6 ms where adding up contributions takes 41 (and is not deterministic on every device).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

BLOCK_ELEMENTS = 2**23
"""Elements of the largest temporary: rows are gathered in blocks of this size."""


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
        return _gathering_dot(dense, indices, table)
    products = table.new_empty(indices.shape)
    block = max(1, BLOCK_ELEMENTS // (indices.shape[1] * table.shape[1]))
    for start in range(0, len(indices), block):
        rows = slice(start, start + block)
        torch.bmm(table[indices[rows]], dense[rows].to(table.dtype)[..., None], out=products[rows][..., None])
    return products.to(dense.dtype)


def row_sums(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], dense: Float[Tensor, "tokens d"], num_rows: int
) -> Float[Tensor, "num_rows d"]:
    """Return for each table row the sum of the tokens' vectors that name it, each times its value."""
    if indices.numel() == 0:
        return dense.new_zeros(num_rows, dense.shape[1])
    rows, order = torch.sort(indices.flatten(), stable=True)
    first = torch.searchsorted(rows, torch.arange(num_rows, device=rows.device))
    weights = values.flatten()[order].to(dense.dtype)
    return embedding_bag(order // indices.shape[1], dense, first, per_sample_weights=weights, mode="sum")


def _has_gathering_dot(dense: Tensor, table: Tensor) -> bool:
    return (
        dense.device.type == "cpu"
        and dense.dtype == table.dtype
        and dense.dtype in (torch.float32, torch.float64)
        and dense.numel() > 0
        and not torch.compiler.is_compiling()
    )


def _gathering_dot(dense: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """The derivative of `embedding_bag` in its weights is this product, and builds no temporary."""
    tokens, k = indices.shape
    offsets = torch.arange(0, tokens * k, k)
    token_of = torch.arange(tokens).repeat_interleave(k)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dense, table, indices.flatten(), offsets, token_of, 0, -1
    )
    return products.view(tokens, k)
