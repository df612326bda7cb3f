import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.kernels import reference
from tests.kernel_inputs import seeds

pytest.importorskip("triton", reason="Triton exists for Linux only")

from mxd.kernels import triton_selection, triton_tables
from mxd.kernels.turned import turned

# On a GPU the kernels are compiled, elsewhere Triton's interpreter runs them (tests/__init__.py asks for it).
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
on_a_device = pytest.mark.parametrize("device", DEVICES)

dtypes = st.sampled_from(
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ]
)
tiles = st.sampled_from([(64, 16, 8), (32, 32, 2), (2048, 256, 64)])
"""Elements, columns and most rows of a tile."""
counts = st.integers(1, 9)
widths = st.integers(1, 70)


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def named_rows(tokens: int, k: int, n: int, device: str, seed: int) -> Tensor:
    """Rows repeat within a token, and low ones are popular."""
    uniform = torch.rand(tokens, k, generator=torch.Generator().manual_seed(seed))
    return (n * uniform**3).long().to(device)


def assert_rounded_once(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    # Triton's interpreter cuts off what does not fit into a bfloat16.
    coarse = 2**-8 if actual.is_cuda else 2**-7
    rtol, atol = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (coarse, 1e-5)}[dtype]
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=atol)


def patch_tile(patch: pytest.MonkeyPatch, tile: tuple[int, int, int], chunk: int = 64) -> None:
    settings = zip(("TILE", "COLUMNS", "MOST_ROWS", "CHUNK"), (*tile, chunk), strict=True)
    for name, value in settings:
        patch.setattr(triton_tables, name, value)


@on_a_device
@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(0, 6), k=counts, n=counts, d=widths, types=dtypes, tile=tiles, seed=seeds)
def test_weighted_rows_equal_the_reference(
    tokens: int,
    k: int,
    n: int,
    d: int,
    types: tuple[torch.dtype, torch.dtype],
    tile: tuple[int, int, int],
    seed: int,
    device: str,
) -> None:
    values = normal(tokens, k, dtype=types[0], device=device, seed=seed)
    table = normal(n, d, dtype=types[1], device=device, seed=seed + 1)
    indices = named_rows(tokens, k, n, device, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch_tile(patch, tile)
        actual = triton_tables.weighted_rows(values, indices, table)
    assert_rounded_once(actual, reference.mix(values.double(), indices, table.double()), types[1])


@on_a_device
@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(0, 6), k=counts, n=counts, d=widths, types=dtypes, tile=tiles, seed=seeds)
def test_row_dots_equal_the_reference(
    tokens: int,
    k: int,
    n: int,
    d: int,
    types: tuple[torch.dtype, torch.dtype],
    tile: tuple[int, int, int],
    seed: int,
    device: str,
) -> None:
    dense = normal(tokens, d, dtype=types[0], device=device, seed=seed)
    table = normal(n, d, dtype=types[1], device=device, seed=seed + 1)
    indices = named_rows(tokens, k, n, device, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch_tile(patch, tile)
        actual = triton_tables.row_dots(dense, indices, table)
    assert_rounded_once(actual, reference.dots(dense.double(), indices, table.double()), types[0])


@on_a_device
@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(0, 12),
    k=counts,
    n=counts,
    d=widths,
    types=dtypes,
    tile=tiles,
    chunk=st.sampled_from([1, 4, 64]),
    seed=seeds,
)
def test_row_sums_equal_the_reference(
    tokens: int,
    k: int,
    n: int,
    d: int,
    types: tuple[torch.dtype, torch.dtype],
    tile: tuple[int, int, int],
    chunk: int,
    seed: int,
    device: str,
) -> None:
    values = normal(tokens, k, dtype=types[0], device=device, seed=seed)
    dense = normal(tokens, d, dtype=types[1], device=device, seed=seed + 1)
    indices = named_rows(tokens, k, n, device, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch_tile(patch, tile, chunk)
        actual = triton_tables.row_sums(values, turned(indices, n + 1), dense)
    # The gradient of `mix` in its table, whose last row nobody names.
    table = torch.zeros(n + 1, d, dtype=torch.float64, device=device, requires_grad=True)
    reference.mix(values.double(), indices, table).backward(dense.double())
    assert table.grad is not None
    assert_rounded_once(actual, table.grad, types[1])


@on_a_device
@pytest.mark.parametrize("others", [0, 6])
def test_a_row_that_every_token_names_counts_each(others: int, device: str) -> None:
    # Without others, the pairs of each row are whole chunks.
    tokens = 5 * triton_tables.CHUNK
    values = torch.ones(tokens, 2, dtype=torch.bfloat16, device=device)
    indices = torch.tensor([[3, 1]], device=device).repeat(tokens, 1)
    indices[:others, 0] = 0
    sums = triton_tables.row_sums(
        values, turned(indices, 5), torch.ones(tokens, 3, dtype=torch.bfloat16, device=device)
    )
    counts = torch.tensor([others, tokens, 0, tokens - others, 0], dtype=torch.bfloat16, device=device)
    assert torch.equal(sums, counts[:, None].expand(5, 3))


@on_a_device
def test_tables_need_not_be_contiguous(device: str) -> None:
    table = normal(16, 9, dtype=torch.float64, device=device, seed=0).t()[1:, ::2]
    values = normal(4, 3, dtype=torch.float64, device=device, seed=1).t()
    indices = named_rows(4, 3, 8, device, 2).t()
    dense = normal(8, 3, dtype=torch.float64, device=device, seed=3).t()
    assert not any(tensor.is_contiguous() for tensor in (table, values, indices, dense))
    exact = reference.mix(values, indices, table)
    assert_rounded_once(triton_tables.weighted_rows(values, indices, table), exact, torch.float64)
    exact = reference.dots(dense, indices, table)
    assert_rounded_once(triton_tables.row_dots(dense, indices, table), exact, torch.float64)
    code = torch.zeros(3, 8, dtype=torch.float64, device=device).scatter_add(1, indices, values)
    assert_rounded_once(triton_tables.row_sums(values, turned(indices, 8), dense), code.t() @ dense, torch.float64)


SCORES = ("normal", "two levels", "negative", "constant", "crowded", "special", "tiny")
"""Sorts of rows: `crowded` ones have their large entries in one group, where there is no room for them."""
SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-5, -1e-5, 3e38, -3e38])


