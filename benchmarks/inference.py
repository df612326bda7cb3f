"""A replaced model beside the original: reading a prompt, and writing with the key-value cache.

    python benchmarks/inference.py --dtype float32 bfloat16
    python benchmarks/inference.py --quick --out benchmarks/out

The model has GPT-2's shape (124 million parameters) and random weights, which decide no timing. `replace_mlp` puts
sparse layers, each with weights of its own, in the place of one MLP or of all of them; nothing else of the model
changes. All variants of a setting take turns, round after round.

* prefill is one forward pass over the prompts that fills the key-value cache, with the logits of the last token only,
  as `generate` begins.
* decode is `generate`, greedy, with the cache. The clock runs from its first new token to its last, so the prompt's
  pass is not in it.

A decoding step must read every weight that it uses once, whatever the batch, and the keys and values of each text. The
table gives those bytes, and the tokens a second that a machine would write that did nothing but read them at the speed
that this one reads memory with: the best of a sum and of a matrix-vector product, timed in the same run. Rows of a
table that is indexed (an expert's, a latent's) count for k rows a token.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, cast

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, StoppingCriteria, StoppingCriteriaList

from harness import RESULTS, Timing, machine, measure, print_table, write_report
from mxd.evaluation.drawing import GRID, INK, MUTED, figure
from mxd.layers import MixtureOfDecoders, SparseLayer
from mxd.models import find_mlp, replace_mlp
from variants import Dtype, Kind, Shape, make_layer, sized

Phase = Literal["prefill", "decode"]
COLOURS = {"original": "#8a94a3", "mxd": "#0072b2", "shared-transcoder": "#332288", "transcoder": "#d55e00"}
READ_BYTES = 2**30
"""Size of what is read to find out how fast memory is: no cache holds it."""
FLOOR = (
    "bytes that a decoding step must read: the model's weights (of the embeddings only the output's), of each sparse "
    "layer the scores' weights, the dense branch and k table rows a token, and the keys and values of all texts at the "
    "middle of the decoding; floor = batch / (these bytes / the speed of memory)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Time reading and writing with the MLPs of one layer or of all layers replaced."""

    kind: tuple[Kind, ...] = ("mxd", "transcoder")
    """Which sparse layers stand in for the MLPs."""
    dtype: tuple[Dtype, ...] = ("float32",)
    """Types of all weights, the sparse layers' too; one after the other."""
    num_layers: int = 12
    """Blocks of the model."""
    d_model: int = 768
    """Width of the model; a multiple of 64."""
    num_latents: int | None = None
    """Number of experts or latents; what goes with this width if not given: 21,490 (the paper's), or 24,576 for a
    transcoder, or 12,288 and as many hidden units for a shared transcoder."""
    k: int = 32
    """Latents active for each token."""
    layer: int = 8
    """The one layer that is replaced where not all are."""
    prefill_tokens: int = 512
    """Tokens of each prompt that is only read."""
    prefill_batch: tuple[int, ...] = (1, 8)
    """Prompts that are read together."""
    prompt_tokens: int = 64
    """Tokens of each prompt that is continued."""
    new_tokens: int = 32
    """Tokens that are written after the first."""
    decode_batch: tuple[int, ...] = (1, 8, 32)
    """Texts that are written together."""
    rounds: int = 5
    """Timed calls of each."""
    threads: int | None = None
    """Threads of torch; its own choice if not given."""
    quick: bool = False
    """Run everything at small sizes, to see that it works."""
    out: Path = RESULTS
    """Folder of the report."""
    note: str = ""
    """What a reader of the results should know, such as what else the machine was doing."""

    def shape_of(self, kind: Kind) -> Shape:
        shape = Shape(kind=kind, tokens=0, d_model=self.d_model, d_hidden=4 * self.d_model, k=self.k)
        return sized(shape) if self.num_latents is None else replace(shape, num_latents=self.num_latents)


class Setting(NamedTuple):
    """What is timed: the variants of a setting take turns."""

    dtype: Dtype
    phase: Phase
    batch: int

    @property
    def name(self) -> str:
        return f"{self.phase} {self.batch}, {self.dtype}"


class Variant(NamedTuple):
    """What stands in for which MLPs."""

    kind: str
    name: str
    layers: dict[int, SparseLayer]


class Measured(NamedTuple):
    """The seconds of one variant in one setting, and the bytes that a decoding step must read."""

    setting: Setting
    variant: Variant
    tokens: int
    seconds: list[float]
    cpu_seconds: list[float]
    bytes_read: int


