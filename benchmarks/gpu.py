r"""Training on one GPU: milliseconds a step with the model pass included, what they consist of, and which kernels win.

    make bench-gpu
    python benchmarks/gpu.py --layer 8 --k 32 --tokens 4096

Whether the script works can be seen on a CPU, in Triton's interpreter:

    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --small --layer 1 --num-experts 100 --k 8 --tokens 32 \
        --forward-tokens 256 --steps 1 --block-steps 1 --rounds 1 --name gpu-small --out benchmarks/out

GPT-2 124M's shape with random weights (timing does not need trained ones) in bfloat16, a layer at block 8. The loop is
the library's own stream, prefetched, and `Student.step`, without logging and snapshots, once with an MxD of 21,490
experts and once with a shared transcoder, which `mxd train` makes by default.

Every part is timed apart, over calls that follow one another without waiting. Those that have a kind before a colon are
steps (`gpu_steps.py`, `variants.py`): ours with both sets of kernels, `torch` and `triton`, the dense formulation, the
bare products that no formulation can do without, and other libraries' where they are installed, beside our transcoder
of the same size. Ours must have the dense formulation's gradients; otherwise the report is written, and the script
ends with status 1. Then both sets of kernels apart, whose results are compared first; the table says which is faster,
and `mxd.kernels.backends` should then say so too. `popular` codes name k / 2 latents on every token. The settings at
the end are those of `kernels/routing.py`, `selection.py` and `torch_tables.py`, of which the values that are used on a
GPU have not been measured.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpu_steps import KERNELS, KINDS, GpuStep, complaints, draw, make_steps, planned_steps, ratios
from harness import RESULTS, machine, print_table, synchronize, write_report
from mxd.data.activations import ActivationStream
from mxd.data.prefetch import Prefetch
from mxd.data.tokens import LocalTokens
from mxd.kernels import backends, route, routing, score_blocks, selection, torch_tables
from mxd.kernels.turned import turned
from mxd.layers import MixtureOfDecoders
from mxd.models import MlpPair, mlp_pairs
from variants import Kind, Shape, Step, make_batch, make_layer, make_student, sized

PAPER_TOKENS = 480_000_000
LOOPS: tuple[Kind, ...] = ("mxd", "shared-transcoder")
"""The kinds that the whole loop is timed with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Time training on a GPU."""

    layer: int = 8
    """Block whose MLP is learnt."""
    tokens: int = 4096
    """Tokens of a step."""
    num_experts: int = 21_490
    """Number of experts of a mixture; other kinds have what goes with the width, and with `--small` as many."""
    k: int = 32
    """Latents active for each token."""
    forward_tokens: int = 32_768
    """Tokens of one run of the language model."""
    steps: int = 128
    """Timed steps of the whole loop, filled up to whole blocks of the shuffle buffer."""
    block_steps: int = 32
    """Steps that one block of the shuffle buffer holds."""
    rounds: int = 5
    """How often the loop and each part are timed."""
    seconds: float = 0.3
    """How long one timing of a part may take: it is of 1 to 50 calls."""
    device: str = "cuda"
    """Where to run."""
    small: bool = False
    """A tiny model and layer, to see that the script works."""
    name: str = "gpu"
    """Name of the report."""
    out: Path = RESULTS
    """Folder of the report."""

    def shape(self, kind: Kind, width: int) -> Shape:
        """Return what a step learns: the sizes that go with an MLP of this width."""
        sizes = {"tokens": self.tokens, "d_model": width, "d_hidden": 4 * width, "k": self.k, "device": self.device}
        if kind == "mxd" or self.small:
            return Shape(kind=kind, num_latents=self.num_experts, **sizes)
        return sized(Shape(kind=kind, **sizes))


def language_model(options: Options) -> GPT2LMHeadModel:
    sizes = {"n_embd": 64, "n_head": 2, "vocab_size": 512} if options.small else {}
    config = GPT2Config(n_layer=options.layer + 1, **sizes)
    return GPT2LMHeadModel(config).to(options.device, torch.bfloat16).eval()


def new_stream(options: Options, model: GPT2LMHeadModel) -> ActivationStream:
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=2**20, dtype=np.int64)
    width = model.config.n_embd

    def pairs(first: int, contexts: Tensor) -> Mapping[int, MlpPair]:
        del first
        return mlp_pairs(model, contexts.to(options.device), [options.layer])

    return ActivationStream(
        pairs,
        LocalTokens(ids, context=128, bos=None, seed=0),
        widths={options.layer: (width, width)},
        batch_tokens=options.tokens,
        buffer_tokens=options.block_steps * options.tokens,
        total_tokens=10 * (options.steps + options.block_steps) * options.tokens,
        forward_contexts=options.forward_tokens // 128,
        special_ids=(),
        seed=0,
        dtype=torch.bfloat16,
        device=options.device,
    )


class Loop(NamedTuple):
    """What the whole loop takes."""

    seconds: float
    """A step."""
    peak_bytes: int
    """The most that tensors took on the GPU; 0 on a CPU."""


def whole_loop(options: Options, model: GPT2LMHeadModel, kind: Kind) -> Loop:
    """Time steps over whole blocks of the shuffle buffer after a first one."""
    is_cuda = options.device.startswith("cuda")
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    student = make_student(make_layer(options.shape(kind, model.config.n_embd)))
    stream = new_stream(options, model)
    first = options.block_steps
    steps = -(-options.steps // first) * first
    started = time.perf_counter()
    for step, batch in enumerate(Prefetch(stream)):
        rows = batch.layers[options.layer]
        x, target = rows.x.float(), rows.target.float()
        student.step(step, x, target, batch.is_content, lr_factor=1.0, autocast=torch.bfloat16)
        if step == first - 1:
            synchronize()
            started = time.perf_counter()
        if step == first - 1 + steps:
            break
    synchronize()
    seconds = (time.perf_counter() - started) / steps
    return Loop(seconds, torch.cuda.max_memory_allocated() if is_cuda else 0)


def seconds_of(parts: Mapping[str, Callable[[], object]], options: Options) -> dict[str, list[float]]:
    """Return the seconds of a call of each part, for rounds in which the parts take turns."""
    calls: dict[str, int] = {}
    for name, part in parts.items():
        # Once to compile, allocate and warm up, once to see how long it takes.
        part()
        calls[name] = min(50, max(1, int(options.seconds / back_to_back(part, 2, options))))
    timings: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.rounds):
        for name, part in parts.items():
            timings[name].append(back_to_back(part, calls[name], options))
    return timings


def back_to_back(part: Callable[[], object], calls: int, options: Options) -> float:
    """Return seconds a call of some that follow one another: on a GPU by its own clock, without waiting in between."""
    synchronize()
    if not options.device.startswith("cuda"):
        started = time.perf_counter()
        for _ in range(calls):
            part()
        return (time.perf_counter() - started) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        part()
    last.record()
    synchronize()
    return first.elapsed_time(last) / 1000 / calls


def scores_of(layer: MixtureOfDecoders, x: Tensor) -> Tensor:
    """Return the scores as training selects from them."""
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        return torch.cat([block for _, block in score_blocks(x, layer.W_gate, layer.b_gate)])


def popular(indices: Tensor) -> Tensor:
    """Return the code with half of each token's latents replaced by those that every token names."""
    always = indices.shape[1] // 2
    return torch.cat([torch.arange(always, device=indices.device).expand(len(indices), -1), indices[:, always:]], 1)


