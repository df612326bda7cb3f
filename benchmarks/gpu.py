r"""Training on one GPU: milliseconds a step with the model pass included, what they consist of, and which kernels win.

    make bench-gpu
    python benchmarks/gpu.py --layer 8 --k 32 --tokens 4096

Whether the script works can be seen on a CPU, in Triton's interpreter:

    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --small --layer 1 --num-experts 600 --k 8 --tokens 32 \
        --forward-tokens 256 --steps 1 --block-steps 1 --rounds 1 --name gpu-small

GPT-2 124M's shape with random weights (timing does not need trained ones) in bfloat16, one MxD of 21,490 experts at
layer 8. The loop is the library's own stream, prefetched, and `Student.step`, without logging and snapshots. The dense
formulation leaves out the projection and renormalisation that ours does. Every part is timed apart, over calls that
follow one another without waiting, with both sets of kernels, `torch` and `triton`, whose results are compared first;
the table says which is faster, and `mxd.kernels.backends` should then say so too. `popular` codes name k / 2 latents on
every token. The settings at the end are those of `kernels/routing.py`, `selection.py` and `torch_tables.py`, of which
the values that are used on a GPU have not been measured.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from harness import machine, print_table, synchronize, write_report
from mxd.data.activations import ActivationStream
from mxd.data.prefetch import Prefetch
from mxd.data.tokens import LocalTokens
from mxd.kernels import backends, route, routing, score_blocks, selection, torch_tables
from mxd.kernels.turned import turned
from mxd.layers import MixtureOfDecoders, MixtureOfDecodersConfig
from mxd.models import MlpPair, mlp_pairs
from mxd.training.student import Student, StudentConfig

PAPER_TOKENS = 480_000_000
BACKENDS = ("torch", "triton")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Time training on a GPU."""

    layer: int = 8
    """Block whose MLP is learnt."""
    tokens: int = 4096
    """Tokens of a step."""
    num_experts: int = 21_490
    """Number of experts."""
    k: int = 32
    """Experts active for each token."""
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
    """Name of the report in results/."""


def language_model(options: Options) -> GPT2LMHeadModel:
    sizes = {"n_embd": 64, "n_head": 2, "vocab_size": 512} if options.small else {}
    config = GPT2Config(n_layer=options.layer + 1, **sizes)
    return GPT2LMHeadModel(config).to(options.device, torch.bfloat16).eval()


def new_student(options: Options, width: int) -> Student:
    config = MixtureOfDecodersConfig(
        d_in=width, d_hidden=4 * width, d_out=width, num_experts=options.num_experts, k=options.k
    )
    network = MixtureOfDecoders(config, torch.Generator().manual_seed(0))
    nn.init.normal_(network.W_dec, std=(4 * width) ** -0.5, generator=torch.Generator().manual_seed(1))
    return Student("gpu", options.layer, network.to(options.device), StudentConfig(lr=1e-4))


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


def whole_loop(options: Options, model: GPT2LMHeadModel) -> Loop:
    """Time steps over whole blocks of the shuffle buffer after a first one."""
    is_cuda = options.device.startswith("cuda")
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    student, stream = new_student(options, model.config.n_embd), new_stream(options, model)
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


def seconds_of(parts: Mapping[str, Callable[[], object]], options: Options) -> dict[str, float]:
    """Return the median seconds of a call of each part, over rounds in which the parts take turns."""
    calls: dict[str, int] = {}
    for name, part in parts.items():
        # Once to compile, allocate and warm up, once to see how long it takes.
        part()
        calls[name] = min(50, max(1, int(options.seconds / back_to_back(part, 2, options))))
    timings = {name: [] for name in parts}
    for _ in range(options.rounds):
        for name, part in parts.items():
            timings[name].append(back_to_back(part, calls[name], options))
    return {name: statistics.median(of_one) for name, of_one in timings.items()}


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


def dense_step(student: Student, x: Tensor, target: Tensor) -> Callable[[], None]:
    """The same mathematics with a dense code, autograd throughout."""
    layer = student.network
    assert isinstance(layer, MixtureOfDecoders)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            scores = functional.relu(x @ layer.W_gate + layer.b_gate)
            values, indices = scores.topk(layer.config.k, dim=-1)
            code = torch.zeros_like(scores).scatter(-1, indices, values)
            hidden = functional.gelu(x @ layer.encoder.W_enc + layer.encoder.b_enc)
            prediction = (code @ layer.W_expert) * (hidden @ layer.W_dec) + layer.b_dec
        loss = ((prediction.float() - target).square() / target.norm(dim=-1, keepdim=True)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


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
    for name in BACKENDS:
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


def main(options: Options) -> None:
    if not options.device.startswith("cpu"):
        if not torch.cuda.is_available():
            raise SystemExit(f"benchmarks/gpu.py needs a CUDA device for --device {options.device}; there is none.")
        torch.cuda.set_device(torch.device(options.device).index or 0)
    described = machine()
    model = language_model(options)
    width = model.config.n_embd
    loops: dict[str, Loop] = {}
    for name in BACKENDS:
        backends.set_backend(name)
        repeats = [whole_loop(options, model) for _ in range(options.rounds)]
        loops[name] = Loop(
            statistics.median(loop.seconds for loop in repeats), max(loop.peak_bytes for loop in repeats)
        )
    # What `settings` times belongs to the torch backend.
    backends.set_backend("torch")
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(2, options.tokens, width, generator=generator).to(options.device)
    contexts = torch.zeros(options.forward_tokens // 128, 128, dtype=torch.long, device=options.device)
    is_content = torch.ones(options.tokens, dtype=torch.bool, device=options.device)
    student = new_student(options, width)

    def step(name: str) -> None:
        with backends.using_backend(name):  # pyright: ignore[reportArgumentType]
            student.step(0, x, target, is_content, lr_factor=1.0, autocast=torch.bfloat16)

    layer = student.network
    assert isinstance(layer, MixtureOfDecoders)
    gate = layer.W_gate.detach().bfloat16()
    parts: dict[str, Callable[[], object]] = {
        f"model pass, {options.forward_tokens:,} tokens": lambda: mlp_pairs(model, contexts, [options.layer]),
        **{f"student's step, {name}": functools.partial(step, name) for name in BACKENDS},
        "dense formulation": dense_step(new_student(options, width), x, target),
        "gate product alone": lambda: x.bfloat16() @ gate,
        **kernels(options, layer, x),
        **settings(options, layer, x),
    }
    timings = seconds_of(parts, options)
    rows: list[dict[str, object]] = [
        {
            "what": f"whole loop, {name}",
            "ms": 1000 * loop.seconds,
            "tokens/s": options.tokens / loop.seconds,
            "peak MiB": loop.peak_bytes // 2**20,
        }
        for name, loop in loops.items()
    ]
    rows += [{"what": what, "ms": 1000 * taken, "tokens/s": "", "peak MiB": ""} for what, taken in timings.items()]
    print_table(rows, "One GPU")
    best = min(loop.seconds for loop in loops.values())
    details = {"minutes_for_the_papers_480M_tokens": PAPER_TOKENS / options.tokens * best / 60}
    print(details)
    write_report(options.name, "Training on one GPU", rows, described, details)


if __name__ == "__main__":
    main(tyro.cli(Options))
