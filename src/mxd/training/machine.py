"""How fast this machine is."""

import time

import torch

from mxd.kernels.products import linear

CPU_SECONDS = 0.05
"""For how long matrix products are timed on a CPU; an accelerator is timed for as long."""
CPU_SIDE, ACCELERATOR_SIDE = 512, 4096
"""Rows and columns of the matrices."""


def product_speed(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a square matrix product, timed now, two per multiply-add.

    It is the product that layers use on that device.
    """
    place = torch.device(device)
    side = CPU_SIDE if place.type == "cpu" else ACCELERATOR_SIDE
    # Ones, so that no random state moves.
    left, right = (torch.ones(side, side, dtype=dtype, device=place) for _ in range(2))
    linear(left, right)
    _wait_for(place)
    started, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < CPU_SECONDS:
        linear(left, right)
        _wait_for(place)
        products += 1
    return products * 2 * side**3 / elapsed


def _wait_for(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    elif place.type == "mps":
        torch.mps.synchronize()
