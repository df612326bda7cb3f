"""Training on one GPU: milliseconds a step with the model pass included, what they consist of, and which kernels win.

    make bench-gpu
    python benchmarks/gpu.py --layer 8 --k 32 --tokens 4096

GPT-2 124M's shape with random weights (timing does not need trained ones) in bfloat16, one MxD of 21,490 experts at
layer 8. The loop is the library's own stream, prefetched, and `Student.step`, without logging and snapshots. The dense
formulation leaves out the projection and renormalisation that ours does. Every part is timed
apart with both sets of kernels, `torch` and `triton`, whose results are compared first; the table says which is faster,
and `mxd.kernels.backends` should then say so too.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from harness import machine, measure, median_wall, print_table, synchronize, write_report
from mxd.data.activations import ActivationStream
from mxd.data.prefetch import Prefetch
from mxd.data.tokens import LocalTokens
from mxd.kernels import backends, selection, torch_tables
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
    """Timed steps of the whole loop."""
    rounds: int = 20
    """Timed calls of each part."""
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
        buffer_tokens=32 * options.tokens,
        total_tokens=10 * (options.steps + 32) * options.tokens,
        forward_contexts=options.forward_tokens // 128,
        special_ids=(),
        seed=0,
        dtype=torch.bfloat16,
        device=options.device,
    )


def whole_loop(options: Options, model: GPT2LMHeadModel) -> float:
    """Return seconds a step, over whole blocks of the shuffle buffer after a first one."""
    student, stream = new_student(options, model.config.n_embd), new_stream(options, model)
    steps = -(-options.steps // 32) * 32
    started = time.perf_counter()
    for step, batch in enumerate(Prefetch(stream)):
        rows = batch.layers[options.layer]
        x, target = rows.x.float(), rows.target.float()
        student.step(step, x, target, batch.is_content, lr_factor=1.0, autocast=torch.bfloat16)
        if step == 31:
            synchronize()
            started = time.perf_counter()
        if step == 31 + steps:
            break
    synchronize()
    return (time.perf_counter() - started) / steps


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


def kernels(options: Options, student: Student, x: Tensor) -> dict[str, Callable[[], object]]:
    """Return every gather and the selection, by both sets of kernels, having compared their results."""
    from mxd.kernels import triton_selection, triton_tables

    layer = student.network
    assert isinstance(layer, MixtureOfDecoders)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        scores = x @ layer.W_gate + layer.b_gate
    table, (values, indices) = layer.W_expert.detach(), torch.topk(scores, options.k, dim=1)
    values = values.float()
    calls: dict[str, Callable[[], object]] = {}
    for name, gathers, select in (
        ("torch", torch_tables, selection.largest),
        ("triton", triton_tables, triton_selection.largest),
    ):
        calls[f"largest, {name}"] = functools.partial(select, scores, options.k)
        calls[f"weighted_rows, {name}"] = functools.partial(gathers.weighted_rows, values, indices, table)
        calls[f"row_dots, {name}"] = functools.partial(gathers.row_dots, x, indices, table)
        calls[f"row_sums, {name}"] = functools.partial(gathers.row_sums, values, indices, x, len(table))
    calls["torch.topk"] = functools.partial(torch.topk, scores, options.k, dim=1, sorted=False)
    for part in ("weighted_rows", "row_dots", "row_sums"):
        ours, other = (calls[f"{part}, {name}"]() for name in ("triton", "torch"))
        assert isinstance(ours, Tensor)
        assert isinstance(other, Tensor)
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3)
    for name in BACKENDS:
        kept, places = calls[f"largest, {name}"]()  # pyright: ignore[reportGeneralTypeIssues]
        assert torch.equal(kept.sort(1).values, torch.topk(scores, options.k, dim=1).values.sort(1).values)
        assert torch.equal(scores.gather(1, places), kept)
    return calls


def main(options: Options) -> None:
    if not options.device.startswith("cpu") and not torch.cuda.is_available():
        raise SystemExit(f"benchmarks/gpu.py needs a CUDA device for --device {options.device}; there is none.")
    described = machine()
    model = language_model(options)
    width = model.config.n_embd
    loops: dict[str, float] = {}
    for name in BACKENDS:
        backends.set_backend(name)
        loops[name] = statistics.median(whole_loop(options, model) for _ in range(3))
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(2, options.tokens, width, generator=generator).to(options.device)
    contexts = torch.zeros(options.forward_tokens // 128, 128, dtype=torch.long, device=options.device)
    is_content = torch.ones(options.tokens, dtype=torch.bool, device=options.device)
    student = new_student(options, width)

    def step(name: str) -> None:
        backends.set_backend(name)
        student.step(0, x, target, is_content, lr_factor=1.0, autocast=torch.bfloat16)

    layer = student.network
    assert isinstance(layer, MixtureOfDecoders)
    gate = layer.W_gate.detach().bfloat16()
    parts: dict[str, Callable[[], object]] = {
        f"model pass, {options.forward_tokens:,} tokens": lambda: mlp_pairs(model, contexts, [options.layer]),
        **{f"student's step, {name}": functools.partial(step, name) for name in BACKENDS},
        "dense formulation": dense_step(new_student(options, width), x, target),
        "gate product alone": lambda: x.bfloat16() @ gate,
        **kernels(options, student, x),
    }
    timings = measure(parts, options.rounds, warmup=5)
    rows: list[dict[str, object]] = [
        {"what": f"whole loop, {name}", "ms": 1000 * seconds, "tokens/s": options.tokens / seconds}
        for name, seconds in loops.items()
    ]
    rows += [{"what": what, "ms": 1000 * median_wall(of_one), "tokens/s": ""} for what, of_one in timings.items()]
    print_table(rows, "One GPU")
    best = min(loops.values())
    details = {
        "minutes_for_the_papers_480M_tokens": PAPER_TOKENS / options.tokens * best / 60,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }
    print(details)
    write_report(options.name, "Training on one GPU", rows, described, details)


if __name__ == "__main__":
    main(tyro.cli(Options))
