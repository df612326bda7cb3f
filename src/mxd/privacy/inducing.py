"""Pareto fine-tuning: uniform on protected examples, as accurate as before on the others (Ashiq et al., 2025)."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import nn

from mxd.atomic import JSON
from mxd.models.identity import fingerprint
from mxd.privacy.examples import Examples, device_of, require_logits, require_sets
from mxd.privacy.tuning import InduceConfig, Induced, Sets, Tuning
from mxd.runs.determinism import deterministic
from mxd.runs.faults import TrainingInterrupted
from mxd.runs.metrics_log import MetricsLog
from mxd.runs.progress import TrainingProgress
from mxd.runs.run import create_run, is_finished, is_run, locked, mark_finished, read_configuration, reopen_run
from mxd.runs.signals import interruptible
from mxd.runs.snapshots import load_newest_snapshot, save_snapshot

COMMAND, EARLIER_TASK = "induce", "induce uncertainty"
"""By what run.json tells a run of this command from others; `task` did so in what earlier versions wrote."""
COLUMNS = {"loss": "objective", "distance": "confidence_distance", "accuracy": "validation_accuracy"}


def induce_uncertainty(
    model: nn.Module,
    protected: Examples,
    retained: Examples,
    config: InduceConfig | None = None,
    *,
    validation: Examples | None = None,
    run: Path | None = None,
    resume: bool = False,
    snapshot_every: float = 600.0,
) -> Induced:
    r"""Fine-tune a copy of a model until it is uniform on protected examples and as accurate as before on the others.

    Each step takes the gradients $g_u$ of $\theta L_K$ over the protected and $g_c$ of $(1-\theta) L_A$ over the
    retained examples, takes out of each what works against the other (`symmetric_surgery`), and hands
    $g_u + g_c + \lambda w$ to the optimiser: Algorithm 1 of the paper (Ashiq et al., 2025). The model computes as it
    does in use, in evaluation mode (no dropout, batch normalisation with its stored statistics), so that losses are
    means over examples. Of all checks with enough accuracy on validation examples, that with the lowest confidence
    distance is chosen; the model as given counts as the first check.

    Args:
        model: A classifier that returns logits, or a transformers model for sequence or token classification or causal
            language modelling. What requires a gradient is trained.
        protected: Whose predictions are to be uniform; their labels are not used.
        retained: Whose accuracy is to stay.
        config: How.
        validation: Examples to choose the model by; unless given, a part of the retained ones is set aside.
        run: Folder for `run.json`, `metrics.jsonl` and snapshots; without it nothing is written or shown.
        resume: Continue what is in the run's folder; ends with the same weights, bit for bit, as without interruption,
            on the same machine.
        snapshot_every: Seconds between snapshots.

    Raises:
        ValueError: If a set is empty or not finite, sets overlap, labels are not the model's classes, the model returns
            probabilities, the run's folder holds something else, or the device is CUDA and one of the model's
            operations cannot be repeated there bit for bit.
        TrainingFault: If a loss is not finite.
        TrainingInterrupted: If SIGINT or SIGTERM arrived; a snapshot was written where there is a run.
    """
    config = config or InduceConfig()
    with deterministic(device_of(model)):
        sets = _split(model, protected, retained, validation, config)
        return _induce(model, sets, config, run, resume=resume, snapshot_every=snapshot_every)


def _induce(
    model: nn.Module, sets: Sets, config: InduceConfig, run: Path | None, *, resume: bool, snapshot_every: float
) -> Induced:
    tuning = Tuning(model, sets, config)
    if run is None:
        with interruptible() as stop:
            while not tuning.finished():
                tuning.step()
                if stop.requested is not None:
                    raise TrainingInterrupted(f"{stop.requested} after step {tuning.done:,}")
        return tuning.result()
    with locked(run):
        _open_run(run, describe_request(model, sets, config), resume=resume)
        _tune_in_run(tuning, run, snapshot_every)
        if not is_finished(run):
            mark_finished(run, tuning.done)
    return tuning.result()


def _split(
    model: nn.Module, protected: Examples, retained: Examples, validation: Examples | None, config: InduceConfig
) -> Sets:
    require_sets(protected, retained)
    for name, examples in (("protected", protected), ("retained", retained)):
        require_logits(model, examples, name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("at least one weight of the model must require a gradient; none does; call requires_grad_().")
    if validation is not None:
        require_sets(protected, validation, ("protected", "validation"))
        require_sets(retained, validation, ("retained", "validation"))
        require_logits(model, validation, "validation")
        return Sets(protected, retained, validation)
    count = round(config.validation_fraction * len(retained))
    if not 1 <= count < len(retained):
        raise ValueError(
            f"the retained set must leave examples both to train on and to validate on; {len(retained)} at a "
            f"validation-fraction of {config.validation_fraction} leave {count} for validation; give more."
        )
    order = torch.randperm(len(retained), generator=torch.Generator().manual_seed(config.seed))
    return Sets(protected, retained.take(order[count:]), retained.take(order[:count]))


def describe_request(model: nn.Module, sets: Sets, config: InduceConfig) -> dict[str, JSON]:
    """What `run.json` says, and what a resumed run must share."""
    return {
        "command": COMMAND,
        "config": cast(JSON, asdict(config)),
        "model": fingerprint(model),
        "protected": sets.protected.digest(),
        "retained": sets.retained.digest(),
        "validation": sets.validation.digest(),
    }


def _open_run(run: Path, configuration: dict[str, JSON], *, resume: bool) -> None:
    """Make the run's folder, or check that what is in it is the same request."""
    if not (resume and is_run(run)):
        create_run(run, configuration)
        return
    stored = read_configuration(run)
    if stored.get("command") != COMMAND and stored.get("task") != EARLIER_TASK:
        raise ValueError(
            f"{run} must be a run of mxd privacy {COMMAND} to be continued; it is another; name another --out."
        )
    reopen_run(run, configuration, ignore=("command", "task"))


def _tune_in_run(tuning: Tuning, run: Path, snapshot_every: float) -> None:
    snapshots, saved = run / "snapshots", time.monotonic()
    snapshot = load_newest_snapshot(snapshots)
    if snapshot is not None:
        tuning.restore(snapshot)
    with ExitStack() as stack:
        stop = stack.enter_context(interruptible())
        log = stack.enter_context(MetricsLog(run / "metrics.jsonl", first_step=tuning.done + 1))
        total = tuning.config.steps
        progress = stack.enter_context(
            TrainingProgress(
                total,
                ["model"],
                "Inducing uncertainty",
                tokens_at_start=tuning.done,
                unit="steps",
                columns=COLUMNS,
                headline="confidence_distance",
            )
        )
        while not tuning.finished():
            record = tuning.step()
            log.log({"step": tuning.done, "seconds": log.seconds(), **record})
            progress.update(tuning.done, {"model": record})
            if stop.requested is not None or time.monotonic() - saved >= snapshot_every:
                save_snapshot(snapshots, tuning.done, tuning.tensors(), tuning.state())
                saved = time.monotonic()
            if stop.requested is not None and not tuning.finished():
                raise TrainingInterrupted(f"{stop.requested} after step {tuning.done:,} of {total:,}")
    if snapshot is None or snapshot.step < tuning.done:
        save_snapshot(snapshots, tuning.done, tuning.tensors(), tuning.state())
