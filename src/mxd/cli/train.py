"""`mxd train`: sparse layers for the MLPs of a language model."""

import hashlib
import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mxd.runs.metrics_log import TensorBoardSink, WandbSink
from mxd.runs.run import is_finished, is_run, read_configuration, reopen_run
from mxd.training.config import TrainConfig
from mxd.training.decompose import MAY_DIFFER, Plan, decompose, make_plan
from mxd.training.streams import announcement
from mxd.training.train import SinkOpener, TrainingInterrupted


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
    if not snapshot_every >= 0:
        raise ValueError(f"snapshot-every must be a number of seconds, at least 0; got {snapshot_every}.")
    if not dry_run:
        _require_place(out, resume)
    for package, is_wanted in {"tensorboard": tensorboard, "wandb": wandb is not None}.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{package} needs the package {package}; run pip install 'mxd[{package}]'.")
    # Square brackets in the name of a file are no markup.
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    plan = make_plan(config, stored=read_configuration(out) if resume and is_run(out) else None)
    if resume and is_run(out) and not dry_run:
        # Checked again when training begins; here, so that a refusal is one sentence and nothing else.
        reopen_run(out, plan.description(), ignore=MAY_DIFFER)
    _show(plan, console)
    if dry_run:
        return
    was_finished = is_run(out) and is_finished(out)
    try:
        decompose(plan, out, resume=resume, snapshot_every=snapshot_every, sinks=_sinks(plan, out, tensorboard, wandb))
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        command = shlex.join(["mxd", *_resuming(sys.argv[1:])])
        raise TrainingInterrupted(f"stopped by {str(error) or 'SIGINT'}; go on with: {command}") from error
    if was_finished:
        console.print(f"{out} is finished already; nothing was changed.", soft_wrap=True)
        return
    console.print(f"Wrote {len(plan.students)} layers to {out}/layers. Next: mxd evaluate {out}", soft_wrap=True)


def _require_place(out: Path, resume: bool) -> None:
    """Check that a run can be made or continued here, before the model is loaded."""
    if is_run(out):
        if not resume:
            raise ValueError(f"{out} exists; pass --resume to continue it or name another --out.")
        return
    if out.exists() and not (out.is_dir() and all(entry.name.startswith(".") for entry in out.iterdir())):
        raise ValueError(f"{out} must be a new or an empty folder, or a run; it is something else; name another --out.")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"{out} must be where a folder can be made; {parent} is none to write in; name another --out.")


def _sinks(plan: Plan, out: Path, tensorboard: bool, wandb: str | None) -> list[SinkOpener]:
    sinks: list[SinkOpener] = []
    if tensorboard:
        sinks.append(lambda first_step: TensorBoardSink(out / "tensorboard", first_step=first_step))
    if wandb is not None:
        # Folders of the same name are different runs.
        identity = hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
        project, name, configuration = wandb, out.resolve().name, plan.description()
        sinks.append(
            lambda _: WandbSink(project=project, folder=out, configuration=configuration, name=name, identity=identity)
        )
    return sinks


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
    if plan.text.is_local and next(plan.text.documents(held_out=True), None) is None:
        console.print(
            f"{plan.text.name} has so few documents that none is held out: mxd evaluate will need other text (--text)."
        )
    epochs = plan.tokens.epochs_for(plan.config.tokens)
    passes = "streamed" if epochs is None else f"{epochs:.2f} epochs of the text"
    memory = (16 * sum(student.parameters for student in plan.students) + plan.buffer_bytes) / 2**30
    console.print(
        f"{plan.steps:,} steps, {plan.config.tokens:,} tokens ({passes}); {plan.resources.device}, "
        f"{plan.resources.precision}, {plan.resources.threads} threads; students and shuffle buffer take "
        f"{memory:.2f} GiB beside the model."
    )
    if plan.cache is not None:
        console.print(f"{announcement(plan.cache)}.")
