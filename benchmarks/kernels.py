"""The choices inside `mxd.kernels` and the optimiser, each against what it was chosen over.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --tokens 1024 --rounds 3

Shapes are those of GPT-2's MLP at the paper's size unless a row says otherwise. The ways of one row take turns in one
process. What this measured is quoted in the docstrings of the constants that rest on it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro
from torch import Tensor, nn

from harness import machine, measure, median_wall, print_table, write_report
from mxd.kernels import backends, products, routing, selection, torch_tables
from mxd.kernels.turned import turned
from mxd.layers import MixtureOfDecoders, MixtureOfDecodersConfig
from mxd.losses import distillation_loss
from mxd.training.optimizer import adamw, project_gradients_, renormalize_

D, N, K = 768, 21_490, 32
STUDENTS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Measure the choices inside the kernels."""

    tokens: int = 4096
    """Tokens of a batch."""
    rounds: int = 9
    """Timed calls of each way."""
    threads: int | None = None
    """Threads of torch; its own choice if not given."""
    name: str = "kernels_cpu"
    """Name of the report in results/."""


class Comparison(NamedTuple):
    """Ways to do one thing; the first one is the library's."""

    what: str
    ways: Mapping[str, Callable[[], object]]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_backend(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        backends.set_backend(name)
        call()
        backends.set_backend("auto")

    return run


def scores_at_once(weight: Tensor) -> int:
    return routing.BLOCK_BYTES["cpu"] // (weight.shape[1] * weight.element_size())


def product_rows(options: Options) -> Iterator[Comparison]:
    for dtype in (torch.float32, torch.bfloat16):
        weight, bias = random(N, D, dtype=dtype).t(), random(N, dtype=dtype)
        for rows in sorted({1, 8, 32, 256, options.tokens}):
            x = random(rows, D, dtype=dtype)

            def multiply(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> None:
                for _ in products.product_by_rows(x, weight, bias, scores_at_once(weight)):
                    pass

            ways = {"onednn": multiply, "torch": with_backend("torch", multiply)}
            yield Comparison(f"gate product of {rows} rows, {short(dtype)}", ways)


def dense_rows(options: Options) -> Iterator[Comparison]:
    x, weight = random(options.tokens, D), random(D, 4 * D).requires_grad_()

    def step() -> None:
        products.linear(x, weight).sum().backward()

    yield Comparison("dense product and its weight's gradient", {"onednn": step, "torch": with_backend("torch", step)})


def block_sizes(options: Options) -> Iterator[Comparison]:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = random(options.tokens, D), random(N, D).t(), torch.zeros(N)

        def at(
            size: int, x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias, dtype: torch.dtype = dtype
        ) -> None:
            usual = routing.BLOCK_BYTES["cpu"]
            routing.BLOCK_BYTES["cpu"] = size
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                routing.route(x, weight, bias, K)
            routing.BLOCK_BYTES["cpu"] = usual

        sizes = [2**24, *(2**power for power in (20, 22, 23, 25, 26, 28))]
        ways = {f"{size / 2**20:g} MiB": functools.partial(at, size) for size in sizes}
        yield Comparison(f"route by size of a block of scores, {short(dtype)}", ways)


def selections(options: Options) -> Iterator[Comparison]:
    for dtype in (torch.float32, torch.bfloat16):
        for width in (256, 512, 1024, 4096, N, 131_072):
            rows = min(options.tokens, 2**24 // width)
            scores = random(rows, width, dtype=dtype)
            yield Comparison(
                f"{K} largest of {width:,}, {rows:,} rows, {short(dtype)}",
                {
                    "largest": functools.partial(selection.largest, scores, K),
                    "torch.topk": functools.partial(torch.topk, scores, K, dim=1, sorted=False),
                },
            )


def table_gathers(options: Options) -> Iterator[Comparison]:
    dense, table, values = random(options.tokens, D), random(N, D), random(options.tokens, K)
    indices = torch.randint(N, (options.tokens, K), generator=torch.Generator().manual_seed(0))

    def by_bmm() -> None:
        block = torch_tables.BLOCK_ELEMENTS // (K * D)
        for start in range(0, len(dense), block):
            rows = slice(start, start + block)
            torch.bmm(table[indices[rows]], dense[rows][..., None])

    def dense_code() -> Tensor:
        return torch.zeros(options.tokens, N).scatter_(1, indices, values)

    def added() -> None:
        contributions = values[..., None] * dense[:, None]
        torch.zeros(N, D).index_add_(0, indices.flatten(), contributions.flatten(0, 1))

    row_dots = functools.partial(torch_tables.row_dots, dense, indices, table)
    yield Comparison("row_dots", {"embedding_bag's derivative": row_dots, "gather and bmm": by_bmm})
    weighted = functools.partial(torch_tables.weighted_rows, values, indices, table)
    yield Comparison("weighted_rows", {"embedding_bag": weighted, "dense code": lambda: dense_code() @ table})

    def sums() -> Tensor:
        return torch_tables.row_sums(values, turned(indices, N), dense)

    yield Comparison("row_sums", {"sort and embedding_bag": sums, "index_add_ of contributions": added})


def batched_gates(options: Options) -> Iterator[Comparison]:
    for dtype in (torch.float32, torch.bfloat16):
        x = random(options.tokens, D, dtype=dtype)
        for n in (512, 2048, 8192):
            gates = [random(n, D, dtype=dtype).t() for _ in range(STUDENTS)]
            together = torch.cat([gate.t() for gate in gates]).t()

            def multiply(weights: list[Tensor], x: Tensor = x) -> None:
                for weight in weights:
                    bias = weight.new_zeros(weight.shape[1])
                    for _ in products.product_by_rows(x, weight, bias, scores_at_once(weight)):
                        pass

            # Results that are quoted have no type in the name in float32.
            suffix = "" if dtype == torch.float32 else f", {short(dtype)}"
            yield Comparison(
                f"gate products of {STUDENTS} students, {n:,} experts each{suffix}",
                {
                    "one by one": functools.partial(multiply, gates),
                    "batched": functools.partial(multiply, [together]),
                },
            )


def optimizer_passes(options: Options) -> Iterator[Comparison]:
    del options
    table = nn.Parameter(nn.functional.normalize(random(N, D)))
    table.grad = random(N, D)
    state = [torch.zeros(N, D), torch.zeros(N, D)]
    optimizer = adamw([table], 1e-4, 0.0)

    def apart() -> None:
        project_gradients_([table])
        optimizer.step()
        renormalize_([table])

    @torch.no_grad()
    def fused(rows_at_once: int = 512) -> None:
        assert table.grad is not None
        for start in range(0, N, rows_at_once):
            row, gradient, *moments = (tensor[start : start + rows_at_once] for tensor in (table, table.grad, *state))
            gradient.addcmul_(row, (gradient * row).sum(1, keepdim=True), value=-1)
            torch._fused_adamw_(
                *([tensor] for tensor in (row, gradient, *moments)),
                [],
                [torch.tensor(1.0)],
                lr=1e-4,
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.0,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )
            row.div_(torch.linalg.vector_norm(row, dim=1, keepdim=True))

    @torch.no_grad()
    def by_einsum() -> None:
        assert table.grad is not None
        table.grad.addcmul_(table, torch.einsum("nd,nd->n", table.grad, table)[:, None], value=-1)

    yield Comparison("project, AdamW, renormalise", {"three passes": apart, "one pass by blocks": fused})
    yield Comparison("project", {"blocks": lambda: project_gradients_([table]), "einsum": by_einsum})
    gate = nn.Parameter(random(N, D).t())
    gate.grad = random(N, D).t()
    plain = torch.optim.AdamW([gate], lr=1e-4, fused=True)
    yield Comparison("AdamW of a gate", {"in memory order": adamw([gate], 1e-4, 0.0).step, "as it stands": plain.step})


def compiled(options: Options) -> Iterator[Comparison]:
    layer = MixtureOfDecoders(MixtureOfDecodersConfig(d_in=D, d_hidden=4 * D, d_out=D, num_experts=N, k=K))
    x, target = random(options.tokens, D), random(options.tokens, D)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return distillation_loss(layer(x).prediction.float(), target)

    traced = torch.compile(loss)

    def step(of: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = of(x, target)
        value.backward()
        layer.zero_grad()

    for dtype in (torch.float32, torch.bfloat16):
        ways = {"eager": functools.partial(step, loss, dtype), "torch.compile": functools.partial(step, traced, dtype)}
        yield Comparison(f"loss and gradients of an MxD, {short(dtype)}", ways)


SECTIONS = (
    product_rows,
    dense_rows,
    block_sizes,
    selections,
    table_gathers,
    batched_gates,
    optimizer_passes,
    compiled,
)


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    described, rows = machine(), []
    for section in SECTIONS:
        first = len(rows)
        for what, ways in section(options):
            timings = measure(ways, options.rounds, warmup=2)
            seconds = {way: median_wall(of_one) for way, of_one in timings.items()}
            ours = next(iter(seconds.values()))
            rows += [
                {"what": what, "way": way, "ms": 1000 * value, "times ours": value / ours}
                for way, value in seconds.items()
            ]
        print_table(rows[first:], section.__name__)
    write_report(options.name, "Choices inside the kernels", rows, described, {"tokens": options.tokens})


if __name__ == "__main__":
    main(tyro.cli(Options))
