"""One training step of a Mixture of Decoders: mxd's, and the same mathematics written densely.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --dtype bfloat16 --json step.json
    python benchmarks/train_step.py --profile

`mxd` is `Student.step`. `dense` is the plain formulation, autograd throughout: a code of one number per expert and
token, multiplied with the whole expert table, and AdamW as torch ships it. `products` is what no exact formulation can
do without: the gate's product with the input, and the dense branch's two products with their three gradients.

The step is forward, backward, gradient projection, AdamW and renormalisation. Weights and batch are the same for all;
before anything is timed, loss and gradients of `mxd` and `dense` must agree. Rounds are interleaved, so that a machine
that is busy is busy for all of them, and memory is measured in a process of its own for each.
"""

import copy
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

from mxd.layers import MixtureOfDecoders, MixtureOfDecodersConfig
from mxd.losses import distillation_loss
from mxd.training.optimizer import project_gradients_, renormalize_
from mxd.training.student import Student, StudentConfig

LEARNING_RATE = 1e-4
TOLERANCE = 1e-3
"""Largest relative error of a gradient in float32; one expert chosen otherwise among equals costs that much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Time one training step; the shape is that of GPT-2's MLP at the paper's size."""

    tokens: int = 2048
    """Tokens in the batch."""
    d_model: int = 768
    """Width of input and output."""
    d_hidden: int = 3072
    """Number of dense hidden units."""
    num_experts: int = 21_490
    """Number of experts."""
    k: int = 32
    """Experts active for each token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the products: bfloat16 means autocast with float32 weights."""
    rounds: int = 9
    """Timed steps of each variant."""
    threads: int | None = None
    """Threads of torch; its own choice if not given."""
    json: Path | None = None
    """File to write the results to."""
    note: str = ""
    """What a reader of the results should know, such as what else the machine was doing."""
    profile: bool = False
    """Print where mxd's step spends its time, and stop."""
    memory_of: str | None = None
    """Print one variant's peak memory in bytes, and stop; the script calls itself with this."""


class Batch(NamedTuple):
    """What a step learns from."""

    x: Tensor
    target: Tensor


LossOf = Callable[[MixtureOfDecoders, Batch], Tensor]


def build(options: Options) -> tuple[MixtureOfDecoders, Batch]:
    generator = torch.Generator().manual_seed(0)
    config = MixtureOfDecodersConfig(
        d_in=options.d_model,
        d_hidden=options.d_hidden,
        d_out=options.d_model,
        num_experts=options.num_experts,
        k=options.k,
    )
    layer = MixtureOfDecoders(config, generator)
    with torch.no_grad():  # It begins at zero, and then no other weight has a gradient.
        layer.W_dec.normal_(std=options.d_hidden**-0.5, generator=generator)
    x, target = torch.randn(2, options.tokens, options.d_model, generator=generator)
    return layer, Batch(x, target)


def autocast(options: Options) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")


def mxd_loss(layer: MixtureOfDecoders, batch: Batch) -> Tensor:
    return distillation_loss(layer(batch.x).prediction.float(), batch.target)


def mxd_step(layer: MixtureOfDecoders, batch: Batch, options: Options) -> Callable[[], None]:
    student = Student("benchmark", 0, layer, StudentConfig(lr=LEARNING_RATE))
    is_content = torch.ones(options.tokens, dtype=torch.bool)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else None
    return lambda: student.step(0, *batch, is_content, lr_factor=1.0, autocast=dtype)


def dense_loss(layer: MixtureOfDecoders, batch: Batch) -> Tensor:
    scores = functional.relu(batch.x @ layer.W_gate + layer.b_gate)
    values, indices = scores.topk(layer.config.k, dim=-1)
    code = torch.zeros_like(scores).scatter(-1, indices, values)
    hidden = functional.gelu(batch.x @ layer.encoder.W_enc + layer.encoder.b_enc)
    prediction = (code @ layer.W_expert) * (hidden @ layer.W_dec) + layer.b_dec
    return ((prediction.float() - batch.target).square() / batch.target.norm(dim=-1, keepdim=True)).mean()


def dense_step(layer: MixtureOfDecoders, batch: Batch, options: Options) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    table = layer.W_expert

    def step() -> None:
        with torch.no_grad():
            table.div_(table.norm(dim=1, keepdim=True))
        with autocast(options):
            loss = dense_loss(layer, batch)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert table.grad is not None
            table.grad -= (table.grad * table).sum(dim=1, keepdim=True) * table
        optimizer.step()

    return step


def products_step(layer: MixtureOfDecoders, batch: Batch, options: Options) -> Callable[[], None]:
    dtype = getattr(torch, options.dtype)
    x, gradient = batch.x.to(dtype), batch.target.to(dtype)
    gate, enc, dec = (weight.detach().to(dtype) for weight in (layer.W_gate, layer.encoder.W_enc, layer.W_dec))

    def step() -> None:
        _ = x @ gate
        hidden = x @ enc
        _ = hidden @ dec
        _ = hidden.t() @ gradient
        _ = x.t() @ (gradient @ dec.t())

    return step


VARIANTS = {"mxd": mxd_step, "dense": dense_step, "products": products_step}


def gradients(loss_of: LossOf, layer: MixtureOfDecoders, batch: Batch, options: Options) -> dict[str, Tensor]:
    with autocast(options):
        loss = loss_of(layer, batch)
    names, weights = zip(*layer.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, weights), strict=True))}


