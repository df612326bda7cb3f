# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportCallIssue=false
"""The three gathers of `tables` as Triton kernels: no temporary is built, and sums run in float32 or float64.

A program sums a tile of rows × columns of the table at a time, and adds the tile's rows up at its end. Every sum runs
in an order that the arguments alone decide, so results are the same in each run. Indices are not checked: one that
names no row reads memory that is not the table's.

Kernels are `no_type_check` because jaxtyping's import hook would wrap what Triton wants to read.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from mxd.kernels.turned import Turned

TILE = 2048
"""Elements of a tile: 16 for each thread of 4 warps."""
COLUMNS = 256
"""Columns of a tile, where there are as many."""
MOST_ROWS = 64
"""Rows of a tile at most."""
CHUNK = 64
"""A row that more pairs name is summed by several programs: pairs are in order of their rows, and each aligned chunk
of this many that lies within one row is summed first."""


def weighted_rows(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens d"]:
    """Return the sum of the named table rows, each times its value, in the table's type."""
    (tokens, k), d = values.shape, table.shape[1]
    sums = table.new_empty(tokens, d)
    if sums.numel() == 0:
        return sums
    accumulator, rows, columns, warps = _tile(k, d, values, table)
    with torch.cuda.device(table.get_device()):
        _weighted_rows[tokens, triton.cdiv(d, columns)](
            *(sums, values.contiguous(), indices.contiguous(), table.contiguous(), k, d),
            *(accumulator, rows, columns),
            num_warps=warps,
        )
    return sums


