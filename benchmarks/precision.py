r"""Whether training in bfloat16 ends where training in float32 does.

    python benchmarks/precision.py --model stories260K --text tinystories_2MB_cased.txt --layer 2 --k 16 --seeds 4 \
        --name precision_stories260K_cpu
    python benchmarks/precision.py --seeds 4 --name precision_bundled_cpu           # layer 3 of the bundled model
    python benchmarks/precision.py --tokens 160K --out benchmarks/out

`mxd train` learns one layer in float32 and in bfloat16, everything else by default, and `mxd evaluate` measures the
students on held-out text. All runs train the same students from the same seeds on the same batches. Seeds differ in
their initialisation alone. The model is a copy with float32 weights, so that bfloat16 means what it does for most
models: its products too run in bfloat16 while students learn. `mxd evaluate` runs it in float32 for all.

What a difference between the precisions means is said by a control: float32 once more with torch's own kernels
(`MXD_KERNELS=torch`), which add up the same products in another order. Where they are what float32 uses anyway, the
control differs in nothing.

With `--runs DIR` the runs are kept there, and those that are finished are not repeated.

The final loss is the mean over the last tenth of the lines of `metrics.jsonl`, each itself a mean over the 20 steps
since the line before.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, cast

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from harness import RESULTS, machine, print_table, write_report
from mxd.bundled import MODEL_NAME
from mxd.cli.numbers import COUNTS
from mxd.data.text import STDLIB
from mxd.evaluation.drawing import GRID, INK, MUTED, add_legend, figure
from mxd.models import load_language_model
from mxd.runs.metrics_log import read_metrics
from mxd.runs.run import read_configuration
from mxd.training.config import TrainConfig
from mxd.training.decompose import make_plan

Setting = Literal["float32", "float32, other sums", "bfloat16"]
SETTINGS: tuple[Setting, ...] = ("float32", "float32, other sums", "bfloat16")
LAST = 0.1
"""Share of the log's lines that the final loss is the mean of."""
WITHIN = 0.01
"""Largest relative difference of the final loss that the claim allows."""
COLOURS = {"float32": "#8a94a3", "float32, other sums": "#d55e00", "bfloat16": "#0072b2"}
SEED_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Train in both precisions, and in one of them twice, and compare where they end."""

    model: str = MODEL_NAME
    """As of mxd train."""
    text: tuple[str, ...] = (STDLIB,)
    """As of mxd train."""
    layer: int = 3
    """Block whose MLP is learnt."""
    tokens: int = 2_000_000
    """Tokens to train on."""
    schedule: Literal["constant", "linear"] = "constant"
    """As of mxd train."""
    warmup_tokens: int | None = None
    """As of mxd train."""
    control: bool = True
    """Whether float32 is trained once more with other sums."""
    kind: str = "mxd"
    """Kind of layer."""
    k: int = 32
    """Latents active for each token."""
    seeds: int = 2
    """Seeds of each precision; at least two, so that they can be compared."""
    first_seed: int = 0
    """The lowest of them."""
    eval_tokens: int | None = None
    """Held-out tokens to evaluate on, at most; as of mxd evaluate if not given."""
    threads: int | None = None
    """As of mxd train."""
    out: Path = RESULTS
    """Folder of the report."""
    runs: Path | None = None
    """Folder that keeps the runs; without it they go."""
    name: str = "precision"
    """Name of the report in results/."""
    note: str = ""
    """What a reader of the results should know, such as what else the machine was doing."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, to say how far seeds lie apart; got {self.seeds}.")

    @property
    def model_name(self) -> str:
        return Path(self.model).name


class Trained(NamedTuple):
    """One student of one run."""

    setting: Setting
    seed: int
    losses: dict[int, float]
    """Loss by the number of tokens."""
    evaluated: Mapping[str, Any]
    """Its row of `mxd evaluate --json`."""

    @property
    def final_loss(self) -> float:
        losses = list(self.losses.values())
        return fmean(losses[-max(1, round(LAST * len(losses))) :])


