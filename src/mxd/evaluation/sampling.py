"""Which of many things are looked at where all of them would be too much."""

import torch
from jaxtyping import Int
from torch import Tensor


def evenly_spaced(available: int, wanted: int) -> Int[Tensor, " chosen"]:
    """Return which of `available` things to take: all of them, or `wanted`, evenly spaced from first to last."""
    if available <= wanted:
        return torch.arange(available)
    return torch.linspace(0, available - 1, wanted, dtype=torch.float64).round().long()
