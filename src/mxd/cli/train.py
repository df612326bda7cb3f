"""`mxd train`: sparse layers for the MLPs of a language model."""

import argparse
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import tyro
from rich.console import Console
from rich.table import Table

from mxd.atomic import JSON
from mxd.bundled import MODEL_NAME
from mxd.cli.output import go_on_with_resume, notes
from mxd.memory import available_memory
from mxd.quantities import counted, gib
from mxd.recipes import RECIPES, find_recipe
from mxd.runs.faults import TrainingInterrupted
from mxd.runs.metrics_log import TensorBoardSink, WandbSink
from mxd.runs.run import is_finished, is_run, read_configuration, reopen_run, require_command, require_place
from mxd.training.config import TrainConfig, require_evaluable, require_read
from mxd.training.continuing import MAY_DIFFER, is_as_recorded, recorded_config
from mxd.training.decompose import decompose, make_plan
from mxd.training.estimate import (
    EFFICIENCY,
    Workload,
    duration,
    memory,
    operations,
    plan_workload,
    shape_workload,
)
from mxd.training.fitting import require_memory
from mxd.training.plan import Plan
from mxd.training.shapes import ModelShape
from mxd.training.streams import announcement
from mxd.training.train import SinkOpener

LIST = "list"
"""What `--recipe` is given to see the recipes."""
_WRITTEN = "Wrote {0} to {1}/layers. Next: mxd evaluate {1}"
_FINISHED = "{} is finished already; nothing was changed."


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

    Every layer, kind, k, setting and seed that is asked for is one student; all learn in one pass over the model.

    Args:
        config: What to train, on what, and how.
        out: Folder of the run; it must not exist, unless resuming.
        resume: Continue the run in --out; bit for bit what it would have been uninterrupted. What is not given is as
            when the run was begun, and what is given must be, but for the places of model, text and cache.
        dry_run: Check everything and print what would be trained, its memory, time and data; write nothing.
        snapshot_every: Seconds between two snapshots.
        tensorboard: Also log to RUN/tensorboard (pip install 'mxd[tensorboard]').
        wandb: Also log to this Weights & Biases project (pip install 'mxd[wandb]').
    """
    if not snapshot_every >= 0:
        raise ValueError(f"snapshot-every must be a number of seconds, at least 0; got {snapshot_every}.")
    if not dry_run:
        require_place(out, resume)
    _require_packages({"tensorboard": tensorboard, "wandb": wandb is not None})
    stored = _stored(config, out, resume)
    console = notes()
    if dry_run and (shape := _shape_of_absent_model(config)) is not None:
        _show_from_shape(config, shape, console)
        return
    if stored is not None and not dry_run and is_finished(out) and is_as_recorded(config, stored):
        # Nothing is computed any more, so neither model nor text need be there.
        reopen_run(out, {"config": cast(JSON, asdict(config))}, ignore=MAY_DIFFER)
        console.print(_FINISHED.format(out), soft_wrap=True)
        return
    plan = make_plan(config, stored=stored)
    if stored is not None and not dry_run:
        # Checked again when training begins; here, so that a refusal is one sentence and nothing else.
        reopen_run(out, plan.description(), ignore=MAY_DIFFER)
        if is_finished(out):
            console.print(_FINISHED.format(out), soft_wrap=True)
            return
    workload = plan_workload(plan)
    if not dry_run:
        # Before anything is shown, for the same reason.
        require_memory(workload)
    _show(plan, workload, console)
    if dry_run:
        require_memory(workload)
        return
    try:
        decompose(plan, out, resume=resume, snapshot_every=snapshot_every, sinks=_sinks(plan, out, tensorboard, wandb))
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        raise go_on_with_resume(error) from error
    console.print(_WRITTEN.format(counted(len(plan.students), "layer"), out), soft_wrap=True)


def _stored(config: TrainConfig, out: Path, resume: bool) -> Mapping[str, JSON] | None:
    """Return the run.json of the run that goes on; None for a new run, what was asked of which is then checked."""
    if resume and is_run(out):
        stored = read_configuration(out)
        require_command(stored, "train")
        return stored
    require_read(config, None if config.recipe is None else find_recipe(config.recipe).config())
    require_evaluable(config)
    return None


def _require_packages(wanted: Mapping[str, bool]) -> None:
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{package} needs the package {package}; run pip install 'mxd[{package}]'.")


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


def train_from(recipe: str | None, arguments: Sequence[str] = ()) -> Callable[..., None]:
    """Return `train`, with the values of a recipe or of the run that is to be continued as its defaults.

    Args:
        recipe: Name of the recipe, if there is one.
        arguments: What else is given, of which `--resume` and `--out` name a run.

    Raises:
        ValueError: If there is no recipe of this name, or the run cannot be continued.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume", action="store_true")
    for option in ("--out", "--model"):
        parser.add_argument(option)
    try:
        given = parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError:
        # Whoever reads all arguments says what is wrong.
        return train
    if given.resume and given.out is not None and is_run(Path(given.out)):
        return functools.partial(train, config=recorded_config(read_configuration(Path(given.out))))
    is_lone = given.out is not None and given.model is None and recipe is None and "--help" not in arguments
    if given.resume and is_lone:
        raise ValueError(
            f"out must be the folder of a run to resume it without other options; {given.out} is none; check the path, "
            "or give --model and the others to begin it."
        )
    return train if recipe is None else functools.partial(train, config=find_recipe(recipe).config())