class Finished(NamedTuple):
    """One run."""

    students: list[Trained]
    train_seconds: float | None
    """None where it was there already and only read."""


def mxd(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "mxd", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"mxd {arguments[0]} must end well; it ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def save_float32_copy(model: str, folder: Path) -> None:
    language_model = load_language_model(model, dtype=torch.float32)
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)


def run(options: Options, setting: Setting, model: Path, out: Path) -> Finished:
    precision, *control = setting.split(",")
    asked: dict[str, object] = {"model": model, "layer": options.layer, "kind": options.kind, "k": options.k}
    asked |= {"tokens": options.tokens, "seed": options.first_seed, "seeds": options.seeds}
    asked |= {"schedule": options.schedule, "precision": precision, "device": "cpu", "out": out}
    optional = {"threads": options.threads, "warmup-tokens": options.warmup_tokens}
    asked |= {name: value for name, value in optional.items() if value is not None}
    seconds = None
    if not (out / "finished.json").exists():
        started = time.perf_counter()
        kernels = {"MXD_KERNELS": "torch"} if control else {}
        given = (part for name, value in asked.items() for part in (f"--{name}", str(value)))
        mxd("train", *given, "--text", *options.text, **kernels)
        seconds = time.perf_counter() - started
    tokens = [] if options.eval_tokens is None else ["--tokens", str(options.eval_tokens)]
    rows = {row["id"]: row for row in json.loads(mxd("evaluate", str(out), "--json", *tokens))}
    lines = cast(list[dict[str, Any]], read_metrics(out / "metrics.jsonl"))
    described = cast(list[dict[str, Any]], read_configuration(out)["students"])
    students = [
        Trained(
            setting,
            student["seed"],
            {line["tokens"]: line["students"][f"{student['layer']}/{student['id']}"]["loss"] for line in lines},
            rows[student["id"]],
        )
        for student in described
    ]
    return Finished(students, seconds)


def automatic_precision(options: Options, model: Path) -> str:
    """Return what `--precision auto` chooses on this machine."""
    config = TrainConfig(
        model=str(model), text=options.text, layer=(options.layer,), tokens=options.tokens, device="cpu"
    )
    return make_plan(config).resources.precision


def relative(one: float, base: float) -> float:
    return one / base - 1


def table(students: Sequence[Trained]) -> list[dict[str, object]]:
    base = {student.seed: student for student in students if student.setting == "float32"}
    return [
        {
            "precision": student.setting,
            "seed": student.seed,
            "final loss": f"{student.final_loss:.5f}",
            "beside float32, same seed": f"{relative(student.final_loss, base[student.seed].final_loss):+.3%}",
            "held-out fvu": f"{student.evaluated['fvu']:.5f}",
            "fvu beside float32": f"{relative(student.evaluated['fvu'], base[student.seed].evaluated['fvu']):+.3%}",
            "CE increase, nats": f"{student.evaluated['ce_increase']:.5f}",
            "loss recovered": f"{student.evaluated['loss_recovered']:.4f}",
        }
        for student in students
    ]


def findings(students: Sequence[Trained]) -> dict[str, float]:
    """Return the relative differences: largest and mean beside float32, and between float32's seeds."""
    by = {(student.setting, student.seed): student for student in students}
    seeds = sorted({student.seed for student in students})
    found: dict[str, float] = {}
    for name, value in {
        "final loss": lambda student: student.final_loss,
        "held-out fvu": lambda student: student.evaluated["fvu"],
        "CE increase": lambda student: student.evaluated["ce_increase"],
    }.items():
        exact = [value(by["float32", seed]) for seed in seeds]
        for setting in dict.fromkeys(student.setting for student in students if student.setting != "float32"):
            pairs = [(value(by[setting, seed]), base) for seed, base in zip(seeds, exact, strict=True)]
            found[f"{name}: {setting} from float32, same seed"] = max(abs(relative(*pair)) for pair in pairs)
            found[f"{name}: mean over seeds, {setting} from float32"] = relative(*map(fmean, zip(*pairs, strict=True)))
        found[f"{name}: seeds apart, float32"] = max(exact) / min(exact) - 1
    return found


