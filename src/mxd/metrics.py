"""How good a prediction is: tensors in, scalars out."""

import math
import sys
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ErrorSums(NamedTuple):
    """The sums from which reconstruction errors are made; sums of batches add up to those of all tokens."""

    tokens: int
    """Number of tokens summed over."""
    error: float
    """Sum of ‖y − t‖²."""
    square: float
    """Sum of ‖t‖²."""
    target: Float[Tensor, " d_out"]
    """Sum of t, on the CPU in float64."""

    def __add__(self, other: "ErrorSums") -> "ErrorSums":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the sums over both sets of tokens."""
        return ErrorSums(
            self.tokens + other.tokens,
            self.error + other.error,
            self.square + other.square,
            self.target + other.target,
        )

    @property
    def nmse(self) -> float:
        """Normalised mean squared error: Σ‖y−t‖² / Σ‖t‖²; NaN where all targets are zero."""
        return _ratio(self.error, self.square)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: Σ‖y−t‖² / Σ‖t−t̄‖²; NaN where the targets do not vary."""
        return _ratio(self.error, self.variation)

    @property
    def variation(self) -> float:
        """Σ‖t−t̄‖²: the targets' variance times their number; 0 where that is no more than rounding of the sums.

        Sums of n terms of one sign are exact to n·ε of their size (Higham, Accuracy and Stability of Numerical
        Algorithms, section 4.2), so that nothing smaller is known of the difference of two.
        """
        difference = self.square - _ratio(float(self.target.square().sum()), float(self.tokens))
        return 0.0 if difference <= 2 * self.tokens * sys.float_info.epsilon * self.square else difference


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest type of numbers that a device has: float64, but float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_float64(tensor: Tensor) -> Tensor:
    """Return the numbers in float64: on their device, or on the CPU where the device has none."""
    has_float64 = widest_dtype(tensor.device) == torch.float64
    return tensor.double() if has_float64 else tensor.cpu().double()


def error_sums(prediction: Float[Tensor, "tokens d_out"], target: Float[Tensor, "tokens d_out"]) -> ErrorSums:
    """Return one batch's sums, accumulated in float64 where the device has it."""
    widest = widest_dtype(target.device)
    target = target.detach().to(widest)
    return ErrorSums(
        len(target),
        float((prediction.detach().to(widest) - target).square().sum()),
        float(target.square().sum()),
        target.sum(dim=0).cpu().double(),
    )


def next_token_losses(
    logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch positions"]:
    """Return the cross-entropy of each next token, in nats: one position fewer than there are tokens."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    ).unflatten(0, (len(tokens), -1))


def kl_divergence(
    reference: Float[Tensor, "batch seq vocab"], logits: Float[Tensor, "batch seq vocab"]
) -> Float[Tensor, "batch seq"]:
    """Return KL(reference ‖ logits) of each position's next-token distributions, in nats, never below zero."""
    log_p, log_q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)


def loss_recovered(ce: float, ce_base: float, ce_zero: float) -> float:
    """Return the share of zero ablation's damage that a replacement avoids: (CE_zero − CE) / (CE_zero − CE_base).

    It is NaN where zero ablation does no damage, of which nothing can be recovered.
    """
    return (ce_zero - ce) / (ce_zero - ce_base) if ce_zero > ce_base else math.nan


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
