"""The loop of pre-training: one model, one optimiser, resumable bit for bit."""

import hashlib
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mxd.atomic import JSON
from mxd.pretraining.config import Optimization
from mxd.pretraining.surgery import all_finite, parameter_groups
from mxd.pretraining.tasks import Task
from mxd.runs.determinism import deterministic
from mxd.runs.faults import TrainingFault, TrainingInterrupted
from mxd.runs.metrics_log import MetricsLog
from mxd.runs.progress import TrainingProgress
from mxd.runs.signals import interruptible
from mxd.runs.snapshots import load_newest_snapshot, save_snapshot
from mxd.training.optimizer import optimizer_tensors, restore_optimizer_

LOG_EVERY = 10
"""Steps between two lines of metrics.jsonl."""


def pretrain(
    task: Task,
    config: Optimization,
    run: Path,
    *,
    name: str,
    device: str,
    precision: str,
    eval_every: int,
    snapshot_every: float = 300.0,
) -> Mapping[str, float]:
    """Train a task's model from the run's newest snapshot, if it has one, to the end.

    Interrupted at any moment and called again it ends with the same weights, bit for bit, on the same machine: what is
    random in a step is drawn from a seed of that step.

    Args:
        task: What to train.
        config: How.
        run: Folder for `metrics.jsonl` and `snapshots/`.
        name: What the progress display calls it.
        device: Where to train.
        precision: Type of the matrix products.
        eval_every: Steps between two evaluations; there is one at the end in any case.
        snapshot_every: Seconds between snapshots; when they are taken changes nothing else.

    Returns:
        The last evaluation.

    Raises:
        ValueError: If the device is CUDA and one of the model's operations cannot be repeated there bit for bit.
        TrainingFault: If the loss or a weight is not finite.
        TrainingInterrupted: If SIGINT or SIGTERM arrived; a snapshot was written first.
        OSError: If metrics or a snapshot cannot be written; the snapshots before it stay.
    """
    steps = task.steps
    groups = parameter_groups(task.model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    first = _resume(task, optimizer, run)
    last_snapshot = time.monotonic()
    evaluation: Mapping[str, float] = {}
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(deterministic(device, precision))
        stop = stack.enter_context(interruptible())
        log = stack.enter_context(MetricsLog(run / "metrics.jsonl", first_step=first + 1))
        progress = stack.enter_context(_progress(task, name, first))
        for step in range(first, steps):
            loss = _step(task, optimizer, config, step, autocast)
            done = step + 1
            is_last, evaluates = done == steps, done == steps or done % eval_every == 0
            if evaluates or done % LOG_EVERY == 0:
                _require_finite(task, loss, done, state=is_last)
                record = {"step": done, task.unit: done * task.units_per_step, "loss": float(loss)}
                record |= {"lr": config.rate(step, steps), "seconds": log.seconds()}
                if evaluates:
                    evaluation = _evaluate(task, autocast)
                    record |= evaluation
                log.log(record)
                progress.update(done * task.units_per_step, {name: record})
            if stop.requested is not None or is_last or time.monotonic() - last_snapshot >= snapshot_every:
                _save(task, optimizer, loss, run, done)
                last_snapshot = time.monotonic()
            if stop.requested is not None and not is_last:
                raise TrainingInterrupted(f"{stop.requested} after step {done:,} of {steps:,}")
        evaluation = evaluation or _evaluate(task, autocast)
    return evaluation


def _progress(task: Task, name: str, first: int) -> TrainingProgress:
    return TrainingProgress(
        task.steps * task.units_per_step,
        [name],
        "Pre-training",
        tokens_at_start=first * task.units_per_step,
        unit=task.unit,
        columns={"loss": "loss", "held out": "held_out_loss"},
        headline="held_out_loss",
    )


def _step(
    task: Task,
    optimizer: torch.optim.Optimizer,
    config: Optimization,
    step: int,
    autocast: torch.autocast | nullcontext[None],
) -> Tensor:
    """Take a step, all of whose draws come from its own seeds, and return the loss before it."""
    generator = torch.Generator().manual_seed(_seed_of(config.seed, step, "batch"))
    torch.manual_seed(_seed_of(config.seed, step, "model"))
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step, task.steps)
    loss = _backward(task, config, generator, autocast)
    if config.clip is not None:
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def _backward(
    task: Task, config: Optimization, generator: torch.Generator, autocast: torch.autocast | nullcontext[None]
) -> Tensor:
    """Add up the gradients of a batch, part by part, and return its mean loss."""
    batch = task.next_batch(generator)
    # On the model's device: to read it after every part would keep the device waiting.
    total = torch.zeros((), device=batch.inputs.device)
    for part in batch.split(config.micro_batch):
        share = len(part.inputs) / len(batch.inputs)
        with autocast:
            loss = task.loss(part)
        (loss * share).backward()
        total += loss.detach().float() * share
    return total


def _evaluate(task: Task, autocast: torch.autocast | nullcontext[None]) -> dict[str, float]:
    task.model.eval()
    try:
        with autocast:
            return task.evaluate()
    finally:
        task.model.train()


def _seed_of(seed: int, step: int, stream: str) -> int:
    # 32 bits: PyTorch's generator on the CPU reads no more of its seed, so what stands above would be lost.
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {stream}".encode()).digest()[:4])


def _resume(task: Task, optimizer: torch.optim.Optimizer, run: Path) -> int:
    """Put the newest snapshot's state back and return its step; 0 where there is none."""
    snapshot = load_newest_snapshot(run / "snapshots")
    if snapshot is None:
        return 0
    own = task.model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(snapshot.tensors[f"model/{name}"])
    prefix = "optimizer/"
    restore_optimizer_(
        optimizer,
        {name.removeprefix(prefix): value for name, value in snapshot.tensors.items() if name.startswith(prefix)},
    )
    task.restore(cast("Mapping[str, JSON]", snapshot.state["position"]))
    return snapshot.step


def _save(task: Task, optimizer: torch.optim.Optimizer, loss: Tensor, run: Path, done: int) -> None:
    _require_finite(task, loss, done, state=True)
    save_snapshot(run / "snapshots", done, _tensors(task, optimizer), {"position": task.position()})


def _tensors(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    weights = {f"model/{name}": tensor.detach() for name, tensor in task.model.state_dict().items()}
    return weights | {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}


def _require_finite(task: Task, loss: Tensor, done: int, *, state: bool) -> None:
    if bool(torch.isfinite(loss)) and (not state or all_finite(task.model)):
        return
    raise TrainingFault(
        f"the loss and the weights must be finite numbers; one was NaN or infinite by step {done:,}. No snapshot was "
        "taken of it: lower the learning rate and train anew."
    )