def draw(students: Sequence[Trained], title: str, subtitle: str) -> Figure:
    """Draw the losses, and each one's distance from float32's of the same seed."""
    base = {student.seed: student.losses for student in students if student.setting == "float32"}
    with figure(9, 3.9, title=title, subtitle=subtitle, legend=True) as drawing:
        losses, differences = drawing.subplots(1, 2)
        for student in students:
            style = {"color": COLOURS[student.setting], "ls": SEED_LINES[student.seed % len(SEED_LINES)], "lw": 1.4}
            label = f"{student.setting}, seed {student.seed}"
            losses.plot(list(student.losses), list(student.losses.values()), label=label, **style)
            if student.setting != "float32":
                away = [100 * relative(loss, base[student.seed][tokens]) for tokens, loss in student.losses.items()]
                differences.plot(list(student.losses), away, label=label, **style)
        for sign in (-1, 1):
            differences.axhline(sign * 100 * WITHIN, color=INK, lw=0.8, ls=":")
        losses.set_title("Training loss")
        losses.set_yscale("log")
        for formatted in (losses.yaxis.set_major_formatter, losses.yaxis.set_minor_formatter):
            formatted("{x:g}")
        differences.set_title("Its distance from float32's, same seed, in % (dotted: 1)")
        for panel in (losses, differences):
            panel.set_xlabel("tokens", color=MUTED)
            panel.locator_params(axis="x", nbins=6)
            panel.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}M")
            panel.grid(color=GRID)
        add_legend(drawing, [losses])
        return drawing


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    described = machine()
    with tempfile.TemporaryDirectory(prefix="mxd-precision-") as name:
        folder = options.runs or Path(name)
        save_float32_copy(options.model, folder / "model")
        automatic = automatic_precision(options, folder / "model")
        runs = {
            setting: run(options, setting, folder / "model", folder / setting.replace(", ", "-").replace(" ", "-"))
            for setting in SETTINGS
            if options.control or setting != SETTINGS[1]
        }
    students = [student for finished in runs.values() for student in finished.students]
    rows, found = table(students), findings(students)
    ids = f"{options.kind}, k {options.k}, {options.model_name} in float32, layer {options.layer}, "
    ids += f"{options.tokens:,} tokens, {options.schedule} rate"
    print_table(rows, f"float32 and bfloat16: {ids}")
    print_table(
        [{"largest relative difference": name, "": f"{value:.3%}"} for name, value in found.items()], "Findings"
    )
    worst = found["final loss: bfloat16 from float32, same seed"]
    claim = f"bfloat16's final loss is within {WITHIN:.0%} of float32's"
    print(f"{claim}: {'holds' if worst <= WITHIN else 'does not hold'} ({worst:.3%}). auto chooses {automatic} here.")
    Console().print(described)
    write_report(
        options.name,
        f"Where training in float32 and in bfloat16 ends: {ids}",
        rows,
        described,
        {
            "note": options.note,
            "auto": automatic,
            "claim": {"text": claim, "measured": worst, "holds": worst <= WITHIN},
            "findings": found,
            "final_loss": {f"{s.setting}, seed {s.seed}": s.final_loss for s in students},
            "losses": {f"{s.setting}, seed {s.seed}": s.losses for s in students},
            "evaluated": {
                f"{s.setting}, seed {s.seed}": {**s.evaluated, "model": f"{options.model_name}, float32 copy"}
                for s in students
            },
            "train_seconds, one after the other and so no comparison": {
                setting: finished.train_seconds for setting, finished in runs.items()
            },
        },
        draw(students, "Training in float32 and in bfloat16", f"{ids} · {described['cpu']}, {described['date']}"),
        options.out,
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    disable_progress_bar()
    main(tyro.cli(Options, registry=COUNTS))