def draw_scores(sort: str, rows: int, n: int, chunk: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, n, generator=generator)
    if sort == "crowded":
        return scores + 100.0 * (torch.arange(n) % chunk == 0)
    if sort == "special":
        return SPECIAL[torch.randint(len(SPECIAL), (rows, n), generator=generator)]
    changes = {"two levels": scores.sign(), "negative": -scores.abs() - 1, "constant": torch.full_like(scores, -1.5)}
    changes["tiny"] = scores * 1e-40
    return changes.get(sort, scores)


def is_beyond_the_interpreter(sort: str, dtype: torch.dtype, device: str) -> bool:
    """Triton's interpreter misreads subnormal numbers in bfloat16."""
    return sort == "tiny" and dtype == torch.bfloat16 and device == "cpu"


def assert_largest(actual: tuple[Tensor, Tensor], scores: Tensor, k: int) -> None:
    """Compare with a stable sort, which puts the first of equals first; NaN is the largest there too."""
    values, indices = actual
    expected = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(indices.sort().values, expected.sort().values)
    assert values.dtype == scores.dtype
    assert torch.equal(values.nan_to_num(7.0), scores.gather(1, indices).nan_to_num(7.0))


@on_a_device
@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(0, 3),
    n=st.integers(1, 300),
    few=st.booleans(),
    chunk=st.sampled_from([16, 128]),
    sort=st.sampled_from(SCORES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=seeds,
    d=st.data(),
)
def test_largest_selects_what_a_stable_sort_puts_first(
    rows: int, n: int, few: bool, chunk: int, sort: str, dtype: torch.dtype, seed: int, d: st.DataObject, device: str
) -> None:
    k = d.draw(st.integers(1, min(n, 8) if few else n))
    assume(not is_beyond_the_interpreter(sort, dtype, device))
    scores = draw_scores(sort, rows, n, chunk, seed).to(device, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_selection, "CHUNK", chunk)
        patch.setattr(triton_selection, "FEWEST_CANDIDATES", 1)
        actual = triton_selection.largest(scores, k)
    assert_largest(actual, scores, k)


@on_a_device
@pytest.mark.parametrize("sort", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 200])
def test_largest_at_full_size(k: int, dtype: torch.dtype, sort: str, device: str) -> None:
    if is_beyond_the_interpreter(sort, dtype, device):
        pytest.skip("Triton's interpreter misreads subnormal bfloat16 numbers")
    scores = draw_scores(sort, 2, 5000, triton_selection.CHUNK, seed=k).to(device, dtype)
    assert_largest(triton_selection.largest(scores, k), scores, k)


@on_a_device
@pytest.mark.parametrize("n", [112, 113, 300])
def test_a_row_whose_candidates_do_not_fit_is_searched_whole(
    n: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With n 112, the crowded group's 7 entries and the largest other one just fit into the room for 4 k.
    monkeypatch.setattr(triton_selection, "CHUNK", 16)
    monkeypatch.setattr(triton_selection, "FEWEST_CANDIDATES", 1)
    rows = [draw_scores(sort, 1, n, 16, seed=n) for sort in ("crowded", "normal")]
    scores = torch.cat(rows).to(device)
    assert_largest(triton_selection.largest(scores, 2), scores, 2)


@on_a_device
def test_scores_need_not_be_contiguous(device: str) -> None:
    scores = normal(40, 90, dtype=torch.float32, device=device, seed=0)
    for view in (scores[:3, 3:77], scores.t()[:3], scores[5:3]):
        assert_largest(triton_selection.largest(view, 4), view, 4)


@pytest.mark.parametrize("k", [0, 7])
def test_k_must_fit(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 6\], the width of the scores; got {k}\."):
        triton_selection.largest(torch.zeros(2, 6), k)


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter accepts what the compiler does not; no GPU is needed to compile."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
