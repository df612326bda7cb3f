# pyright: reportMissingImports=false, reportUnknownParameterType=false, reportMissingTypeArgument=false
"""Compiles every Triton kernel for GPUs of compute capability 9.0, without one; run with TRITON_INTERPRET=0."""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxd.kernels import triton_selection, triton_tables

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}

Argument = torch.dtype | int | None
"""A pointer to something, a whole number, or an argument that is left out."""


def compile_kernel(
    kernel: triton.JITFunction, arguments: tuple[Argument, ...], warps: int, **constants: object
) -> None:
    signature, values, attributes = {}, {}, {}
    for place, (name, argument) in enumerate(zip(kernel.arg_names, (*arguments, *constants), strict=True)):
        if isinstance(argument, str) or argument is None:
            signature[name], values[(place,)] = "constexpr", constants.get(name)
        else:
            signature[name] = TYPES[argument] if isinstance(argument, torch.dtype) else "i32"
            if not isinstance(argument, int) or argument % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    triton.compile(source, target=TARGET, options={"num_warps": warps})


def compile_tables(float_type: torch.dtype, k: int, d: int) -> None:
    values, pairs, names = torch.float32, torch.int64, torch.int32
    for kernel, num_rows, arguments in (
        (triton_tables._weighted_rows, k, (float_type, values, pairs, float_type, k, d)),
        (triton_tables._row_dots, k, (float_type, float_type, pairs, float_type, k, d)),
        (triton_tables._chunk_sums, triton_tables.CHUNK, (values, values, pairs, names, float_type, d)),
        (triton_tables._row_sums, triton_tables.CHUNK, (float_type, values, pairs, pairs, float_type, values, d)),
    ):
        accumulator, rows, columns, warps = triton_tables._tile(num_rows, d, torch.empty(0, dtype=float_type))
        constants = {"ACCUMULATOR": accumulator, "ROWS": rows, "COLUMNS": columns}
        if num_rows != k:
            constants = {"CHUNK": triton_tables.CHUNK, **constants}
        compile_kernel(kernel, arguments, warps, **constants)


def compile_selection(scores: torch.dtype, n: int, k: int) -> None:
    row, warps, counts = (scores, n), triton_selection.WARPS, torch.int32
    sizes, bits = {"CAPACITY": 4 * k, "CHUNK": triton_selection.CHUNK}, {"BITS": 15 if scores == torch.bfloat16 else 31}
    compile_kernel(triton_selection._find_candidates, (counts, counts, *row, n, k), warps, **sizes, **bits)
    arguments = (scores, torch.int64, torch.int32, counts, *row, k)
    compile_kernel(triton_selection._select_candidates, arguments, 1, CAPACITY=4 * k, **bits)
    for given in (counts, None):
        arguments = (scores, torch.int64, given, *row, n, k)
        compile_kernel(triton_selection._select_rows, arguments, warps, **sizes, **bits)


if __name__ == "__main__":
    # As training has them: tables in float32, codes of one latent, and the sums of single numbers for a bias.
    for float_type, k, d in ((torch.bfloat16, 32, 768), (torch.float32, 32, 768), (torch.float32, 1, 1)):
        compile_tables(float_type, k, d)
    compile_selection(torch.bfloat16, n=21504, k=32)
    compile_selection(torch.float32, n=21490, k=32)