def kernels(options: Options, layer: MixtureOfDecoders, x: Tensor) -> dict[str, Callable[[], object]]:
    """Return every gather and the selection, by both sets of kernels, having compared their results."""
    from mxd.kernels import triton_selection, triton_tables

    scores, table = scores_of(layer, x), layer.W_expert.detach()
    values, indices = torch.topk(scores.float(), options.k, dim=1)
    codes = {"": indices, " (popular)": popular(indices)}
    calls: dict[str, Callable[[], object]] = {}

    def row_sums(gathers: object, named: Tensor) -> Tensor:
        return gathers.row_sums(values, turned(named, len(table)), x)  # pyright: ignore[reportAttributeAccessIssue]

    for name, gathers, select in (
        ("torch", torch_tables, selection.largest),
        ("triton", triton_tables, triton_selection.largest),
    ):
        calls[f"largest, {name}"] = functools.partial(select, scores, options.k)
        calls[f"weighted_rows, {name}"] = functools.partial(gathers.weighted_rows, values, indices, table)
        calls[f"row_dots, {name}"] = functools.partial(gathers.row_dots, x, indices, table)
        for which, named in codes.items():
            calls[f"row_sums{which}, {name}"] = functools.partial(row_sums, gathers, named)
    calls["torch.topk"] = functools.partial(torch.topk, scores, options.k, dim=1, sorted=False)
    calls["turned"] = functools.partial(turned, indices, len(table))
    for part in ("weighted_rows", "row_dots", *(f"row_sums{which}" for which in codes)):
        ours, other = (calls[f"{part}, {name}"]() for name in ("triton", "torch"))
        assert isinstance(ours, Tensor)
        assert isinstance(other, Tensor)
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-2)
    for name in KERNELS:
        kept, places = calls[f"largest, {name}"]()  # pyright: ignore[reportGeneralTypeIssues]
        assert torch.equal(kept.sort(1).values, torch.topk(scores, options.k, dim=1).values.sort(1).values)
        assert torch.equal(scores.gather(1, places), kept)
    return calls


