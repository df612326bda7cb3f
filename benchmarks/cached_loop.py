"""What a run that reads a complete activation cache spends a batch on, beside its student's step.

    python benchmarks/cached_loop.py
    python benchmarks/cached_loop.py --tokens 40K --threads 1 --name trial

A model of one block of GPT-2's width (random weights) on the standard library's text; one run fills the cache, a second
one reads it. Clocks around the parts of the second run's loop add up: the student's step, filling the shuffle buffer
(and in it the checksums of shards that this process opens for the first time) and gathering a batch from it. The rest
is the loop itself. The student's step is timed alone too, right after, as often on one batch: on random numbers with
fresh weights, on the run's last batch with fresh weights, and on that batch with the weights that the run ended with.
What separates the first from the second is the data, the second from the third what was learnt. Medians leave out the
steps in which the machine did something else; means do not.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch
import tyro
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from harness import machine, print_table, write_report
from mxd.bundled import MODEL_NAME
from mxd.cli.numbers import COUNTS
from mxd.data.activation_cache import ActivationCache
from mxd.data.activations import ActivationStream
from mxd.layers import MixtureOfDecoders, MixtureOfDecodersConfig
from mxd.models import load_language_model
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from mxd.training.student import Student, StudentConfig

WIDTH = 768


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Time the parts of training from a cache."""

    tokens: int = 245_760
    """Tokens of each run."""
    threads: int | None = None
    """As of mxd train."""
    name: str = "cached_loop_cpu"
    """Name of the report in results/."""


class Clock:
    """Adds up the seconds inside methods that it wraps."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = {}
        """Seconds of each call of each part."""
        self.last: dict[str, tuple[object, ...]] = {}
        """Arguments of the last call of each part."""

    def wrap(self, owner: type, method: str, name: str) -> None:
        inner: Callable[..., object] = getattr(owner, method)

        @functools.wraps(inner)
        def timed(*args: object, **options: object) -> object:
            started = time.perf_counter()
            result = inner(*args, **options)
            self.last[name] = args
            self.calls.setdefault(name, []).append(time.perf_counter() - started)
            return result

        setattr(owner, method, timed)


def save_model(folder: Path) -> None:
    tokenizer = load_language_model(MODEL_NAME, dtype=torch.float32).tokenizer
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=WIDTH, n_head=12, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fresh_student() -> Student:
    network = MixtureOfDecoders(
        MixtureOfDecodersConfig(d_in=WIDTH, d_hidden=4 * WIDTH, d_out=WIDTH, num_experts=21_504, k=32)
    )
    return Student("alone", 0, network, StudentConfig(lr=1e-4))


def step_alone(student: Student, x: Tensor, target: Tensor, rounds: int) -> list[float]:
    """Return the seconds of steps on one batch that stays where it is, but for the first."""
    is_content, seconds = torch.ones(len(x), dtype=torch.bool), list[float]()
    for step in range(rounds + 1):
        started = time.perf_counter()
        student.step(step, x, target, is_content, lr_factor=1.0, autocast=torch.bfloat16)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def steps_alone(last: tuple[object, ...], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of steps alone, nearer to the run's own from one sort to the next."""
    trained, _, x, target = last[:4]
    assert isinstance(trained, Student)
    assert isinstance(x, Tensor)
    assert isinstance(target, Tensor)
    return {
        "the step alone: random numbers, fresh weights": step_alone(
            fresh_student(), *torch.randn(2, *x.shape), rounds=rounds
        ),
        "the step alone: the last batch, fresh weights": step_alone(fresh_student(), x, target, rounds=rounds),
        "the step alone: the last batch, the run's weights": step_alone(trained, x, target, rounds=rounds),
    }


def main(options: Options) -> None:
    described = machine()
    with tempfile.TemporaryDirectory(prefix="mxd-cached-loop-") as name:
        folder = Path(name)
        save_model(folder / "model")
        config = TrainConfig(
            model=str(folder / "model"),
            text=("stdlib",),
            layer=(0,),
            kind=("mxd",),
            tokens=options.tokens,
            precision="bfloat16",
            cache=str(folder / "cache"),
            threads=options.threads,
        )
        decompose(make_plan(config), folder / "filling")
        plan, clock = make_plan(config), Clock()
        for owner, method, part in (
            (Student, "step", "student's step"),
            (ActivationStream, "__next__", "next batch"),
            (ActivationStream, "_fill", "filling the buffer"),
            (ActivationCache, "_checksum", "checksums"),
        ):
            clock.wrap(owner, method, part)
        started = time.perf_counter()
        decompose(plan, folder / "reading")
        whole = time.perf_counter() - started
    spent = {name: sum(calls) for name, calls in clock.calls.items()}
    steps = clock.calls["student's step"]
    parts = {
        "student's step": spent["student's step"],
        "checksums": spent["checksums"],
        "copying into the buffer": spent["filling the buffer"] - spent["checksums"],
        "gathering batches": spent["next batch"] - spent["filling the buffer"],
        "all else, saving the layer included": whole - spent["student's step"] - spent["next batch"],
    }
    rows: list[dict[str, object]] = [
        {"part": part, "ms a batch": 1000 * seconds / plan.steps, "share": seconds / whole}
        for part, seconds in parts.items()
    ]
    series = {"the run's steps after the first": steps[1:]}
    series |= steps_alone(clock.last["student's step"], rounds=len(steps) - 1)
    rows += [
        {"part": f"({name}: {what})", "ms a batch": 1000 * of_all(seconds), "share": ""}
        for name, seconds in series.items()
        for what, of_all in (("median", median), ("mean", fmean))
    ]
    print_table(rows, f"Training from a cache, {plan.steps} batches of 4,096 tokens")
    title = f"What a batch from a cache takes: width {WIDTH}, products in bfloat16, {plan.steps} batches"
    details = {"prefetch": plan.resources.prefetch, "ms": {name: [1000 * s for s in of] for name, of in series.items()}}
    write_report(options.name, title, rows, described, details)


if __name__ == "__main__":
    main(tyro.cli(Options, registry=COUNTS))
