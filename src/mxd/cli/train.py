"""`mxd train`: sparse layers for the MLPs of a language model."""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mxd.runs.metrics_log import MetricsSink, TensorBoardSink, WandbSink
from mxd.runs.run import is_finished, is_run
from mxd.training.config import TrainConfig
from mxd.training.decompose import Plan, decompose, make_plan
from mxd.training.train import TrainingInterrupted


def train(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    out: Path,
    resume: bool = False,
    dry_run: bool = False,
    snapshot_every: float = 600.0,
    tensorboard: bool = False,
    wandb: str | None = None,
) -> None:
    """Train sparse layers that can replace MLPs of a language model.

    Every layer, kind, k and seed that is asked for is one student; all learn in one pass over the model.

    Args:
        config: What to train, on what, and how.
        out: Folder of the run; it must not exist, unless resuming.
        resume: Continue the run in --out; bit for bit what it would have been uninterrupted.
        dry_run: Check everything and print what would be trained, its memory and its data; write nothing.
        snapshot_every: Seconds between two snapshots.
        tensorboard: Also log to RUN/tensorboard (pip install 'mxd[tensorboard]').
        wandb: Also log to this Weights & Biases project (pip install 'mxd[wandb]').
    """
    if is_run(out) and not resume and not dry_run:
        raise ValueError(f"{out} exists; pass --resume to continue it or name another --out.")
    console = Console(stderr=True)
    plan = make_plan(config)
    _show(plan, console)
    if dry_run:
        return
    if is_run(out) and is_finished(out):
        console.print(f"{out} is finished already.")
    sinks: list[MetricsSink] = [TensorBoardSink(out / "tensorboard", first_step=0)] if tensorboard else []
    if wandb is not None:
        run_name = out.resolve().name
        configuration = plan.description()
        sinks.append(
            WandbSink(project=wandb, folder=out, configuration=configuration, name=run_name, identity=run_name)
        )
    try:
        decompose(plan, out, resume=resume, snapshot_every=snapshot_every, sinks=sinks)
    except TrainingInterrupted as error:
        raise TrainingInterrupted(f"stopped by {error}; go on with: mxd {' '.join(_resuming(sys.argv[1:]))}") from error
    finally:
        for sink in sinks:
            sink.close()
    console.print(f"Wrote {len(plan.students)} layers to {out}/layers. Next: mxd evaluate {out}")


def _resuming(arguments: list[str]) -> list[str]:
    return arguments if "--resume" in arguments else [*arguments, "--resume"]


def _show(plan: Plan, console: Console) -> None:
    table = Table(title=f"{plan.language_model.id} on {plan.text.name}", title_justify="left", box=None, pad_edge=False)
    for heading in ("layer", "student", "latents", "k", "parameters", "learning rate"):
        table.add_column(heading, justify="left" if heading == "student" else "right")
    for student in plan.students:
        network = student.network
        cells = [str(student.layer), student.id, f"{network.num_latents:,}", str(network.k), f"{student.parameters:,}"]
        table.add_row(*cells, f"{student.lr:.2g}")
    console.print(table)
    epochs = plan.tokens.epochs_for(plan.config.tokens)
    passes = "streamed" if epochs is None else f"{epochs:.2f} epochs of the text"
    memory = (12 * sum(student.parameters for student in plan.students) + plan.buffer_bytes) / 2**30
    console.print(
        f"{plan.steps:,} steps, {plan.config.tokens:,} tokens ({passes}); {plan.resources.device}, "
        f"{plan.resources.precision}, {plan.resources.threads} threads; students and shuffle buffer take "
        f"{memory:.2f} GiB beside the model."
    )