def settings(options: Options, layer: MixtureOfDecoders, x: Tensor) -> dict[str, Callable[[], object]]:
    """Return calls under other values of the constants that were chosen without a GPU."""
    scores, many = scores_of(layer, x), x.repeat(8, 1)
    named = turned(popular(torch.topk(scores, options.k, dim=1).indices), options.num_experts)
    values = torch.ones(len(x), options.k, device=x.device)

    def blocks(size: int) -> None:
        with (
            mock.patch.dict(routing.BLOCK_BYTES, {x.device.type: size}),
            torch.no_grad(),
            torch.autocast(x.device.type, torch.bfloat16),
        ):
            route(many, layer.W_gate, layer.b_gate, options.k)

    def narrowest(width: int) -> None:
        with mock.patch.object(selection, "NARROWEST", width):
            selection.largest(scores, options.k)

    def runs(length: int) -> None:
        with mock.patch.object(torch_tables, "RUN", length):
            weights = values.flatten()[named.order]
            torch_tables.sums_by_runs(weights, named.tokens, named.bounds[:-1], x)

    tokens = f"{len(many):,} tokens"
    calls: dict[str, Callable[[], object]] = {}
    for power in (26, 28, 29, 30, 31):
        calls[f"route, {tokens}, BLOCK_BYTES 2**{power}"] = functools.partial(blocks, 2**power)
    for width in (512, 2048, 8192, 2**20):
        calls[f"largest, NARROWEST {width:,}"] = functools.partial(narrowest, width)
    for length in (16, 64, 256):
        calls[f"row_sums (popular), RUN {length}"] = functools.partial(runs, length)
    return calls


def time_loops(options: Options, model: GPT2LMHeadModel) -> dict[str, list[Loop]]:
    """Return every round of the whole loop, by kind and kernels."""
    loops: dict[str, list[Loop]] = {}
    for kind in LOOPS:
        for name in KERNELS:
            with backends.using_backend(name):
                found = [whole_loop(options, model, kind) for _ in range(options.rounds)]
            loops[f"{kind}: whole loop, bfloat16, {name} kernels"] = found
    return loops


