"""What a training step costs as the number of experts, k, the width and the number of students grow.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --sweep students --model-dtype float32

A step is `Student.step` on a mixture of decoders (`variants.py`), in float32. All sizes of a sweep take turns, round
after round, so that a machine that is busy is busy for all of them.

* experts: beside each step, torch's product of the batch with the gate's weight, into memory that is there already, and
  the product by blocks of rows that mxd uses itself. All are fitted with a line; the ratios of the slopes say what one
  more expert costs beside its share of those products.
* k and width: the step alone; the hidden width is four times the width.
* students: n students on one layer of a random model of GPT-2's shape, whose forward pass to that layer they share,
  and the same students with a forward pass for each, as n runs of one would have it. Both are real loops; with no
  student at all, it is the forward pass that is timed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2Config

from harness import RESULTS, Timing, machine, measure, median_wall, print_table, write_report
from mxd.evaluation.drawing import GRID, MUTED, figure
from mxd.kernels.products import product_by_rows
from mxd.kernels.routing import BLOCK_BYTES
from mxd.layers import MixtureOfDecoders
from mxd.models import mlp_pairs
from mxd.training.student import Student, StudentConfig
from variants import LEARNING_RATE, Dtype, Shape, Step, make_batch, make_layer, mxd_step

SweepName = Literal["experts", "k", "width", "students"]
CONTEXT = 128
"""Tokens of one context of the model, as in training."""
COLOURS = {
    "step": "#0072b2",
    "gate product": "#8a94a3",
    "product by rows": "#009e73",
    "together": "#0072b2",
    "apart": "#d55e00",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Time steps at many sizes; where a size is not swept, the shape is that of GPT-2's MLP at the paper's size."""

    sweep: tuple[SweepName, ...] = ("experts", "k", "width", "students")
    """What to vary; the report holds the sweeps of this run only."""
    tokens: int = 4096
    """Tokens in the batch; a multiple of 128."""
    d_model: int = 768
    """Width of input and output where it is not swept."""
    num_experts: int = 21_490
    """Number of experts where it is not swept."""
    k: int = 32
    """Experts active for each token where they are not swept."""
    model_dtype: Dtype = "bfloat16"
    """Type of the model whose forward pass the students share."""
    rounds: int = 5
    """Timed steps of each size."""
    threads: int | None = None
    """Threads of torch; its own choice if not given."""
    quick: bool = False
    """Run everything at small sizes, to see that it works."""
    out: Path = RESULTS
    """Folder of the report."""
    note: str = ""
    """What a reader of the results should know, such as what else the machine was doing."""

    @property
    def shape(self) -> Shape:
        return _shape(self.tokens, self.d_model, self.num_experts, self.k)


class Sizes(NamedTuple):
    """The sizes of each sweep, and the layer of the model that students learn."""

    experts: tuple[int, ...] = tuple(2**power for power in range(11, 18))
    k: tuple[int, ...] = (8, 16, 32, 64, 128)
    width: tuple[int, ...] = (128, 256, 512, 768, 1024)
    students: tuple[int, ...] = (1, 2, 4, 12)
    layer: int = 8


QUICK = Sizes(experts=(1024, 2048, 4096), k=(8, 32), width=(64, 128), students=(1, 2), layer=1)
Timings = dict[tuple[int, str], list[Timing]]
"""Of each size and series."""


def _shape(tokens: int, d_model: int, num_experts: int, k: int) -> Shape:
    return Shape(kind="mxd", tokens=tokens, d_model=d_model, d_hidden=4 * d_model, num_latents=num_experts, k=k)


def timed(calls: Mapping[tuple[int, str], Callable[[], object]], rounds: int) -> Timings:
    named = {f"{series}, {size}": (size, series) for size, series in calls}
    found = measure({name: calls[key] for name, key in named.items()}, rounds)
    return {key: found[name] for name, key in named.items()}


def step_of(shape: Shape) -> Step:
    return mxd_step(make_layer(shape), make_batch(shape), "float32")


