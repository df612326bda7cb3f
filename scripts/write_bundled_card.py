r"""Write the model card of the bundled model, and its loss curve, from what its training left behind.

    python scripts/write_bundled_card.py --run build/bundled-model --out src/mxd/bundled/model \
        --hardware "2 CPU cores" --date 2026-11-21

Reads `facts.json`, `metrics.jsonl` and `model/` of the run; writes `README.md` and `loss.svg`. Every number of the
card comes from these files or from the constants of `train_bundled_model.py`.
"""

import argparse
import datetime
import json
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from safetensors import safe_open

from train_bundled_model import (
    BATCH,
    CONTEXT,
    DECAY_SHARE,
    PEAK_RATE,
    SEED,
    SHARED_LINES,
    TWICE_FROM_EPOCH,
    WARMUP_STEPS,
)

SMOOTHED_RECORDS = 25
"""Logged training losses whose mean is shown."""
TABLE_ROWS = 8
LOSS_TICKS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)

INK, MUTED, GRID, TRAINING, HELD_OUT = "#1f2328", "#667080", "#e3e6ea", "#0072b2", "#d55e00"
SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "mxd",
}


class HeldOutPoint(NamedTuple):
    """The held-out loss at one moment of training."""

    tokens: int
    training_loss: float
    nats_per_token: float
    bits_per_byte: float


def read_records(path: Path) -> list[dict[str, float]]:
    """Return the log in the order of its steps; where a resumed run logged a step again, its last record counts."""
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours, at most `SMOOTHED_RECORDS` in all, fewer near both ends."""
    reach = [min(n, SMOOTHED_RECORDS // 2) for n in range(len(values))]
    return [float(np.mean(values[n - reach[n] : n + reach[n] + 1])) for n in range(len(values))]


def held_out_points(records: Sequence[dict[str, float]], facts: dict[str, Any]) -> list[HeldOutPoint]:
    """Return the held-out losses of the log, and last the exported model's."""
    training = smoothed([record["loss"] for record in records])
    points = [
        HeldOutPoint(tokens_after(record, facts), loss, record["nats_per_token"], record["bits_per_byte"])
        for record, loss in zip(records, training, strict=True)
        if "nats_per_token" in record
    ]
    final = facts["held_out"]
    last = HeldOutPoint(facts["tokens"], training[-1], final["nats_per_token"], final["bits_per_byte"])
    return [*(point for point in points if point.tokens < last.tokens), last]