def recipe_named(arguments: Sequence[str]) -> str | None:
    """Return what stands after `--recipe`, before anything else of the arguments is understood."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    try:
        return parser.parse_known_args(arguments)[0].recipe
    except argparse.ArgumentError:
        # Nothing stands there; whoever reads all arguments says so.
        return None


def show_recipes() -> None:
    """Print a table of all recipes."""
    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "model", "layer", "tokens"):
        table.add_column(heading, no_wrap=True)
    for name, recipe in RECIPES.items():
        config = recipe.config()
        table.add_row(name, config.model, " ".join(map(str, config.layers)), f"{config.tokens:,}")
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print("Every option given beside --recipe replaces the recipe's value; add --help to see them all.")


def _shape_of_absent_model(config: TrainConfig) -> ModelShape | None:
    """Return the shape that a recipe knows of its own model, if that is not on this disk."""
    if config.recipe is None:
        return None
    recipe = find_recipe(config.recipe)
    if config.model != recipe.config().model or config.model == MODEL_NAME or Path(config.model).expanduser().is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    weights = ("model.safetensors", "model.safetensors.index.json")
    found = (try_to_load_from_cache(config.model, name, revision=config.revision) for name in weights)
    return None if any(isinstance(path, str) for path in found) else recipe.shape


def _show_from_shape(config: TrainConfig, shape: ModelShape, console: Console) -> None:
    workload = shape_workload(config, shape)
    _show_students(f"{config.model} on {', '.join(config.text)}", workload, console)
    console.print(
        f"{_steps(config)}. {config.model} is not on this disk: its sizes are those that the "
        f"recipe {config.recipe} knows, and neither model nor text was read."
    )
    _show_estimates(workload, console)
    require_memory(workload)


def _steps(config: TrainConfig) -> str:
    """Return how many steps and tokens were asked for, and how many tokens are trained on where these are more."""
    trained = config.steps * config.batch_tokens
    more = "" if trained == config.tokens else f", which whole steps of {config.batch_tokens:,} make {trained:,}"
    return f"{config.steps:,} steps, {config.tokens:,} tokens{more}"


def _show(plan: Plan, workload: Workload, console: Console) -> None:
    _show_students(f"{plan.language_model.id} on {plan.text.name}", workload, console)
    if (counts := plan.text.counts) is not None:
        documents = counted(counts.documents, "document")
        needed = (
            ""
            if counts.held_out
            else ": so few documents that none is held out; mxd evaluate will need other text (--text)"
        )
        console.print(f"{plan.text.name}: {documents}, {counts.held_out:,} held out{needed}.")
    epochs = plan.tokens.epochs_for(plan.config.tokens)
    passes = "streamed" if epochs is None else f"{epochs:.2f} epochs of the text"
    console.print(f"{_steps(plan.config)} ({passes}).")
    _show_estimates(workload, console)
    if plan.cache is not None:
        console.print(f"{announcement(plan.cache)}.")


def _show_students(title: str, workload: Workload, console: Console) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("layer", "student", "latents", "k", "parameters", "learning rate"):
        table.add_column(heading, justify="left" if heading == "student" else "right")
    for student, cost in zip(workload.students, workload.costs, strict=True):
        network = student.network
        cells = [str(student.layer), student.id, f"{network.num_latents:,}", str(network.k), f"{cost.parameters:,}"]
        table.add_row(*cells, f"{student.lr:.2g}")
    console.print(table)


def _show_estimates(workload: Workload, console: Console) -> None:
    needed, resources = memory(workload), workload.resources
    parameters = sum(cost.parameters for cost in workload.costs)
    console.print(
        f"{parameters:,} parameters in {counted(len(workload.students), 'student')}; {resources.device}, "
        f"{resources.precision}, {counted(resources.threads, 'thread')}."
    )
    available = available_memory(resources.device)
    there = (
        "how much is available cannot be told here, so nothing is refused"
        if available is None
        else f"{gib(available)} are available"
    )
    console.print(
        f"Memory, estimated: {gib(needed.total)} = weights {gib(needed.weights)}, AdamW's moments "
        f"{gib(needed.moments)}, gradients and activations of a step {gib(needed.step)}, shuffle buffer "
        f"{gib(needed.buffer)}, model {gib(needed.model)}{' (loaded)' if workload.model_is_loaded else ''} and its "
        f"pass {gib(needed.model_pass)}; {there}."
    )
    flops, taken = operations(workload), duration(workload)
    console.print(
        f"Time, estimated: {_span(taken.seconds)} of training; a token takes {flops.model / 1e6:,.4g} MFLOP in the "
        f"model's pass and {flops.training / 1e6:,.4g} in the students ({flops.forward / 1e6:,.4g} forward), at "
        f"{EFFICIENCY:g} of the {taken.speed / 1e9:,.3g} GFLOP/s that a matrix product reached just now."
    )


def _span(seconds: float) -> str:
    """Return a time for people, in two digits: more would promise too much."""
    units = {"days": 86_400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, size in units.items() if seconds >= 2 * size), "seconds")
    return f"{float(f'{seconds / units[unit]:.2g}'):,.10g} {unit}"
