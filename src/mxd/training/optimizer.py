"""How a student's weights move: AdamW, a learning-rate schedule, and tables whose rows stay at unit length."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mxd.layers.initialization import normalize_rows_


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Linear warm-up, then constant or falling linearly to nothing at the last step."""

    steps: int
    """Steps of the whole run."""
    warmup_steps: int
    """Steps until the full learning rate is reached."""
    shape: Literal["constant", "linear"] = "constant"
    """What follows the warm-up."""

    def factor(self, step: int) -> float:
        """Return the share of the full learning rate that step (counted from 0) uses.

        Example:
            >>> [Schedule(steps=4, warmup_steps=2, shape="linear").factor(step) for step in range(4)]
            [0.5, 1.0, 1.0, 0.5]
        """
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.shape == "constant":
            return warmup
        return min(warmup, (self.steps - step) / max(1, self.steps - self.warmup_steps))


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with its default betas, fused into one pass over each weight in the order of its memory.

    A gate's columns are contiguous in memory: its transpose is the plain tensor. Fused AdamW first copies the gradient
    of a weight that is not plain, which takes three times as long as the step itself, so it is handed the transposes of
    such weights, which share their memory, and of their gradients. So weights must stay where they are, and the
    gradients are forgotten by the network's `zero_grad`, not by the optimiser's.
    """
    own = list(parameters)
    seen = [weight.detach().t() if _is_transpose(weight) else weight for weight in own]
    transposes = [pair for pair in zip(own, seen, strict=True) if pair[0] is not pair[1]]
    optimizer = torch.optim.AdamW(seen, lr=lr, weight_decay=weight_decay, fused=True)

    def hand_over(*_: object) -> None:
        for weight, transpose in transposes:
            assert transpose.data_ptr() == weight.data_ptr(), "a weight was moved after its optimiser was made"
            transpose.grad = None if weight.grad is None else weight.grad.t()

    def let_go(*_: object) -> None:
        for _weight, transpose in transposes:
            transpose.grad = None

    optimizer.register_step_pre_hook(hand_over)
    optimizer.register_step_post_hook(let_go)
    return optimizer


def _is_transpose(weight: Tensor) -> bool:
    return weight.ndim == 2 and not weight.is_contiguous() and weight.t().is_contiguous()


ROWS_AT_ONCE = 512
"""Rows of a table whose gradients are projected together on a CPU, which takes half as long as one einsum at GPT-2's
shape. In one pass over blocks with AdamW and renormalisation, another 4 ms of a step's 690 would go, for an optimiser
of our own (benchmarks/kernels.py). Elsewhere each block would be a few launches more, so the whole table is taken."""


@torch.no_grad()
def project_gradients_(tables: Iterable[nn.Parameter]) -> None:
    """Take from each row's gradient the part along the row: the step shall turn the row, not stretch it.

    Applied after backward and before the step, to tables whose rows have unit length (Oldfield et al., 2025).
    """
    for table in tables:
        if table.grad is not None:
            # In blocks, so that the products of gradient and row are summed before they leave the cache.
            at_once = ROWS_AT_ONCE if table.device.type == "cpu" else len(table)
            for gradient, rows in zip(table.grad.split(at_once), table.split(at_once), strict=True):
                along = (gradient * rows).sum(1, keepdim=True)
                gradient.addcmul_(rows, along, value=-1)


def renormalize_(tables: Iterable[nn.Parameter]) -> None:
    """Scale each row back to unit length.

    Applied after every step, so that what is evaluated, saved and seen by the next forward pass is normalised.
    """
    for table in tables:
        normalize_rows_(table)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as named tensors: `<number of the parameter>.<name>`."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def restore_optimizer_(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, in the memory layout of each parameter, which fused steps rely on."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        if value.ndim:
            value = torch.empty_like(parameters[int(index)]).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
