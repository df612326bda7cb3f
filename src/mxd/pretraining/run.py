"""From a configuration to a finished run of pre-training."""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mxd.atomic import JSON, json_text, write_json_atomically
from mxd.kernels.backends import backend
from mxd.models import resolve_device
from mxd.pretraining.artifact import save_model
from mxd.pretraining.config import LanguageConfig, PretrainConfig
from mxd.pretraining.loop import pretrain
from mxd.pretraining.recipes import RECIPES, find_recipe
from mxd.pretraining.surgery import count_parameters
from mxd.pretraining.tasks import (
    ImageData,
    ImageTask,
    LanguageData,
    LanguageTask,
    Task,
    read_image_folder,
    read_language,
)
from mxd.runs.faults import TrainingFault
from mxd.runs.run import (
    create_run,
    is_finished,
    is_run,
    locked,
    mark_finished,
    read_configuration,
    reopen_run,
    require_command,
    require_place,
)
from mxd.runs.snapshots import SnapshotError
from mxd.training.resources import multiplies_bfloat16, resolve_threads

RESULT_FILE, MODEL_FOLDER = "pretraining.json", "model"
COMMAND = "pretrain"
MAY_DIFFER = ("resources.threads", "resources.precision", "config.optimization.threads", "config.images")
"""What run.json says that a run may be resumed with another value of: it goes on with the threads and the precision it
began with, and images may lie elsewhere if they are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainPlan:
    """What is about to be trained: data, device, sizes."""

    config: PretrainConfig
    """What was asked for."""
    data: LanguageData | ImageData
    """What it is trained on."""
    device: str
    """Where."""
    precision: str
    """Type of the matrix products."""
    threads: int
    """Threads of the CPU."""
    task: Task
    """The model and its data."""
    parameters: int
    """Parameters of the model."""

    def description(self) -> dict[str, JSON]:
        """Return what `run.json` holds."""
        resources: dict[str, JSON] = {
            "device": self.device,
            "precision": self.precision,
            "threads": self.threads,
            "kernels": backend(torch.device(self.device)),
        }
        versions = {"mxd": importlib.metadata.version("mxd"), "torch": torch.__version__}
        return {
            **_request(self.config),
            "data": cast(JSON, json.loads(json_text(self.data.identity))),
            "resources": resources,
            "parameters": self.parameters,
            "blocks": {
                path: cast(JSON, json.loads(json_text(asdict(block)))) for path, block in self.task.blocks.items()
            },
            "versions": versions,
        }


def make_plan(config: PretrainConfig, stored: Mapping[str, JSON] | None = None) -> PretrainPlan:
    """Read the data and build the model; nothing is written but the token cache.

    Args:
        config: What is asked for.
        stored: The run.json of the run that is to be continued, whose threads, precision and
            commit of a hub dataset are used again.

    Raises:
        ValueError: If anything asked for does not fit together.
        FileNotFoundError: If text, images or the tokenizer are not there.
    """
    if stored is not None:
        require_command(stored, COMMAND)
    _require_own_fraction(config)
    device = resolve_device(config.optimization.device)
    threads, precision = resolve_threads(config.optimization.threads), config.optimization.precision
    if precision == "auto":
        precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
    if stored is not None:
        known = cast("Mapping[str, Any]", stored["resources"])
        threads, precision = int(known["threads"]), str(known["precision"])
    torch.set_num_threads(threads)
    task: Task
    if isinstance(config, LanguageConfig):
        data = read_language(config, None if stored is None else _text_revision(stored))
        task = LanguageTask(config, data, device)
    else:
        data = read_image_folder(config)
        task = ImageTask(config, data, device)
    return PretrainPlan(
        config=config,
        data=data,
        device=device,
        precision=precision,
        threads=threads,
        task=task,
        parameters=count_parameters(task.model),
    )


def _request(config: PretrainConfig) -> dict[str, JSON]:
    """Return the part of `run.json` that is known before anything is read."""
    return {"command": COMMAND, "config": cast(JSON, json.loads(json_text(cast(JSON, asdict(config)))))}


def finished_result(config: PretrainConfig, out: Path) -> Mapping[str, JSON] | None:
    """Return what a finished run came to, for which neither data nor model need be there; None if it has not finished.

    Args:
        config: What is asked for.
        out: The run's folder.

    Raises:
        ValueError: If it holds a run of another command or configuration.
    """
    if not (is_run(out) and is_finished(out)):
        return None
    require_command(read_configuration(out), COMMAND)
    reopen_run(out, _request(config), ignore=MAY_DIFFER)
    return cast("Mapping[str, JSON]", json.loads((out / RESULT_FILE).read_text(encoding="utf-8")))


def _require_own_fraction(config: PretrainConfig) -> None:
    if config.recipe not in RECIPES:
        return
    own = find_recipe(config.recipe).mlp
    if own.rank_fraction is not None and own.rank_fraction == config.mlp.rank_fraction and own.kind != config.mlp.kind:
        raise ValueError(
            f"kind must be {own.kind} with recipe {config.recipe}, whose rank-fraction, {own.rank_fraction}, is of "
            f"that kind; got {config.mlp.kind}; take the recipe of that kind, or give --rank-fraction too."
        )


def _text_revision(stored: Mapping[str, JSON]) -> str | None:
    return cast("Mapping[str, Any]", stored["data"])["text"]["revision"]


def run_plan(
    plan: PretrainPlan, out: Path, *, resume: bool = False, snapshot_every: float = 300.0
) -> Mapping[str, JSON]:
    """Train what was planned and write `out/model`, and what it is worth to `out/pretraining.json`.

    Args:
        plan: What to train.
        out: The run's folder; it must not exist, unless resuming.
        resume: Whether to continue the run in `out`; without a snapshot there it begins anew.
        snapshot_every: Seconds between snapshots.

    Returns:
        What `pretraining.json` holds.

    Raises:
        ValueError: If `out` exists and `resume` is not set, or holds a run of another configuration.
        TrainingFault: If a number is not finite, or the run's files cannot be written.
        SnapshotError: If a snapshot cannot be written.
        TrainingInterrupted: If a signal stopped the run; a snapshot was written.
    """
    require_place(out, resume)
    # Locked before it is made: of two processes that begin at once, one makes the run and the other is refused.
    with locked(out):
        if resume and is_run(out):
            reopen_run(out, plan.description(), ignore=MAY_DIFFER)
            if is_finished(out):
                return cast("Mapping[str, JSON]", json.loads((out / RESULT_FILE).read_text(encoding="utf-8")))
        else:
            create_run(out, plan.description())
        try:
            return _pretrain_and_save(plan, out, snapshot_every)
        except SnapshotError:
            raise
        except OSError as error:
            raise TrainingFault(
                f"{error}; what {out} holds is intact: remove the cause, then continue with --resume."
            ) from error


def _pretrain_and_save(plan: PretrainPlan, out: Path, snapshot_every: float) -> Mapping[str, JSON]:
    found = pretrain(
        plan.task,
        plan.config.optimization,
        out,
        name=plan.config.recipe,
        device=plan.device,
        precision=plan.precision,
        eval_every=plan.config.eval_every,
        snapshot_every=snapshot_every,
    )
    save_model(plan.task.model, out / MODEL_FOLDER)
    if isinstance(plan.data, LanguageData):
        cast(Any, plan.data.tokenizer).save_pretrained(out / MODEL_FOLDER)
    result: dict[str, JSON] = {
        "recipe": plan.config.recipe,
        "kind": plan.config.mlp.kind,
        "seed": plan.config.optimization.seed,
        "parameters": plan.parameters,
        "steps": plan.task.steps,
        plan.task.unit: plan.task.steps * plan.task.units_per_step,
        **found,
    }
    write_json_atomically(out / RESULT_FILE, result)
    mark_finished(out, plan.task.steps)
    return result
