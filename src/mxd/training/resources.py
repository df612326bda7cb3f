"""What a run computes with: decided once, recorded in run.json and used again on resume."""

import os
from dataclasses import dataclass

import torch

from mxd.kernels.backends import Backend, backend
from mxd.training.config import TrainConfig

WIDTH_FOR_BFLOAT16 = 256
"""Narrowest layer for which bfloat16 products pay for their casts on a CPU (benchmarks/train_step.py --dtype)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Device, precision, kernels, threads and prefetching of a run."""

    device: str
    """`cpu`, `cuda`, `cuda:1`, `mps` …"""
    precision: str
    """Type of the students' matrix products, `float32` or `bfloat16`."""
    model_precision: str
    """Type of the language model's matrix products."""
    kernels: Backend
    """What computes the sparse operations and the products (`mxd.kernels.backends`)."""
    threads: int
    """Threads of the CPU."""
    prefetch: bool
    """Whether a second thread fetches the next batches while students train; it changes no number."""

    @property
    def autocast(self) -> torch.dtype | None:
        """The type for autocast; None where products stay in float32."""
        return torch.bfloat16 if self.precision == "bfloat16" else None


def resolve_resources(config: TrainConfig, device: str, widest: int, weights: torch.dtype) -> Resources:
    """Return what the run computes with.

    A model whose weights are float32 runs its products in bfloat16 where the students do, unless its type was asked
    for. Its residual stream and norms stay in float32; an MLP's output, the product of its last layer, is rounded to
    bfloat16. `mxd evaluate` runs the model as its files have it.

    Batches are prefetched on a CUDA device, which the second thread keeps busy; `make_plan` adds runs that read a
    complete cache.

    Args:
        config: What was asked for.
        device: Where to train, as `resolve_device` gave it.
        widest: Largest input width of the layers.
        weights: Type of the language model's weights.
    """
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if _bfloat16_is_faster(device, widest) else "float32"
    model_precision = str(weights).removeprefix("torch.")
    if config.model_dtype == "auto" and weights == torch.float32:
        model_precision = precision
    return Resources(
        device=device,
        precision=precision,
        model_precision=model_precision,
        kernels=backend(torch.device(device)),
        threads=resolve_threads(config.threads),
        prefetch=torch.device(device).type == "cuda",
    )


def resolve_threads(asked: int | None) -> int:
    """Return the number of threads: what was asked for, what OMP_NUM_THREADS says, or one for each usable core."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return asked or (int(told) if told.isdecimal() else 0) or usable_cores()


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device has instructions for products of bfloat16 matrices."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _bfloat16_is_faster(device: str, widest: int) -> bool:
    return multiplies_bfloat16(device) and (torch.device(device).type != "cpu" or widest >= WIDTH_FOR_BFLOAT16)