def sweep_experts(options: Options, sizes: Sizes) -> Timings:
    x = make_batch(options.shape).x
    scores = x.new_empty(len(x) * max(sizes.experts))
    calls: dict[tuple[int, str], Step] = {}
    for size in sizes.experts:
        layer = make_layer(replace(options.shape, num_latents=size))
        assert isinstance(layer, MixtureOfDecoders)
        calls[size, "step"] = mxd_step(layer, make_batch(options.shape), "float32")
        calls[size, "gate product"] = _gate_product(x, layer.W_gate.detach(), scores)
        calls[size, "product by rows"] = partial(_product_by_rows, x, layer)
    return timed(calls, options.rounds)


def _gate_product(x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor) -> Step:
    # Fresh memory for this many scores would cost the system a good part of the product's own time.
    out = scores[: len(x) * weight.shape[1]].view(len(x), -1)
    return lambda: torch.mm(x, weight, out=out)


@torch.no_grad()
def _product_by_rows(x: torch.Tensor, layer: MixtureOfDecoders) -> None:
    at_once = max(1, BLOCK_BYTES["cpu"] // (layer.W_gate.shape[1] * x.element_size()))
    for _ in product_by_rows(x, layer.W_gate, layer.b_gate, at_once):
        pass


def sweep_k(options: Options, sizes: Sizes) -> Timings:
    return timed({(k, "step"): step_of(replace(options.shape, k=k)) for k in sizes.k}, options.rounds)


def sweep_width(options: Options, sizes: Sizes) -> Timings:
    shapes = {width: _shape(options.tokens, width, options.num_experts, options.k) for width in sizes.width}
    return timed({(width, "step"): step_of(shape) for width, shape in shapes.items()}, options.rounds)


def sweep_students(options: Options, sizes: Sizes) -> Timings:
    torch.manual_seed(0)
    heads = max(1, options.d_model // 64)
    config = GPT2Config(n_embd=options.d_model, n_head=heads, n_layer=sizes.layer + 1)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.model_dtype)).eval()
    ids = torch.randint(config.vocab_size, (options.tokens // CONTEXT, CONTEXT))
    is_content = torch.ones(ids.numel(), dtype=torch.bool)
    students = [
        Student(f"seed{seed}", sizes.layer, make_layer(options.shape, seed), StudentConfig(lr=LEARNING_RATE))
        for seed in range(max(sizes.students))
    ]

    def learn(chosen: Sequence[Student]) -> None:
        pair = mlp_pairs(model, ids, [sizes.layer])[sizes.layer]
        x, target = (tensor.flatten(0, 1).float() for tensor in pair)
        for student in chosen:
            student.step(0, x, target, is_content, lr_factor=1.0, autocast=None)

    def together(number: int) -> Step:
        return lambda: learn(students[:number])

    def apart(number: int) -> Step:
        return lambda: [learn([student]) for student in students[:number]]

    calls: dict[tuple[int, str], Step] = {(0, "together"): together(0)}
    for number in sizes.students:
        calls[number, "together"], calls[number, "apart"] = together(number), apart(number)
    return timed(calls, options.rounds)


SWEEPS: dict[str, Callable[[Options, Sizes], Timings]] = {
    "experts": sweep_experts,
    "k": sweep_k,
    "width": sweep_width,
    "students": sweep_students,
}


def table(sweep: str, timings: Timings) -> list[dict[str, object]]:
    return [
        {
            "sweep": sweep,
            "size": size,
            "what": series,
            "median s": median_wall(of_one),
            "fastest s": min(timing.wall for timing in of_one),
            "CPU s": median(timing.cpu for timing in of_one),
        }
        for (size, series), of_one in timings.items()
    ]


def line(timings: Timings, series: str) -> tuple[float, float]:
    """Return slope and intercept of the least squares line through the medians."""
    points = {size: median_wall(of_one) for (size, name), of_one in timings.items() if name == series}
    slope, intercept = np.polyfit(list(points), list(points.values()), 1)
    return float(slope), float(intercept)


def findings(measured: Mapping[str, Timings]) -> dict[str, float]:
    """Return the numbers that the sweeps are for."""
    found: dict[str, float] = {}
    if "experts" in measured:
        step = line(measured["experts"], "step")[0]
        found["step, microseconds an expert"] = 1e6 * step
        for series in ("gate product", "product by rows"):
            product = line(measured["experts"], series)[0]
            found[f"{series}, microseconds an expert"] = 1e6 * product
            found[f"slope of the step / slope of the {series}"] = step / product
    timings = measured.get("students", {})
    for number in sorted({size for size, _ in timings if size > 1}):
        rounds = zip(timings[number, "together"], timings[number, "apart"], strict=True)
        found[f"{number} students together / apart"] = median(shared.wall / apart.wall for shared, apart in rounds)
    return found


def draw(measured: Mapping[str, Timings], found: Mapping[str, float], subtitle: str) -> Figure:
    titles = {"experts": "Number of experts", "k": "k, experts active for a token", "width": "Width"}
    titles["students"] = "Students of one layer, forward pass included"
    with figure(11, 3.3 * ((len(measured) + 1) // 2), title="What a training step costs", subtitle=subtitle) as drawing:
        panels = drawing.subplots((len(measured) + 1) // 2, 2 if len(measured) > 1 else 1, squeeze=False).flat
        for panel, (sweep, timings) in zip(panels, measured.items(), strict=False):
            for series in dict.fromkeys(name for _, name in timings):
                draw_series(panel, timings, series)
            panel.set_title(titles[sweep])
            panel.set_ylabel("seconds", color=MUTED)
            panel.set_ylim(bottom=0)
            panel.set_xlim(left=0)
            panel.grid(color=GRID)
            largest = max(size for size, _ in timings)
            if sweep == "experts":
                panel.set_xticks(
                    [share * largest / 4 for share in range(5)],
                    [f"{share * largest // 4096}k" if share else "0" for share in range(5)],
                )
                note = f"slope {found['slope of the step / slope of the gate product']:.2f} of the gate product's"
                panel.text(0.97, 0.06, note, transform=panel.transAxes, ha="right")
            else:
                panel.set_xticks(sorted({size for size, _ in timings}))
            if sweep == "students":
                note = f"{largest} together cost {found[f'{largest} students together / apart']:.2f} × as much as apart"
                panel.text(0.97, 0.06, note, transform=panel.transAxes, ha="right")
            if len({name for _, name in timings}) > 1:
                panel.legend(loc="upper left")
        for panel in panels:
            panel.set_axis_off()
        return drawing


def draw_series(panel: Axes, timings: Timings, series: str) -> None:
    points = {size: of_one for (size, name), of_one in timings.items() if name == series}
    wall = {size: [timing.wall for timing in of_one] for size, of_one in points.items()}
    medians = [median(seconds) for seconds in wall.values()]
    panel.plot(list(wall), medians, "o-", ms=4.5, lw=1.5, color=COLOURS[series], label=series)
    for size, seconds in wall.items():
        panel.plot([size, size], [min(seconds), max(seconds)], color=COLOURS[series], lw=1, zorder=1)


def main(options: Options) -> None:
    sizes = Sizes()
    if options.quick:
        options = replace(options, tokens=512, d_model=128, num_experts=2048, rounds=2)
        sizes = QUICK
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    described = machine()
    measured: dict[str, Timings] = {}
    for sweep in options.sweep:
        measured[sweep] = SWEEPS[sweep](options, sizes)
        print_table(table(sweep, measured[sweep]), f"A training step by {sweep}")
    found = findings(measured)
    if found:
        print_table([{"": name, "value": value} for name, value in found.items()], "Findings")
    Console().print(described)
    shape = options.shape
    fixed = f"width {shape.d_model}, {shape.num_latents:,} experts, k {shape.k}"
    subtitle = f"mxd, float32, {shape.tokens:,} tokens; where not swept: {fixed}"
    hardware = f"{described['cpu']}, threads: {described['threads']}, {described['date']}"
    seconds = {
        sweep: {f"{size} {series}": [timing.wall for timing in of_one] for (size, series), of_one in timings.items()}
        for sweep, timings in measured.items()
    }
    write_report(
        "scaling_cpu",
        f"What a training step costs: {subtitle}",
        [row for sweep, timings in measured.items() for row in table(sweep, timings)],
        described,
        {
            "note": options.note,
            "shape": asdict(shape),
            "model_dtype": options.model_dtype,
            "rounds": options.rounds,
            "findings": found,
            "seconds": seconds,
        },
        draw(measured, found, f"{subtitle} · {hardware}"),
        options.out,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
