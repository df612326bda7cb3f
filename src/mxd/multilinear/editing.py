"""Change what an expert contributes, without training: switch it off, scale it, or only where it is strong."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mxd.multilinear.gate import ExpertGate


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertEdit:
    """A change of one expert's coefficient."""

    expert: int
    """Number of the expert in its level."""
    level: int = 0
    """Level of the hierarchy."""
    factor: float = 0.0
    """What its coefficient is multiplied by; 0 switches the expert off."""
    threshold: float = 0.0
    """Only inputs on which its coefficient is above this are changed: the inputs that the expert recognises."""
    renormalize: bool = False
    """Whether the other coefficients of a changed input are scaled so that the sum stays; inputs on which the expert
    was alone stay as they were, since there is nobody to take over."""

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"threshold must be at least 0; got {self.threshold}.")

    def apply(
        self, coefficients: Float[Tensor, "*batch num_experts"], among: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch num_experts"]:
        """Return the changed coefficients of the edit's level.

        Args:
            coefficients: The gate's.
            among: The inputs that may be changed, a subpopulation; all by default.

        Raises:
            ValueError: If there is no such expert.
        """
        count = coefficients.shape[-1]
        if not 0 <= self.expert < count:
            raise ValueError(f"expert must lie in [0, {count - 1}]; got {self.expert}.")
        own = coefficients[..., self.expert]
        changing = own > self.threshold if among is None else (own > self.threshold) & among
        kept = torch.where(changing, own * self.factor, own)
        edited = coefficients.clone()
        if self.renormalize:
            others = coefficients.sum(-1) - own
            alone = others <= torch.finfo(coefficients.dtype).eps * count
            kept = torch.where(alone, own, kept)
            growth = torch.where(alone, 1.0, (others + own - kept) / others.clamp_min(1e-30))
            edited = edited * growth[..., None]
        edited[..., self.expert] = kept
        return edited


@contextmanager
def edited_gate(
    module: nn.Module, edit: ExpertEdit, among: Bool[Tensor, "*batch"] | None = None
) -> Generator[None, None, None]:
    """Have a mixture or a block compute with edited coefficients for as long as this is open.

    Args:
        module: An `ExpertGate`, or a layer that has one as `gate`.
        edit: The change.
        among: The inputs that may be changed, in the shape of the gate's batch; all by default.

    Raises:
        ValueError: If the module has no gate, or the gate no such level.
    """
    gate = module if isinstance(module, ExpertGate) else getattr(module, "gate", None)
    if not isinstance(gate, ExpertGate):
        raise ValueError(f"an edit needs a layer with a gate; {type(module).__name__} has none.")
    if not 0 <= edit.level < len(gate.num_experts):
        raise ValueError(f"level must lie in [0, {len(gate.num_experts) - 1}]; got {edit.level}.")

    def change(_module: nn.Module, _inputs: object, output: Any) -> tuple[Tensor, ...]:
        levels = list(cast("tuple[Tensor, ...]", output))
        levels[edit.level] = edit.apply(levels[edit.level], among)
        return tuple(levels)

    handle = gate.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