def time_parts(
    options: Options, model: GPT2LMHeadModel, steps: Mapping[GpuStep, Step], shape: Shape
) -> dict[str, list[float]]:
    """Return the seconds of every round of the steps, and of what a mixture of this shape consists of."""
    x, contexts = make_batch(shape).x, options.forward_tokens // 128
    ids = torch.zeros(contexts, 128, dtype=torch.long, device=options.device)
    layer = cast(MixtureOfDecoders, make_layer(shape))
    gate, rounded = layer.W_gate.detach().bfloat16(), x.bfloat16()
    parts: dict[str, Callable[[], object]] = {
        f"model pass, {options.forward_tokens:,} tokens": lambda: mlp_pairs(model, ids, [options.layer]),
        **{step.name: call for step, call in steps.items()},
        "gate product alone": lambda: rounded @ gate,
        **kernels(options, layer, x),
        **settings(options, layer, x),
    }
    # What `settings` times belongs to the torch backend; steps with other kernels choose theirs.
    with backends.using_backend("torch"):
        return seconds_of(parts, options)


def main(options: Options) -> None:
    if not options.device.startswith("cpu"):
        if not torch.cuda.is_available():
            raise SystemExit(f"benchmarks/gpu.py needs a CUDA device for --device {options.device}; there is none.")
        torch.cuda.set_device(torch.device(options.device).index or 0)
    described = machine()
    model = language_model(options)
    shapes = {kind: options.shape(kind, model.config.n_embd) for kind in KINDS}
    planned = planned_steps(options.device)
    wrong = complaints(shapes)
    # Before the steps, whose weights would count as the loops' memory.
    loops = time_loops(options, model)
    steps = make_steps(planned, shapes)
    timings = time_parts(options, model, steps, shapes["mxd"])
    is_step = {step.name for step in steps}
    rows: list[dict[str, object]] = [
        {
            "what": what,
            "ms": 1000 * statistics.median(loop.seconds for loop in of_one),
            "tokens/s": options.tokens / statistics.median(loop.seconds for loop in of_one),
            "peak MiB": max(loop.peak_bytes for loop in of_one) // 2**20,
        }
        for what, of_one in loops.items()
    ]
    for what, of_one in timings.items():
        taken = statistics.median(of_one)
        rate = options.tokens / taken if what in is_step else ""
        rows.append({"what": what, "ms": 1000 * taken, "tokens/s": rate, "peak MiB": ""})
    print_table(rows, "One GPU")
    found = ratios(timings, list(steps))
    print_table([{"ratio": name, "median of rounds": value} for name, value in found.items()], "Ratios")
    best = min(statistics.median(loop.seconds for loop in loops[what]) for what in loops if what.startswith("mxd:"))
    minutes = PAPER_TOKENS / options.tokens * best / 60
    print(f"{minutes:.1f} minutes for the paper's {PAPER_TOKENS // 10**6}M tokens, with the model in the loop")
    seconds = {what: [loop.seconds for loop in of_one] for what, of_one in loops.items()} | timings
    variants = {**dict.fromkeys(loops, "mxd"), **{step.name: step.variant for step in steps}}
    subtitle = f"{options.tokens:,} tokens, width {model.config.n_embd}, k {options.k}"
    write_report(
        options.name,
        "Training on one GPU",
        rows,
        described,
        {
            "minutes_for_the_papers_480M_tokens": minutes,
            "shapes": {kind: asdict(shape) for kind, shape in shapes.items()},
            "ratios": found,
            "disagreements": wrong,
            "seconds": seconds,
        },
        draw(
            {name: seconds[name] for name in variants},
            variants.__getitem__,
            "Training on one GPU",
            f"{subtitle} · {described.get('gpu', described['cpu'])}, {described['date']}",
        ),
        options.out,
    )
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main(tyro.cli(Options))
