"""One training step: mxd's, the same mathematics written densely, the bare products, and other libraries'.

    python benchmarks/train_step.py --dtype float32 bfloat16
    python benchmarks/train_step.py --kind shared-transcoder --dtype float32 bfloat16
    python benchmarks/train_step.py --kind transcoder
    python benchmarks/train_step.py --profile

`variants.py` says what each variant does. Before anything is timed, loss and gradients of `mxd` and `dense` must agree.
Rounds are interleaved, so that a machine that is busy is busy for all, and memory is measured in a process of its own
for each: the most that two steps take above what is there when the weights and the batch are, less the bytes that
gradients and AdamW's two moments must have.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import tyro
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function

from agreement import Agreement, agreement
from harness import (
    RESULTS,
    Timing,
    machine,
    measure,
    median_wall,
    number_from_own_process,
    peak_bytes,
    print_table,
    write_report,
)
from mxd.evaluation.drawing import GRID, INK, MUTED, figure
from variants import (
    COLOURS,
    OTHER_COLOUR,
    PRODUCTS,
    VARIANTS,
    Dtype,
    Kind,
    Shape,
    is_installed,
    make_batch,
    make_layer,
    sized,
)

MEMORY = "peak RSS of two steps in a process of its own, above weights and batch, less gradients and AdamW's moments"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Time one training step; the shape is that of GPT-2's MLP at the paper's size."""

    kind: Kind = "mxd"
    """Which layer learns; the other libraries have transcoders and autoencoders only."""
    tokens: int = 4096
    """Tokens in the batch."""
    d_model: int = 768
    """Width of input and output."""
    d_hidden: int = 3072
    """Number of dense hidden units; a transcoder has none, a shared transcoder more unless its latents are given."""
    num_latents: int | None = None
    """Number of experts or latents; what goes with this shape if not given: 21,490 (the paper's), or 24,576 for a
    transcoder, or 12,288 and as many hidden units for a shared transcoder."""
    k: int = 32
    """Latents active for each token."""
    dtype: tuple[Dtype, ...] = ("float32",)
    """Types of the products, all timed in one run: bfloat16 means autocast with float32 weights."""
    rounds: int = 9
    """Timed steps of each variant."""
    threads: int | None = None
    """Threads of torch; its own choice if not given."""
    out: Path = RESULTS
    """Folder of the report."""
    note: str = ""
    """What a reader of the results should know, such as what else the machine was doing."""
    profile: bool = False
    """Print where mxd's step spends its time, and stop."""
    memory_of: tuple[str, Dtype] | None = None
    """Print one variant's peak memory in bytes, and stop; the script calls itself with this."""

    @property
    def shape(self) -> Shape:
        sizes = {"tokens": self.tokens, "d_model": self.d_model, "d_hidden": self.d_hidden, "k": self.k}
        shape = Shape(kind=self.kind, **sizes)
        return sized(shape) if self.num_latents is None else replace(shape, num_latents=self.num_latents)


class Run(NamedTuple):
    """One variant in one type: a row of the table."""

    variant: str
    dtype: Dtype

    @property
    def name(self) -> str:
        return f"{self.variant}, {self.dtype}"


def planned_runs(options: Options) -> list[Run]:
    """Return what is timed, and say what is left out; other libraries run in float32 only."""
    runs = [
        Run(name, dtype)
        for name, variant in VARIANTS[options.kind].items()
        for dtype in options.dtype
        if is_installed(variant) and (variant.package is None or dtype == "float32")
    ]
    for name, variant in VARIANTS[options.kind].items():
        if not is_installed(variant):
            print(f'{name} is left out, since its package is not installed: pip install -e ".[bench]"')
    if any(run.variant.startswith("sae-lens") for run in runs):
        print("sae-lens trains no transcoder: its rows are steps of a TopK autoencoder of the same size.")
    return runs


def require_agreement(options: Options, runs: Sequence[Run]) -> Agreement:
    """Return how far loss and gradients are from the dense ones in float32.

    Raises:
        ValueError: If one of mxd's, or sparsify's output, is off by more than rounding explains.
    """
    found = agreement(options.shape, options.dtype, with_sparsify=Run("sparsify", "float32") in runs)
    if found.complaints:
        raise ValueError(found.complaints[0])
    return found


