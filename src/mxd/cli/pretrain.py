"""`mxd pretrain`: a model with multilinear MLPs, from scratch."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mxd.atomic import JSON
from mxd.cli.output import go_on_with_resume, notes, print_json
from mxd.pretraining.config import ImageConfig, LanguageConfig, PretrainConfig
from mxd.pretraining.recipes import RECIPES, find_recipe
from mxd.pretraining.run import MAY_DIFFER, MODEL_FOLDER, PretrainPlan, finished_result, make_plan, run_plan
from mxd.quantities import counted
from mxd.runs.faults import TrainingInterrupted
from mxd.runs.run import is_run, read_configuration, reopen_run, require_place

DEFAULT_RECIPE = "stdlib-cp"


def pretrain_language(
    config: Annotated[LanguageConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    snapshot_every: float = 300.0,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Train a language model from scratch whose MLPs are multilinear mixtures of experts.

    The recipe sets every option, and those given beside it replace its values; `--recipe list` shows the recipes, and
    those of images have options of their own: `mxd pretrain --recipe mnist-cp --help`. The default is stdlib-cp.

    Args:
        config: What to train, on what, and how.
        out: Folder of the run; it must not exist, unless resuming.
        resume: Continue the run in --out; bit for bit what it would have been uninterrupted.
        dry_run: Read the data, build the model and print its sizes; train and write nothing.
        snapshot_every: Seconds between two snapshots.
        json_: Print the result as JSON.
    """
    _pretrain(config, out, resume, dry_run, snapshot_every, json_)


def pretrain_images(
    config: Annotated[ImageConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    snapshot_every: float = 300.0,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Train an MLP-Mixer from scratch whose MLPs are multilinear mixtures of experts.

    The recipe sets every option, and those given beside it replace its values; `--recipe list` shows the recipes.

    Args:
        config: What to train, on what, and how.
        out: Folder of the run; it must not exist, unless resuming.
        resume: Continue the run in --out; bit for bit what it would have been uninterrupted.
        dry_run: Read the data, build the model and print its sizes; train and write nothing.
        snapshot_every: Seconds between two snapshots.
        json_: Print the result as JSON.
    """
    _pretrain(config, out, resume, dry_run, snapshot_every, json_)


def pretrain_from(recipe: str | None) -> Callable[..., None]:
    """Return the command with the values of a recipe as its defaults.

    Raises:
        ValueError: If there is no recipe of this name.
    """
    config = find_recipe(recipe or DEFAULT_RECIPE)
    if isinstance(config, LanguageConfig):
        return functools.partial(pretrain_language, config=config)
    return functools.partial(pretrain_images, config=config)


def show_pretraining_recipes() -> None:
    """Print a table of all recipes."""
    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "model", "data", "experts"):
        # A name that is cut could not be typed: where a terminal is narrow, the data goes on in the next line.
        table.add_column(heading, no_wrap=heading != "data", overflow="fold")
    for name in RECIPES:
        config = find_recipe(name)
        if isinstance(config, LanguageConfig):
            model, data = (
                f"GPT-2, {config.num_layers} × {config.d_model}",
                f"{' '.join(config.text)}, {config.tokens:,} tokens",
            )
        else:
            model = f"MLP-Mixer, {config.mixer.num_blocks} × {config.mixer.d_model}"
            data = f"{config.images}, {config.epochs:g} epoch{'' if config.epochs == 1 else 's'}"
        experts = [] if config.mlp.kind == "dense" else [" × ".join(map(str, config.mlp.num_experts))]
        table.add_row(name, model, data, " ".join([*experts, config.mlp.kind]))
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print("Every option given beside --recipe replaces the recipe's value; add --help to see them all.")


def _pretrain(
    config: PretrainConfig, out: Path | None, resume: bool, dry_run: bool, snapshot_every: float, as_json: bool
) -> None:
    if not snapshot_every >= 0:
        raise ValueError(f"snapshot-every must be a number of seconds, at least 0; got {snapshot_every}.")
    if out is None and not dry_run:
        raise ValueError("out must name the folder of the run; give --out, or --dry-run to see the sizes alone.")
    console = notes()
    there = out is not None and is_run(out)
    if out is not None and not dry_run:
        require_place(out, resume)
    finished = finished_result(config, out) if out is not None and resume and not dry_run else None
    if finished is not None:
        _show_result(finished, as_json)
        console.print(f"{out} is finished already; nothing was changed.")
        return
    plan = make_plan(config, stored=read_configuration(out) if out is not None and there and resume else None)
    if out is None or dry_run:
        _show(plan, console)
        return
    if there:
        # Checked again when training begins; here, so that a refusal is one sentence and nothing else.
        reopen_run(out, plan.description(), ignore=MAY_DIFFER)
    _show(plan, console)
    try:
        result = run_plan(plan, out, resume=resume, snapshot_every=snapshot_every)
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        raise go_on_with_resume(error) from error
    _show_result(result, as_json)
    console.print(f"Wrote the model to {out}/{MODEL_FOLDER}.")


def _show_result(result: Mapping[str, JSON], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        print("  ".join(f"{name} {value:.4f}" for name, value in result.items() if isinstance(value, float)))


def _show(plan: PretrainPlan, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("MLP", "widths", "experts", "ranks", "parameters", "against dense"):
        table.add_column(heading, justify="left" if heading == "MLP" else "right")
    for path, block in plan.task.blocks.items():
        dense = (block.d_in + 1) * block.d_hidden + (block.d_hidden + 1) * block.d_out
        table.add_row(
            path,
            f"{block.d_in} → {block.d_hidden} → {block.d_out}",
            " × ".join(map(str, block.num_experts)),
            " ".join(map(str, block.ranks)),
            f"{block.num_parameters:,}",
            f"{block.num_parameters / dense - 1:+.2%}",
        )
    if plan.task.blocks:
        console.print(table)
    config, task = plan.config, plan.task
    console.print(
        f"{config.recipe}: {plan.parameters:,} parameters, {task.steps:,} steps of {task.units_per_step:,} "
        f"{task.unit}; {plan.device}, {plan.precision}, {counted(plan.threads, 'thread')}."
    )