def tokens_after(record: dict[str, float], facts: dict[str, Any]) -> int:
    """Return the tokens trained on when this record was written."""
    return int(record["step"] + 1) * (facts["tokens"] // facts["steps"])


def draw_losses(
    records: Sequence[dict[str, float]], points: Sequence[HeldOutPoint], facts: dict[str, Any], path: Path
) -> None:
    """Write the picture of training and held-out loss against tokens, on a logarithmic axis of losses."""
    with rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        tokens = [tokens_after(record, facts) for record in records]
        axes.plot(tokens, smoothed([record["loss"] for record in records]), color=TRAINING, linewidth=1.2)
        axes.plot(
            [point.tokens for point in points],
            [point.nats_per_token for point in points],
            color=HELD_OUT,
            linewidth=1.2,
            marker="o",
            markersize=3,
        )
        _label_axes(axes)
        axes.set_xlim(0, facts["tokens"])
        name_lines(axes, ("training", TRAINING), ("held out", HELD_OUT))
        axes.set_title("Loss of the bundled model (nats/token)", loc="left", fontsize=10.5, color=INK, pad=10)
        axes.set_xlabel("training tokens", color=INK)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def name_lines(axes: Axes, *lines: tuple[str, str]) -> None:
    """Write the lines' names in their colours at the top right, below each other."""
    for row, (name, colour) in enumerate(lines):
        axes.text(0.99, 0.97 - 0.085 * row, name, transform=axes.transAxes, ha="right", va="top", color=colour)


def _label_axes(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in LOSS_TICKS if low <= tick <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}M" if value else "0"))
    axes.tick_params(which="minor", length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def loss_table(points: Sequence[HeldOutPoint]) -> str:
    """Return a Markdown table of `TABLE_ROWS` moments, evenly spread, or of all where there are fewer."""
    chosen = sorted({round(n) for n in np.linspace(0, len(points) - 1, TABLE_ROWS)})
    rows = ["| training tokens | training loss | held-out loss | held-out bits/byte |", "|---:|---:|---:|---:|"]
    for n in chosen:
        point = points[n]
        rows.append(
            f"| {point.tokens:,} | {point.training_loss:.3f} | {point.nats_per_token:.3f} | {point.bits_per_byte:.3f} |"
        )
    return "\n".join(rows)


def count_parameters(weights: Path) -> int:
    """Return the number of entries of all tensors of a safetensors file."""
    with safe_open(weights, framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def card(run: Path, facts: dict[str, Any], points: Sequence[HeldOutPoint], hardware: str, date: str) -> str:
    """Return the text of the model card."""
    config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    held_out_modules = json.loads((run / "model" / "held_out_modules.json").read_text(encoding="utf-8"))
    epochs = facts["tokens"] / facts["epoch_tokens"]
    warmup_tokens = WARMUP_STEPS * BATCH * CONTEXT
    return reflowed(f"""---
license: mit
language:
- code
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- python
- mechanistic-interpretability
---

# The language model that mxd ships

A small GPT-2 of Python source, so that `mxd` can be tried, tested and demonstrated at once, without a download. In
mxd its name is `bundled`.

## Model

Architecture GPT-2 with {config["n_layer"]} blocks of width {config["n_embd"]} and {config["n_head"]} heads, hidden
width {config.get("n_inner") or 4 * config["n_embd"]}, activation `{config["activation_function"]}`, tied embeddings,
context of {config["n_positions"]} tokens: {count_parameters(run / "model" / "model.safetensors"):,} parameters, stored
in bfloat16. The tokenizer is a byte-level BPE of {config["vocab_size"]:,} tokens, trained on the same text; its one
special token, `<|endoftext|>`, begins every context and ends every document.

## Data

{facts["training_documents"]:,} documents, {facts["epoch_tokens"]:,} tokens: the modules of the standard library of
Python {facts["python"]} and, where the training machine's Python has them, the library's own tests. A document is one
module, whole.

Left out were

- {len(held_out_modules)} modules, kept for evaluation: those that a hash of their path names, listed in
  `held_out_modules.json`; mxd trains nothing on them;
- near copies of these: {_copies(facts["left_out_as_copies"])}
- `encodings` and `pydoc_data` (generated tables), `lib2to3` (grammar fixtures), installed packages, and modules that
  a build or a distribution writes, so that the text is nearly the same on every machine.

## Training

{facts["tokens"]:,} tokens ({epochs:.1f} epochs) in {facts["steps"]:,} steps of {BATCH} contexts of {CONTEXT} tokens;
each epoch shuffles the documents and cuts them anew, and from epoch {TWICE_FROM_EPOCH + 1} on the library's modules
come twice in it, its tests once. That rule and the number of tokens were settled while the held-out loss was being
watched, so it is a little flattered. Muon for the blocks' matrices, AdamW for embeddings, norms and
biases, both with peak learning rate {PEAK_RATE:g}: linear warm-up over {WARMUP_STEPS} steps ({warmup_tokens:,}
tokens), constant, then a linear fall to nothing over the last {DECAY_SHARE:.0%} of the steps. Gradients are clipped to
norm 1; there is no dropout; matrix products run under bfloat16 autocast and weights stay float32. Seed {SEED}.

Hardware: {hardware}. PyTorch {facts["torch"]}. Date: {date}. The whole recipe is `scripts/train_bundled_model.py` in
mxd's repository.

![Training and held-out loss against training tokens](loss.svg)

{loss_table(points)}

Losses are in nats per token. Training loss is the mean of up to {SMOOTHED_RECORDS} logged batches around each moment.

## Held-out loss

**{facts["held_out"]["nats_per_token"]:.4f} nats/token, {facts["held_out"]["bits_per_byte"]:.4f} bits/byte**

Measured on the weights as they are stored: {facts["held_out_tokens"]:,} tokens ({facts["held_out_bytes"]:,} bytes) of
the {len(held_out_modules)} held-out modules, and one end-of-text a module; every token is scored once, in contexts of
{CONTEXT}. Tests of a held-out module that copy little of it were trained on.

## Limits

- It has read Python source and nothing else: it is no model of English, nor of another programming language.
- It sees {config["n_positions"]} tokens, and it is small. It is there to be taken apart. Do not use it to write code
  that anyone would run.
- It read its training text about {epochs:.0f} times, and a model can repeat what it was trained on: passages that it
  generates may be Python's own source, which is under the PSF licence (`LICENSE.PSF`, `NOTICE`).
- What is found in it, such as how many experts an MLP needs, need not hold in larger models of other text.

## Licence

Weights, tokenizer and this card: MIT, as mxd. See `NOTICE` for the text it was trained on.
""")


def reflowed(markdown: str) -> str:
    """Return the text with its paragraphs and list items filled anew, after numbers took their places."""
    header, body = markdown.split("\n---\n", 1)
    blocks = [
        block if block.startswith(("#", "|", "!")) else "\n".join(map(_filled, re.split(r"\n(?=- )", block)))
        for block in body.strip().split("\n\n")
    ]
    return f"{header}\n---\n\n" + "\n\n".join(blocks) + "\n"


def _filled(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        " ".join(text.split()), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _copies(paths: Sequence[str]) -> str:
    if not paths:
        return "none was found;"
    return (
        f"{len(paths)} documents of whose long lines more than {SHARED_LINES:.0%} stand in held-out modules, or which "
        f"another document repeats: {', '.join(f'`{path}`' for path in paths)};"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the finished training")
    parser.add_argument("--out", type=Path, required=True, help="folder for README.md and loss.svg")
    parser.add_argument("--hardware", required=True, help="what it was trained on, in words")
    parser.add_argument("--date", type=datetime.date.fromisoformat, required=True, help="day of training, YYYY-MM-DD")
    args = parser.parse_args()
    facts = json.loads((args.run / "facts.json").read_text(encoding="utf-8"))
    records = read_records(args.run / "metrics.jsonl")
    points = held_out_points(records, facts)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_losses(records, points, facts, args.out / "loss.svg")
    text = card(args.run, facts, points, args.hardware, args.date.isoformat())
    (args.out / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