class Clock(StoppingCriteria):
    """Notes when each new token is there, and never stops anything."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def make_model(options: Options, dtype: Dtype) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=options.d_model, n_head=options.d_model // 64, n_layer=options.num_layers)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return cast(nn.Module, model).eval().requires_grad_(False)


def make_variants(options: Options, dtype: Dtype) -> list[Variant]:
    variants = [Variant("original", "original", {})]
    for kind in options.kind:
        layers = {
            layer: make_layer(options.shape_of(kind), seed=layer).to(getattr(torch, dtype)).requires_grad_(False)
            for layer in range(options.num_layers)
        }
        one = {options.layer: layers[options.layer]}
        variants += [Variant(kind, f"{kind}, layer {options.layer}", one), Variant(kind, f"{kind}, all layers", layers)]
    return variants


@torch.no_grad()
def prefill(model: nn.Module, variant: Variant, ids: Tensor) -> Tensor:
    with replace_mlp(model, variant.layers):
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


def require_finite(model: nn.Module, variants: Sequence[Variant]) -> None:
    """Check that random layers do not drive the model out of its numbers, whose arithmetic may take another time."""
    for variant in variants:
        if not prefill(model, variant, torch.arange(8)[None]).isfinite().all():
            raise ValueError(f"A model's logits must be finite; with {variant.name} replaced they are not.")


def decode(model: nn.Module, variant: Variant, ids: Tensor, new_tokens: int, seconds: list[float]) -> None:
    clock = Clock()
    # Nothing ends a text early: there is no end token.
    config = GenerationConfig(
        max_new_tokens=new_tokens + 1, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    generate = cast(Callable[..., Tensor], cast(Any, model).generate)
    with replace_mlp(model, variant.layers):
        written = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    if written.shape[1] != ids.shape[1] + new_tokens + 1 or len(clock.times) != new_tokens + 1:
        raise ValueError(f"generate must write {new_tokens + 1} tokens; it wrote {written.shape[1] - ids.shape[1]}.")
    seconds.append(clock.times[-1] - clock.times[0])


def bytes_read(model: nn.Module, variant: Variant, options: Options, batch: int) -> int:
    """Return the bytes that one decoding step must read from memory."""
    parameters = dict(model.named_parameters())
    item = next(iter(parameters.values())).itemsize
    # The output's weight is the token embedding's; of the embeddings proper a step reads a row a token.
    total = sum(weight.nbytes for name, weight in parameters.items() if "wpe" not in name)
    for layer, network in variant.layers.items():
        total -= sum(weight.nbytes for module in find_mlp(model, layer).modules for weight in module.parameters())
        table = network.W_expert if isinstance(network, MixtureOfDecoders) else network.get_parameter("W_dec")
        rows = min(len(table), batch * options.k)
        total += sum(weight.nbytes for weight in network.parameters()) - table.nbytes + rows * table[0].nbytes
    length = options.prompt_tokens + options.new_tokens // 2
    return total + 2 * options.num_layers * batch * length * options.d_model * item


def memory_speed(rounds: int) -> float:
    """Return the bytes a second at which memory can be read."""
    table = torch.ones(READ_BYTES // 4 // 8192, 8192)
    vector = torch.ones(8192)
    timings = measure({"sum": table.sum, "product": lambda: table @ vector}, rounds)
    return table.nbytes / min(timing.wall for of_one in timings.values() for timing in of_one)


def run_setting(setting: Setting, model: nn.Module, variants: Sequence[Variant], options: Options) -> list[Measured]:
    is_decode = setting.phase == "decode"
    length = options.prompt_tokens if is_decode else options.prefill_tokens
    ids = torch.randint(50_000, (setting.batch, length), generator=torch.Generator().manual_seed(1))
    clocked: dict[str, list[float]] = {variant.name: [] for variant in variants}
    calls = {
        variant.name: partial(decode, model, variant, ids, options.new_tokens, clocked[variant.name])
        if is_decode
        else partial(prefill, model, variant, ids)
        for variant in variants
    }
    timings: Mapping[str, Sequence[Timing]] = measure(calls, options.rounds)
    return [
        Measured(
            setting,
            variant,
            setting.batch * (options.new_tokens if is_decode else length),
            clocked[variant.name][-options.rounds :] if is_decode else [t.wall for t in timings[variant.name]],
            [t.cpu for t in timings[variant.name]],
            bytes_read(model, variant, options, setting.batch),
        )
        for variant in variants
    ]


def run_dtype(dtype: Dtype, options: Options) -> list[Measured]:
    model, variants = make_model(options, dtype), make_variants(options, dtype)
    require_finite(model, variants)
    settings = [Setting(dtype, "prefill", batch) for batch in options.prefill_batch]
    settings += [Setting(dtype, "decode", batch) for batch in options.decode_batch]
    measured: list[Measured] = []
    for setting in settings:
        measured += run_setting(setting, model, variants, options)
        print(f"{setting.name}: measured", flush=True)
    return measured


def relative_speed(one: Measured, original: Measured) -> float:
    """Return the median over rounds of a variant's tokens a second over the original's in the same round."""
    return median(base / own for own, base in zip(one.seconds, original.seconds, strict=True))


def table(measured: Sequence[Measured], speed: float) -> list[dict[str, object]]:
    originals = {one.setting: one for one in measured if not one.variant.layers}
    rows: list[dict[str, object]] = []
    for one in measured:
        is_decode = one.setting.phase == "decode"
        floor = one.setting.batch / (one.bytes_read / speed)
        rate = one.tokens / median(one.seconds)
        rows.append(
            {
                "phase": one.setting.phase,
                "dtype": one.setting.dtype,
                "batch": one.setting.batch,
                "MLPs": one.variant.name,
                "tokens/s": rate,
                "slowest": one.tokens / max(one.seconds),
                "fastest": one.tokens / min(one.seconds),
                "of the original": relative_speed(one, originals[one.setting]),
                "MB read a step": round(one.bytes_read / 1e6) if is_decode else "",
                "floor tokens/s": floor if is_decode else "",
                "of the floor": rate / floor if is_decode else "",
            }
        )
    return rows


def draw(rows: Sequence[Mapping[str, object]], subtitle: str) -> Figure:
    """Draw the tokens a second of every variant, a panel for each setting; a pale bar is what memory allows."""
    settings = list(dict.fromkeys((row["dtype"], row["phase"], row["batch"]) for row in rows))
    dtypes = list(dict.fromkeys(dtype for dtype, _, _ in settings))
    columns = len(settings) // len(dtypes)
    variants = len({row["MLPs"] for row in rows})
    height = (0.3 * variants + 0.75) * len(dtypes)
    title = "Reading and writing with replaced MLPs, in tokens per second"
    with figure(2.6 * columns + 1.4, height, title=title, subtitle=subtitle) as drawing:
        panels = drawing.subplots(len(dtypes), columns, sharey=True, squeeze=False).flat
        for panel, setting in zip(panels, settings, strict=True):
            chosen = [row for row in rows if (row["dtype"], row["phase"], row["batch"]) == setting]
            draw_panel(panel, chosen)
            dtype, phase, batch = setting
            panel.set_title(f"{phase}, batch {batch}" + (f", {dtype}" if len(dtypes) > 1 else ""))
        return drawing


def draw_panel(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    panel.grid(axis="x", color=GRID)
    for place, row in enumerate(rows):
        rate, kind = row["tokens/s"], str(row["MLPs"]).split(",")[0]
        if row["phase"] == "decode":
            panel.barh(place, row["floor tokens/s"], height=0.66, color=COLOURS[kind], alpha=0.22)
        panel.barh(place, rate, height=0.66, color=COLOURS[kind])
        panel.plot([row["slowest"], row["fastest"]], [place, place], color=INK, lw=1.1)
        text = f"{rate:,.0f}" + (f"  ({row['of the original']:.2f}×)" if kind != "original" else "")
        panel.annotate(text, (row["fastest"], place), xytext=(5, 0), textcoords="offset points", va="center")
    widest = max(row["fastest"] for row in rows)
    limits = [row["floor tokens/s"] for row in rows if row["phase"] == "decode"]
    panel.set_xlim(0, max(1.55 * widest, *(1.05 * limit for limit in limits), 0))
    panel.set_yticks(range(len(rows)), [str(row["MLPs"]) for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.locator_params(axis="x", nbins=4)
    panel.tick_params(axis="x", labelcolor=MUTED)
    panel.xaxis.set_major_formatter("{x:,.0f}")


def quick(options: Options) -> Options:
    small = {"num_layers": 2, "d_model": 128, "num_latents": 2048, "layer": 1, "rounds": 2, "new_tokens": 8}
    return replace(options, **small, prefill_tokens=64, prompt_tokens=16, decode_batch=(1, 4), prefill_batch=(1, 4))


def main(options: Options) -> None:
    if options.quick:
        options = quick(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    described = machine()
    speed = memory_speed(options.rounds)
    measured = [one for dtype in options.dtype for one in run_dtype(dtype, options)]
    speed = max(speed, memory_speed(options.rounds))
    rows = table(measured, speed)
    sizes = ", ".join(f"{kind} {options.shape_of(kind).num_latents:,}" for kind in options.kind)
    shape = f"GPT-2's shape, {options.num_layers} layers of width {options.d_model}; {sizes} latents, k {options.k}"
    for setting in dict.fromkeys(one.setting for one in measured):
        chosen = [row for row in rows if (row["dtype"], row["phase"], row["batch"]) == (setting.dtype, *setting[1:])]
        shown = [{k: v for k, v in row.items() if v != "" and k not in ("phase", "dtype", "batch")} for row in chosen]
        print_table(shown, setting.name)
    print(f"Memory is read at {speed / 1e9:.1f} GB/s. Of the floor: {FLOOR}.")
    Console().print(described)
    hardware = f"{described['cpu']}, threads: {described['threads']}, {described['date']}"
    write_report(
        "inference_cpu",
        f"Replaced models read and write: {shape}",
        rows,
        described,
        {
            "note": options.note,
            "prefill_tokens": options.prefill_tokens,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
            "memory_gigabytes_per_second": speed / 1e9,
            "floor": FLOOR,
            "seconds": {f"{one.setting.name}, {one.variant.name}": one.seconds for one in measured},
            "cpu_seconds_of_whole_calls": {
                f"{one.setting.name}, {one.variant.name}": one.cpu_seconds for one in measured
            },
        },
        draw(rows, f"{shape} · {hardware}\nin brackets: beside the original; pale: if reading memory alone took time"),
        options.out,
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(tyro.cli(Options))
