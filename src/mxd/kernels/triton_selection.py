# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportCallIssue=false
"""The exact largest entries of each row, as Triton kernels that read a row twice.

A float is compared by its key: the integer whose order is the float's, with one key for both zeros and the largest
key for every NaN. The k-th largest key of a set is found bit by bit, from the highest: a bit belongs to it if at least
k keys are at or above what has been found so far with that bit set.

Kernels are `no_type_check` because jaxtyping's import hook would wrap what Triton wants to read.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 2048
"""Entries of a row that a program holds at a time, and groups of which it takes the maxima. Below 2**15, because two
counts share an integer."""
WARPS = 8
"""Warps of a program that goes through a row: 8 entries of a chunk for each thread."""
FEWEST_CANDIDATES = 64
"""Room for this many candidates of a row at least, and for four times k."""


def largest(scores: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """Return the `k` largest entries of each row and where they stand, in no particular order.

    Of equal entries those with the lowest indices are taken, and 0.0 equals -0.0. NaN counts as larger than anything,
    as in `torch.topk`, so that it is not hidden.

    Entry j of a row belongs to group j modulo `CHUNK`. The k-th largest of the groups' maxima is a lower bound of the
    k-th largest entry, so the k largest are among the entries above the bound and the first k that equal it. These
    candidates are written down, few more than k unless the large entries share groups, and selected from in turn. A
    row with more candidates than there is room for is gone through once for every bit of the k-th largest key.
    So is every row where k is more than half of `CHUNK`. Float64 is sorted by torch instead.

    Args:
        scores: Entries to select from. A row that starts at a multiple of 16 bytes is read fastest.
        k: Number of entries to keep.

    Raises:
        ValueError: If `k` does not lie in `[1, n]`.
    """
    num_rows, n = scores.shape
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, {n}], the width of the scores; got {k}.")
    if scores.dtype == torch.float64:
        ordered = torch.sort(scores, dim=1, descending=True, stable=True)
        return ordered.values[:, :k], ordered.indices[:, :k]
    values = torch.empty(num_rows, k, dtype=scores.dtype, device=scores.device)
    indices = torch.empty(num_rows, k, dtype=torch.long, device=scores.device)
    if num_rows == 0:
        return values, indices
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    # The low 16 bits of a bfloat16's key are zero.
    bits = 15 if scores.dtype == torch.bfloat16 else 31
    row = (scores, scores.stride(0))
    with torch.cuda.device(scores.get_device()):
        if 2 * k > CHUNK:
            constants = {"CAPACITY": 0, "CHUNK": CHUNK, "BITS": bits}
            _select_rows[(num_rows,)](values, indices, None, *row, n, k, **constants, num_warps=WARPS)
            return values, indices
        capacity = 1 << (max(FEWEST_CANDIDATES, 4 * k) - 1).bit_length()
        candidates = torch.empty(num_rows, capacity, dtype=torch.int32, device=scores.device)
        counts = torch.empty(num_rows, dtype=torch.int32, device=scores.device)
        constants = {"CAPACITY": capacity, "BITS": bits}
        _find_candidates[(num_rows,)](candidates, counts, *row, n, k, CHUNK=CHUNK, **constants, num_warps=WARPS)
        warps = min(8, max(1, capacity // 128))
        _select_candidates[(num_rows,)](values, indices, candidates, counts, *row, k, **constants, num_warps=warps)
        _select_rows[(num_rows,)](values, indices, counts, *row, n, k, CHUNK=CHUNK, **constants, num_warps=WARPS)
    return values, indices


@triton.jit
@no_type_check
def _keys(entries, inside):
    """Map floats to integers of the same order, and what is not inside to an integer below all of them."""
    bits = entries.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    keys = tl.where(bits < 0, -magnitude, magnitude)
    keys = tl.where(magnitude > 0x7F800000, 0x7FFF0000, keys)
    return tl.where(inside, keys, -0x80000000)


@triton.jit
@no_type_check
def _count(keys, key):
    return tl.sum((keys >= key).to(tl.int32), 0)


@triton.jit
@no_type_check
def _count_in_row(scores, length, key, CHUNK: tl.constexpr):
    counts = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, length, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        inside = columns < length
        counts += (_keys(tl.load(scores + columns, mask=inside, other=0), inside) >= key).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
@no_type_check
def _kth_largest(keys, k, BITS: tl.constexpr):
    threshold = tl.where(_count(keys, 0) >= k, 0, -0x80000000)
    for bit in range(BITS):
        raised = threshold + (0x40000000 >> bit)
        threshold = tl.where(_count(keys, raised) >= k, raised, threshold)
    return threshold


@triton.jit
@no_type_check
def _places(keys, threshold, above_seen, ties_seen, most_ties):
    """Return where a chunk's entries go, which of them are kept, and the counts of those seen so far.

    Kept is what is above the threshold, and of what equals it the first `most_ties`; it stays in order.
    """
    is_above, is_tie = keys > threshold, keys == threshold
    # One running sum for both counts.
    counts = is_above.to(tl.int32) + (is_tie.to(tl.int32) << 16)
    before = tl.cumsum(counts, 0) - counts
    ties_before = ties_seen + (before >> 16)
    places = above_seen + (before & 0xFFFF) + tl.minimum(ties_before, most_ties)
    is_kept = is_above | (is_tie & (ties_before < most_ties))
    total = tl.sum(counts, 0)
    return places, is_kept, above_seen + (total & 0xFFFF), ties_seen + (total >> 16)


@triton.jit
@no_type_check
def _find_candidates(
    candidates,
    counts,
    scores,
    stride,
    n,
    k,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    maxima = tl.full((CHUNK,), -0x80000000, tl.int32)
    for first in range(0, n, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        maxima = tl.maximum(maxima, _keys(tl.load(scores + columns, mask=columns < n, other=0), columns < n))
    threshold = _kth_largest(maxima, k, BITS)
    above, ties = 0, 0
    for first in range(0, n, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        keys = _keys(tl.load(scores + columns, mask=columns < n, other=0), columns < n)
        places, is_kept, above, ties = _places(keys, threshold, above, ties, k)
        tl.store(candidates + row * CAPACITY + places, columns, mask=is_kept & (places < CAPACITY))
    tl.store(counts + row, above + tl.minimum(ties, k))


@triton.jit
@no_type_check
def _select_candidates(
    values,
    indices,
    candidates,
    counts,
    scores,
    stride,
    k,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
):
    """Select from a row's candidates, if there was room for all of them."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    slots = tl.arange(0, CAPACITY)
    inside = (slots < count) & (count <= CAPACITY)
    columns = tl.load(candidates + row * CAPACITY + slots, mask=inside, other=0)
    entries = tl.load(scores + row * stride + columns, mask=inside, other=0)
    keys = _keys(entries, inside)
    threshold = _kth_largest(keys, k, BITS)
    places, is_kept, _above, _ties = _places(keys, threshold, 0, 0, k - _count(keys, threshold + 1))
    tl.store(values + row * k + places, entries, mask=is_kept & inside)
    tl.store(indices + row * k + places, columns, mask=is_kept & inside)


@triton.jit
@no_type_check
def _select_rows(
    values,
    indices,
    counts,
    scores,
    stride,
    n,
    k,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
):
    """Select from all of a row; where candidates were counted, only if there was no room for all of them."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    length = n
    if counts is not None:
        length = tl.where(tl.load(counts + row) > CAPACITY, n, 0)
    threshold = tl.where(_count_in_row(scores, length, 0, CHUNK) >= k, 0, -0x80000000)
    for bit in range(BITS):
        raised = threshold + (0x40000000 >> bit)
        threshold = tl.where(_count_in_row(scores, length, raised, CHUNK) >= k, raised, threshold)
    most_ties = k - _count_in_row(scores, length, threshold + 1, CHUNK)
    above, ties = 0, 0
    for first in range(0, length, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        entries = tl.load(scores + columns, mask=columns < length, other=0)
        keys = _keys(entries, columns < length)
        places, is_kept, above, ties = _places(keys, threshold, above, ties, most_ties)
        tl.store(values + row * k + places, entries, mask=is_kept)
        tl.store(indices + row * k + places, columns, mask=is_kept)