def row_dots(
    dense: Float[Tensor, "tokens d"], indices: Int[Tensor, "tokens k"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "tokens k"]:
    """Return each token's dot products with the table rows that it names, in the type of the token's vectors."""
    (tokens, k), d = indices.shape, table.shape[1]
    products = dense.new_empty(tokens, k)
    if products.numel() == 0:
        return products
    accumulator, rows, columns, warps = _tile(k, d, dense, table)
    with torch.cuda.device(table.get_device()):
        _row_dots[tokens, triton.cdiv(k, rows)](
            *(products, dense.contiguous(), indices.contiguous(), table.contiguous(), k, d),
            *(accumulator, rows, columns),
            num_warps=warps,
        )
    return products


def row_sums(
    values: Float[Tensor, "tokens k"], named: Turned, dense: Float[Tensor, "tokens d"]
) -> Float[Tensor, "num_rows d"]:
    """Return for each table row the sum of the tokens' vectors that name it, each times its value.

    No program walks through more than two chunks of pairs and its share of the chunks' sums, however popular a row is.
    """
    d, num_pairs, num_rows = dense.shape[1], values.numel(), len(named.bounds) - 1
    sums = dense.new_empty(num_rows, d)
    if sums.numel() == 0 or num_pairs == 0:
        return sums.zero_()
    weights, dense = values.flatten()[named.order], dense.contiguous()
    accumulator, rows, columns, warps = _tile(CHUNK, d, values, dense)
    chunk_type = torch.float64 if accumulator == tl.float64 else torch.float32
    chunk_sums = torch.empty(num_pairs // CHUNK, d, dtype=chunk_type, device=dense.device)
    blocks = triton.cdiv(d, columns)
    with torch.cuda.device(dense.get_device()):
        if len(chunk_sums) > 0:
            _chunk_sums[len(chunk_sums), blocks](
                *(chunk_sums, weights, named.tokens, named.rows, dense, d),
                *(CHUNK, accumulator, rows, columns),
                num_warps=warps,
            )
        _row_sums[num_rows, blocks](
            *(sums, weights, named.tokens, named.bounds, dense, chunk_sums, d),
            *(CHUNK, accumulator, rows, columns),
            num_warps=warps,
        )
    return sums


def _tile(num_rows: int, d: int, *operands: Tensor) -> tuple[tl.dtype, int, int, int]:
    """Return the type that sums run in, a tile's rows and columns, and its warps."""
    is_double = any(tensor.dtype == torch.float64 for tensor in operands)
    columns = min(COLUMNS, max(16, _next_power_of_two(d)))
    rows = min(_next_power_of_two(num_rows), MOST_ROWS, max(1, TILE // columns))
    return tl.float64 if is_double else tl.float32, rows, columns, min(4, max(1, rows * columns // 512))


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@triton.jit
@no_type_check
def _add_rows(sums, weights, names, table, start, stop, columns, d, ROWS: tl.constexpr):
    """Add to a tile the rows that the pairs from `start` to `stop` name, each times its weight."""
    for first in range(start, stop, ROWS):
        pairs = first + tl.arange(0, ROWS)
        inside = pairs < stop
        weight = tl.load(weights + pairs, mask=inside, other=0).to(sums.dtype)
        row = tl.load(names + pairs, mask=inside, other=0).to(tl.int64)
        entries = table + row[:, None] * d + columns[None, :]
        entries = tl.load(entries, mask=inside[:, None] & (columns < d)[None, :], other=0).to(sums.dtype)
        sums += weight[:, None] * entries
    return sums


@triton.jit
@no_type_check
def _weighted_rows(
    out, values, indices, table, k, d, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    sums = _add_rows(sums, values, indices, table, token * k, token * k + k, columns, d, ROWS)
    tl.store(out + token * d + columns, tl.sum(sums, 0), mask=columns < d)


@triton.jit
@no_type_check
def _row_dots(out, dense, indices, table, k, d, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = slots < k
    row = tl.load(indices + token * k + slots, mask=inside, other=0).to(tl.int64)
    sums = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    for first in range(0, d, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        vector = tl.load(dense + token * d + columns, mask=columns < d, other=0).to(ACCUMULATOR)
        entries = table + row[:, None] * d + columns[None, :]
        entries = tl.load(entries, mask=inside[:, None] & (columns < d)[None, :], other=0).to(ACCUMULATOR)
        sums += vector[None, :] * entries
    tl.store(out + token * k + slots, tl.sum(sums, 1), mask=inside)


@triton.jit
@no_type_check
def _chunk_sums(
    out,
    weights,
    tokens,
    names,
    dense,
    d,
    CHUNK: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum a chunk of pairs if all name one row; nobody reads the sums of the other chunks."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = chunk * CHUNK
    is_within_a_row = tl.load(names + start) == tl.load(names + start + CHUNK - 1)
    stop = tl.where(is_within_a_row, start + CHUNK, start)
    sums = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    sums = _add_rows(sums, weights, tokens, dense, start, stop, columns, d, ROWS)
    tl.store(out + chunk * d + columns, tl.sum(sums, 0), mask=columns < d)


@triton.jit
@no_type_check
def _row_sums(
    out,
    weights,
    tokens,
    bounds,
    dense,
    chunk_sums,
    d,
    CHUNK: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum a row's pairs up to the first whole chunk, the chunks' sums, and the pairs after the last whole chunk."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop = tl.load(bounds + row), tl.load(bounds + row + 1)
    head = tl.minimum(stop, (start + CHUNK - 1) // CHUNK * CHUNK)
    tail = tl.maximum(head, stop // CHUNK * CHUNK)
    sums = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    sums = _add_rows(sums, weights, tokens, dense, start, head, columns, d, ROWS)
    for first in range(head // CHUNK, tail // CHUNK, ROWS):
        chunks = first + tl.arange(0, ROWS)
        inside = (chunks < tail // CHUNK)[:, None] & (columns < d)[None, :]
        sums += tl.load(chunk_sums + chunks[:, None] * d + columns[None, :], mask=inside, other=0)
    sums = _add_rows(sums, weights, tokens, dense, tail, stop, columns, d, ROWS)
    tl.store(out + row * d + columns, tl.sum(sums, 0), mask=columns < d)
