"""What a run computes with: decided once, recorded in run.json and used again on resume."""

import os
from dataclasses import dataclass

import torch

from mxd.models import require_device
from mxd.training.config import TrainConfig

WIDTH_FOR_BFLOAT16 = 256
"""Narrowest layer for which bfloat16 products pay for their casts on a CPU (benchmarks/train_step.py --dtype)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Device, precision, threads and prefetching of a run."""

    device: str
    """`cpu`, `cuda`, `cuda:1`, `mps` …"""
    precision: str
    """Type of the students' matrix products, `float32` or `bfloat16`."""
    threads: int
    """Threads of the CPU."""
    prefetch: bool
    """Whether a second thread fetches the next batches while students train; it changes no number."""

    @property
    def autocast(self) -> torch.dtype | None:
        """The type for autocast; None where products stay in float32."""
        return torch.bfloat16 if self.precision == "bfloat16" else None


def resolve_resources(config: TrainConfig, widest: int, *, model_runs: bool = True) -> Resources:
    """Return what the run computes with.

    Batches are prefetched where the second thread takes nothing from training: on a CUDA device, which it keeps busy,
    and where activations are only read. A language model on the CPU would compete with the students for the cores.

    Args:
        config: What was asked for.
        widest: Largest input width of the layers.
        model_runs: Whether the language model runs; False where all activations are kept already.

    Raises:
        ValueError: If the device is unknown or not there.
    """
    device = _device(config.device)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if _bfloat16_is_faster(device, widest) else "float32"
    return Resources(
        device=device,
        precision=precision,
        threads=config.threads or usable or 1,
        prefetch=not model_runs or torch.device(device).type == "cuda",
    )


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    require_device(asked)
    return asked


def _bfloat16_is_faster(device: str, widest: int) -> bool:
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and widest >= WIDTH_FOR_BFLOAT16 and torch.cpu._is_avx512_bf16_supported()
