"""How fast `mxd train` is beside its parts: the model's pass and the student's step.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --small --tokens 160K --out benchmarks/out

The command runs as a user runs it, in a process of its own, once with the model running for every batch, once filling
an empty `--cache`, and once from that cache, complete. Its tokens a second are those of its `metrics.jsonl`, from the
first line to the last, so that starting, loading and saving are not in it; the whole command's seconds stand beside.

The parts are timed in this process right before and after each command, and with what the command itself
computes with: `mxd.models.mlp_pairs` on the first contexts of the same stream, and `Student.step` on their activations,
shuffled. A command whose model runs should take their sum; one that reads a cache, the step alone.

The shuffle buffer holds as many batches as lie between two lines of the log, so that the same number of runs of the
model lies between any two; with the default of 32 batches, a short log would have one too many or too few.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, NamedTuple, cast

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from transformers.utils.logging import disable_progress_bar

from harness import RESULTS, machine, measure, median_wall, print_table, write_report
from mxd.bundled import MODEL_NAME, bundled_model_folder
from mxd.cli.numbers import COUNTS
from mxd.data.tokens import content_positions, special_tokens
from mxd.evaluation.drawing import GRID, INK, MUTED, figure
from mxd.models import MlpPair, mlp_pairs
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import read_configuration
from mxd.training.config import TrainConfig
from mxd.training.decompose import make_plan
from mxd.training.plan import Plan
from mxd.training.streams import FORWARD_TOKENS
from mxd.training.student import Student, StudentConfig
from mxd.training.train import LOG_EVERY

Activations = Literal["on the fly", "filling the cache", "from the cache"]
CASES: tuple[Activations, ...] = ("on the fly", "filling the cache", "from the cache")
BATCH_TOKENS = 4096
BLOCK_TOKENS = LOG_EVERY * BATCH_TOKENS
PASSES = 4
"""Runs of the model whose activations the timed steps learn from, over and over."""
WITHIN = 0.1
"""How far below the step's own tokens a second a command may stay that reads its activations."""
MODEL_COLOUR, STEP_COLOUR = "#8a94a3", "#0072b2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Time `mxd train` beside the sum of its parts, on a random model of GPT-2's shape."""

    small: bool = False
    """Take the bundled model, of width 256, instead."""
    layer: int | None = None
    """Block whose MLP is learnt; 8, or 3 of the bundled model, if not given."""
    kind: str = "mxd"
    """Kind of layer."""
    k: int = 32
    """Latents active for each token."""
    tokens: int = 400_000
    """Tokens of each command, rounded up to whole shuffle buffers (81,920), and at least two of them."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """As of mxd train."""
    rounds: int = 1
    """How often all commands run."""
    part_rounds: int = 5
    """Timed calls of each part, before and after each command."""
    threads: int | None = None
    """As of mxd train."""
    work: Path | None = None
    """Where to keep model, runs and caches (at GPT-2's shape 6.2 GB per million tokens), in a folder that is removed at
    the end; the system's place for such folders if not given."""
    out: Path = RESULTS
    """Folder of the report."""
    note: str = ""
    """What a reader of the results should know, such as what else the machine was doing."""

    @property
    def chosen_layer(self) -> int:
        return self.layer if self.layer is not None else 3 if self.small else 8

    @property
    def whole_tokens(self) -> int:
        return max(2, -(-self.tokens // BLOCK_TOKENS)) * BLOCK_TOKENS


class Command(NamedTuple):
    """What a command took."""

    tokens_per_second: float
    wall: float


class PartSeconds(NamedTuple):
    """Seconds a token."""

    model: float
    step: float


class Result(NamedTuple):
    """A command and its parts."""

    activations: Activations
    command: Command
    parts: PartSeconds

    @property
    def expected(self) -> float:
        """Seconds a token if nothing but the parts took time."""
        return self.parts.step if self.activations == "from the cache" else sum(self.parts)

    @property
    def share(self) -> float:
        """The command's tokens a second over those of its parts."""
        return self.command.tokens_per_second * self.expected


class Parts:
    """The model's pass and the student's step, as a command would do them."""

    def __init__(self, plan: Plan) -> None:
        (described,) = plan.students
        self.plan = plan
        self.student = Student(described.id, described.layer, described.build().train(), StudentConfig(lr=described.lr))
        self.steps = 0
        model = cast(torch.nn.Module, plan.language_model.model)
        self.model = model
        own = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.casts = plan.resources.model_precision != own
        contexts = FORWARD_TOKENS // plan.config.context
        passes = plan.tokens.take(PASSES * contexts).split(contexts)
        self.passes = cycle(passes)
        pairs = [self.pairs(ids) for ids in passes]
        order = torch.randperm(PASSES * FORWARD_TOKENS, generator=torch.Generator().manual_seed(0))
        x, target = (torch.cat(parts).flatten(0, 1)[order] for parts in zip(*pairs, strict=True))
        is_content = content_positions(torch.cat(passes), special_tokens(plan.language_model.tokenizer)).flatten()
        batches = zip(*(rows.split(BATCH_TOKENS) for rows in (x, target, is_content[order])), strict=True)
        self.batches = cycle(list(batches))
        for _ in range(2 * PASSES):
            self.step()

    def pairs(self, ids: Tensor) -> MlpPair:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.casts):
            return mlp_pairs(self.model, ids, [self.student.layer])[self.student.layer]

    def model_pass(self) -> None:
        self.pairs(next(self.passes))

    def step(self) -> None:
        x, target, is_content = next(self.batches)
        factor = self.plan.schedule.factor(self.steps)
        autocast = self.plan.resources.autocast
        self.student.step(self.steps, x.float(), target.float(), is_content, lr_factor=factor, autocast=autocast)
        self.steps += 1

    def seconds(self, rounds: int) -> PartSeconds:
        # Not in turn: a step that follows a step finds more of its weights in the cache, as in training.
        timings = measure({"model": self.model_pass}, rounds) | measure({"step": self.step}, rounds)
        return PartSeconds(median_wall(timings["model"]) / FORWARD_TOKENS, median_wall(timings["step"]) / BATCH_TOKENS)


def save_model(folder: Path) -> None:
    """Write a random model of GPT-2's shape with the bundled model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_folder())
    torch.manual_seed(0)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tokenizer), **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_config(options: Options, model: str) -> TrainConfig:
    return TrainConfig(
        model=model,
        text=("stdlib",),
        layer=(options.chosen_layer,),
        tokens=options.whole_tokens,
        kind=(options.kind,),
        k=(options.k,),
        batch_tokens=BATCH_TOKENS,
        buffer_tokens=BLOCK_TOKENS,
        precision=options.precision,
        device="cpu",
        threads=options.threads,
    )


def arguments(config: TrainConfig) -> list[str]:
    named = {
        "model": config.model,
        "text": config.text[0],
        "layer": config.layers[0],
        "tokens": config.tokens,
        "kind": config.kind[0],
        "k": config.k[0],
        "batch-tokens": config.batch_tokens,
        "buffer-tokens": config.buffer_tokens,
        "precision": config.precision,
        "device": config.device,
    }
    if config.threads is not None:
        named["threads"] = config.threads
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


def run_command(plan: Plan, out: Path, cache: Path | None) -> Command:
    command = [sys.executable, "-m", "mxd", "train", *arguments(plan.config), "--out", str(out)]
    command += [] if cache is None else ["--cache", str(cache)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"mxd train must end well; it ended with status {done.returncode}:\n{done.stderr}")
    resources = cast(Mapping[str, Any], read_configuration(out)["resources"])
    for name in ("precision", "model_precision", "kernels", "threads"):
        mine = getattr(plan.resources, name)
        if resources[name] != mine:
            raise ValueError(
                f"The parts must be timed as the command computes; its {name} is {resources[name]}, not {mine}."
            )
    lines = cast(list[dict[str, Any]], read_metrics(out / "metrics.jsonl"))
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    return Command((lines[-1]["tokens"] - lines[0]["tokens"]) / seconds, wall)


def run_all(options: Options, folder: Path) -> tuple[Plan, list[Result]]:
    model = MODEL_NAME
    if not options.small:
        model = str(folder / "model")
        save_model(folder / "model")
    plan = make_plan(train_config(options, model))
    parts = Parts(plan)
    results: list[Result] = []
    before = parts.seconds(options.part_rounds)
    for round_ in range(options.rounds):
        cache = folder / f"cache{round_}"
        for case in CASES:
            run = folder / f"{case.replace(' ', '-')}{round_}"
            command = run_command(plan, run, None if case == "on the fly" else cache)
            after = parts.seconds(options.part_rounds)
            results.append(Result(case, command, PartSeconds(*map(fmean, zip(before, after, strict=True)))))
            print(f"{case}: {command.tokens_per_second:,.0f} tokens/s in steady state", flush=True)
            shutil.rmtree(run)
            before = after
        shutil.rmtree(cache)
    return plan, results


def table(results: Sequence[Result]) -> list[dict[str, object]]:
    """Return medians over the rounds, a row for each case."""
    rows: list[dict[str, object]] = []
    for case in CASES:
        own = [result for result in results if result.activations == case]
        rows.append(
            {
                "activations": case,
                "tokens/s": median(result.command.tokens_per_second for result in own),
                "of its parts": median(result.share for result in own),
                "parts tokens/s": median(1 / result.expected for result in own),
                "model pass tokens/s": median(1 / result.parts.model for result in own),
                "student step tokens/s": median(1 / result.parts.step for result in own),
                "whole command s": median(result.command.wall for result in own),
            }
        )
    return rows


def draw(results: Sequence[Result], title: str, subtitle: str) -> Figure:
    """Draw each command's microseconds a token above those of its parts."""
    with figure(8, 2.7, title=title, subtitle=subtitle) as drawing:
        panel = drawing.subplots()
        ticks: dict[float, str] = {}
        for place, case in enumerate(CASES):
            own = [result for result in results if result.activations == case]
            taken = [1e6 / result.command.tokens_per_second for result in own]
            model, step = (1e6 * median(result.parts[part] for result in own) for part in (0, 1))
            ran = case != "from the cache"
            panel.barh(place - 0.19, median(taken), height=0.34, color=INK)
            panel.plot([min(taken), max(taken)], [place - 0.19] * 2, color=MUTED, lw=1.1)
            panel.barh(place + 0.19, step, height=0.34, color=STEP_COLOUR)
            if ran:
                panel.barh(place + 0.19, model, left=step, height=0.34, color=MODEL_COLOUR)
            share = median(result.share for result in own)
            notes = {
                -0.19: (
                    max(taken),
                    f"mxd train: {1e6 / median(taken):,.0f} tokens/s, {share:.0%} of what its parts do",
                ),
                0.19: (step + model * ran, "student's step" + (" + model's pass" if ran else "")),
            }
            for offset, (end, text) in notes.items():
                panel.annotate(text, (end, place + offset), xytext=(5, 0), textcoords="offset points", va="center")
            ticks[place] = case
        panel.set_yticks(list(ticks), list(ticks.values()))
        panel.invert_yaxis()
        panel.set_xlim(0, 2.1 * panel.dataLim.x1)
        panel.set_xlabel("microseconds a token", color=MUTED)
        panel.grid(axis="x", color=GRID)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        return drawing


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    described = machine()
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mxd-end-to-end-", dir=options.work) as name:
        # Tokens are kept here too: this process makes them, so that no command does.
        os.environ["MXD_CACHE"] = str(Path(name) / "tokens")
        plan, results = run_all(options, Path(name))
    described["threads"] = plan.resources.threads
    rows = table(results)
    model = "the bundled model" if options.small else "GPT-2's shape"
    (student,) = plan.students
    title = f"mxd train beside its parts: {model}, layer {options.chosen_layer}, {student.id}"
    print_table(rows, title)
    share = float(str(rows[-1]["of its parts"]))
    verdict = "holds" if share >= 1 - WITHIN else "does not hold"
    claim = f"from the cache, tokens/s is within {WITHIN:.0%} of the step's own"
    print(f"{claim}: {verdict} ({share:.3f}).")
    Console().print(described)
    resources, latents = plan.resources, student.network.num_latents
    types = f"students in {resources.precision}, model in {resources.model_precision}"
    subtitle = f"{latents:,} latents, {types}, {options.whole_tokens:,} tokens"
    hardware = f"{described['cpu']}, threads: {described['threads']}, {described['date']}"
    write_report(
        "end_to_end_small_cpu" if options.small else "end_to_end_cpu",
        f"{title}, {subtitle}",
        rows,
        described,
        {
            "note": options.note,
            "precision": resources.precision,
            "model_precision": resources.model_precision,
            "kernels": resources.kernels,
            "tokens": options.whole_tokens,
            "buffer_tokens": BLOCK_TOKENS,
            "rounds": options.rounds,
            "claim": {"text": claim, "measured": share, "holds": verdict == "holds"},
            "measured": [
                {
                    "activations": result.activations,
                    "tokens_per_second": result.command.tokens_per_second,
                    "whole_command_seconds": result.command.wall,
                    "model_pass_seconds_a_token": result.parts.model,
                    "student_step_seconds_a_token": result.parts.step,
                }
                for result in results
            ],
        },
        draw(results, title, f"{subtitle} · {hardware}"),
        options.out,
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    disable_progress_bar()
    main(tyro.cli(Options, registry=COUNTS))