def resident_bytes() -> int:
    """Return the memory that this process has now; building weights may have taken more for a moment."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else peak_bytes()


def print_peak_memory(options: Options, run: Run) -> None:
    variant = VARIANTS[options.kind][run.variant]
    tiny = Shape(kind=options.kind, tokens=64, d_model=16, d_hidden=32, num_latents=64, k=4)
    # What a first step imports, such as torch's compiler with the first optimiser, is no memory of a step.
    variant.step(variant.weights(tiny), make_batch(tiny), run.dtype)()
    batch, weights = make_batch(options.shape), variant.weights(options.shape)
    if not variant.trains:
        weights = weights.to(getattr(torch, run.dtype))
    base = resident_bytes()
    step = variant.step(weights, batch, run.dtype)
    for _ in range(2):
        step()
    gradients_and_moments = 3 * sum(weight.nbytes for weight in weights.parameters()) if variant.trains else 0
    print(peak_bytes() - base - gradients_and_moments)


def print_profile(options: Options, dtype: Dtype) -> None:
    """Run mxd's step under torch's profiler, and print the share of its parts, then of the operators in them."""
    layer, batch = make_layer(options.shape), make_batch(options.shape)
    step = VARIANTS[options.kind]["mxd"].step(layer, batch, dtype)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(options.rounds):
            with record_function("step"):
                step()
    events = profiler.key_averages()
    scale = 1e6 * options.rounds
    (whole,) = (event.cpu_time_total / scale for event in events if event.key == "step")
    # Autograd functions of ours are called like this, and the optimiser's step.
    parts = {
        event.key: event.cpu_time_total / scale
        for event in events
        if re.fullmatch(r"_[A-Z]\w*|Optimizer\.step#.*", event.key)
    }
    parts["everything else"] = whole - sum(parts.values())
    operators = {event.key: event.self_cpu_time_total / scale for event in events if event.key != "step"}
    for what, seconds in {"parts": parts, "operators, without what they call": operators}.items():
        names = sorted(seconds, key=seconds.__getitem__, reverse=True)[:12]
        rows = [{"": name, "seconds": seconds[name], "share": f"{seconds[name] / whole:.1%}"} for name in names]
        print_table(rows, f"mxd's step, {dtype}: {what}")


def ratio(timings: Mapping[str, Sequence[Timing]], above: Run, below: Run) -> float | None:
    """Return the median over rounds of the ratio within a round; none where one of the two was not timed."""
    if above.name not in timings or below.name not in timings:
        return None
    pairs = zip(timings[above.name], timings[below.name], strict=True)
    return median(slow.wall / fast.wall for slow, fast in pairs)


def ratios(timings: Mapping[str, Sequence[Timing]], options: Options) -> dict[str, float]:
    asked: dict[str, tuple[Run, Run]] = {}
    for dtype in options.dtype:
        mine = Run("mxd", dtype)
        for products in PRODUCTS:
            asked[f"mxd / {products}, both {dtype}"] = mine, Run(products, dtype)
        for dense in dict.fromkeys(("float32", dtype)):
            asked[f"dense, {dense} / mxd, {dtype}"] = Run("dense", dense), mine
    mine = Run("mxd", "float32")
    asked |= {
        f"mxd / {name}, both float32": (mine, Run(name, "float32"))
        for name, variant in VARIANTS[options.kind].items()
        if variant.package is not None
    }
    found = {name: ratio(timings, *runs) for name, runs in asked.items()}
    return {name: value for name, value in found.items() if value is not None}


def draw(rows: Sequence[Mapping[str, object]], title: str, subtitle: str) -> Figure:
    """Draw time and memory as bars side by side; a lighter bar is bfloat16, a thin line spans the rounds."""
    with figure(10, 0.42 * len(rows) + 0.7, title=title, subtitle=subtitle) as drawing:
        seconds, memory = drawing.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        for place, row in enumerate(rows):
            fastest, middle, slowest, mebibytes = (
                float(str(row[name])) for name in ("fastest s", "median s", "slowest s", "step MiB")
            )
            share = 0.5 if row["dtype"] == "bfloat16" else 1.0
            colour = [1 - share * (1 - part) for part in to_rgb(COLOURS.get(str(row["variant"]), OTHER_COLOUR))]
            for panel, length, end, text in (
                (seconds, middle, slowest, f"{middle:.2f} s"),
                (memory, mebibytes, mebibytes, f"{mebibytes:,.0f} MiB"),
            ):
                panel.barh(place, length, height=0.66, color=colour)
                panel.annotate(text, (end, place), xytext=(5, 0), textcoords="offset points", va="center")
            seconds.plot([fastest, slowest], [place, place], color=INK, lw=1.1)
        seconds.set_yticks(range(len(rows)), [f"{row['variant']}, {row['dtype']}" for row in rows])
        seconds.invert_yaxis()
        seconds.set_title("Time of a step (median; the line spans all rounds)")
        memory.set_title("Memory of a step, above weights,\ngradients and optimiser state")
        for panel, unit, room in ((seconds, "seconds", 1.14), (memory, "MiB", 1.28)):
            panel.set_xlim(0, room * panel.dataLim.x1)
            panel.set_xlabel(unit, color=MUTED)
            panel.grid(axis="x", color=GRID)
            panel.tick_params(axis="y", length=0)
            panel.spines["left"].set_visible(False)
        return drawing


def compare(options: Options) -> None:
    described, runs, shape = machine(), planned_runs(options), options.shape
    # First, because on Linux a process inherits the peak of the one that started it.
    peaks = {run.name: number_from_own_process("--memory-of", *run) for run in runs}
    errors = require_agreement(options, runs).errors
    batch = make_batch(shape)
    steps = {
        run.name: variant.step(variant.weights(shape), batch, run.dtype)
        for run in runs
        for variant in [VARIANTS[options.kind][run.variant]]
    }
    timings = measure(steps, options.rounds)
    rows: list[dict[str, object]] = [
        {
            "variant": run.variant,
            "dtype": run.dtype,
            "median s": median_wall(timings[run.name]),
            "fastest s": min(timing.wall for timing in timings[run.name]),
            "slowest s": max(timing.wall for timing in timings[run.name]),
            "CPU s": median(timing.cpu for timing in timings[run.name]),
            "step MiB": round(peaks[run.name] / 2**20),
        }
        for run in runs
    ]
    found = ratios(timings, options)
    latents = "experts" if options.kind == "mxd" else "latents"
    title = f"One training step: {options.kind}, {shape.tokens:,} tokens"
    subtitle = f"width {shape.d_model}, {shape.num_latents:,} {latents}, k {shape.k}"
    if options.kind == "shared-transcoder":
        subtitle = f"width {shape.d_model}, {shape.num_latents:,} latents, {shape.d_hidden:,} hidden units, k {shape.k}"
    print_table(rows, f"{title}, {subtitle}")
    print(f"step MiB: {MEMORY}.")
    print_table([{"ratio": name, "median of rounds": value} for name, value in found.items()], "Ratios")
    Console().print(described)
    hardware = f"{described['cpu']}, threads: {described['threads']}, {described['date']}"
    write_report(
        f"train_step_{options.kind}_cpu",
        f"{title}, {subtitle}",
        rows,
        described,
        {
            "note": options.note,
            "shape": asdict(shape),
            "rounds": options.rounds,
            "step MiB": MEMORY,
            "ratios": found,
            "relative_errors": errors,
            "seconds": {name: [timing.wall for timing in of_one] for name, of_one in timings.items()},
        },
        draw(rows, title, f"{subtitle} · {hardware}"),
        options.out,
    )


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        print_peak_memory(options, Run(*options.memory_of))
    elif options.profile:
        for dtype in options.dtype:
            print_profile(replace(options, dtype=(dtype,)), dtype)
    else:
        compare(options)


if __name__ == "__main__":
    main(tyro.cli(Options))