def require_agreement(layer: MixtureOfDecoders, batch: Batch, options: Options) -> dict[str, dict[str, float]]:
    """Return the relative errors of loss and gradients, against the dense ones in float32.

    In bfloat16 many scores are equal and each variant chooses among them, so mxd is held to what dense errs by.

    Raises:
        ValueError: If one of mxd's is larger than rounding explains.
    """
    exact = gradients(dense_loss, layer, batch, replace(options, dtype="float32"))
    errors: dict[str, dict[str, float]] = {}
    for variant, loss_of in {"mxd": mxd_loss, "dense": dense_loss}.items():
        found = gradients(loss_of, layer, batch, options)
        errors[variant] = {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    for name, error in errors["mxd"].items():
        allowed = max(TOLERANCE, 1.1 * errors["dense"][name])
        if not error <= allowed:
            raise ValueError(f"The relative error of {name} must be at most {allowed:.1e}; got {error:.1e}.")
    return errors


class Timing(NamedTuple):
    """Seconds of one step."""

    wall: float
    cpu: float


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[Timing]]:
    timings: dict[str, list[Timing]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if round_:  # The first one allocates the optimiser's state.
                timings[name].append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return timings


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_peak_memory(options: Options, variant: str) -> None:
    layer, batch = build(options)
    base = peak_bytes()
    step = VARIANTS[variant](layer, batch, options)
    for _ in range(2):
        step()
    print(peak_bytes() - base)


def peak_memory_in_own_process(variant: str) -> int:
    command = [sys.executable, *sys.argv, "--memory-of", variant]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_profile(options: Options, console: Console) -> None:
    """Run the pieces of `Student.step` under torch's profiler, and print each one's share."""
    layer, batch = build(options)
    optimizer = Student("benchmark", 0, layer, StudentConfig(lr=LEARNING_RATE)).optimizer
    tables = layer.unit_length_tables()

    def step() -> None:
        with autocast(options):
            loss = mxd_loss(layer, batch)
        loss.backward()
        with record_function("project"):
            project_gradients_(tables)
        optimizer.step()
        with record_function("free the gradients"):
            optimizer.zero_grad()
        with record_function("renormalise"):
            renormalize_(tables)

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(options.rounds):
            with record_function("step"):
                step()
    seconds = {event.key: event.cpu_time_total / 1e6 / options.rounds for event in profiler.key_averages()}
    shares = {
        "route": seconds["_Route"],
        "mix": seconds["_Mix"],
        "route, backward": seconds["_RouteBackward"],
        "mix, backward": seconds["_MixBackward"],
        "AdamW": seconds["Optimizer.step#AdamW.step"],
        **{name: seconds[name] for name in ("project", "renormalise", "free the gradients")},
    }
    shares["dense branch and loss"] = seconds["step"] - sum(shares.values())
    table = Table("part", "seconds", "share", title=f"mxd's step, {options.dtype}")
    for name in sorted(shares, key=shares.__getitem__, reverse=True):
        table.add_row(name, f"{shares[name]:.3f}", f"{shares[name] / seconds['step']:.1%}")
    console.print(table)


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


class Result(NamedTuple):
    """What was measured of one variant."""

    seconds_median: float
    seconds_min: float
    cpu_seconds_median: float
    peak_bytes_above_base: int
    seconds: list[float]


def summarise(timings: list[Timing], peak: int) -> Result:
    wall = [timing.wall for timing in timings]
    cpu = statistics.median(timing.cpu for timing in timings)
    return Result(statistics.median(wall), min(wall), cpu, peak, wall)


def print_results(results: dict[str, Result], ratios: dict[str, float], options: Options, console: Console) -> None:
    title = f"One step, {options.dtype}, {options.tokens} tokens, {torch.get_num_threads()} threads"
    table = Table("variant", "median s", "min s", "CPU s", "peak MiB above weights", title=title)
    for name, row in results.items():
        times = (f"{seconds:.3f}" for seconds in row[:3])
        table.add_row(name, *times, f"{row.peak_bytes_above_base / 2**20:,.0f}")
    console.print(table)
    console.print("dense / mxd:", ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))


def compare(options: Options, console: Console) -> None:
    described = machine()
    # First, because on Linux a process inherits the peak of the one that started it.
    peaks = {name: peak_memory_in_own_process(name) for name in VARIANTS}
    layer, batch = build(options)
    errors = require_agreement(layer, batch, options)
    steps = {name: make(copy.deepcopy(layer), batch, options) for name, make in VARIANTS.items()}
    timings = measure(steps, options.rounds)
    results = {name: summarise(timings[name], peaks[name]) for name in VARIANTS}
    ours, dense = results["mxd"], results["dense"]
    rounds = [theirs / mine for mine, theirs in zip(ours.seconds, dense.seconds, strict=True)]
    ratios = {
        "median of rounds": statistics.median(rounds),
        "medians": dense.seconds_median / ours.seconds_median,
        "minima": dense.seconds_min / ours.seconds_min,
        "CPU time": dense.cpu_seconds_median / ours.cpu_seconds_median,
        "peak memory": dense.peak_bytes_above_base / ours.peak_bytes_above_base,
    }
    print_results(results, ratios, options, console)
    console.print(described)
    if options.json is not None:
        settings = {key: value for key, value in asdict(options).items() if key not in ("json", "profile", "memory_of")}
        report = {
            "machine": described,
            "options": settings,
            "relative_errors": errors,
            "dense_over_mxd": ratios,
            "results": {name: result._asdict() for name, result in results.items()},
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        print_peak_memory(options, options.memory_of)
    elif options.profile:
        print_profile(options, Console())
    else:
        compare(options, Console())


if __name__ == "__main__":
    main(tyro.cli(Options))
