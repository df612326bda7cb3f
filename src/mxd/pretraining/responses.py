"""What every expert of a trained model responds to."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.multilinear import ExpertGate
from mxd.multilinear.specialisation import STRONG


@torch.no_grad()
def gate_coefficients(model: nn.Module, batches: Iterable[Tensor], level: int = 0) -> dict[str, Float[Tensor, "..."]]:
    """Return the coefficients of every gate of a model on some inputs, by the path of the block that has it.

    All are kept in memory, as float32 on the CPU: inputs times positions times experts for each gate.

    Args:
        model: A model whose MLPs were replaced.
        batches: Its inputs, in batches.
        level: Level of the hierarchy.

    Raises:
        ValueError: If the model has no gate, or a gate no such level.
    """
    gates = {path.removesuffix(".gate"): gate for path, gate in model.named_modules() if isinstance(gate, ExpertGate)}
    if not gates:
        raise ValueError("a model must have multilinear MLPs for its experts to be looked at; it has none.")
    if not all(0 <= level < len(gate.num_experts) for gate in gates.values()):
        raise ValueError(f"level must be one that every gate has; got {level}.")
    found: dict[str, list[Tensor]] = {path: [] for path in gates}
    was_training = model.training
    with ExitStack() as stack:
        for path, gate in gates.items():

            def keep(_module: nn.Module, _inputs: object, output: Any, path: str = path) -> None:
                found[path].append(cast("tuple[Tensor, ...]", output)[level].float().cpu())

            stack.callback(gate.register_forward_hook(keep).remove)
        stack.callback(model.train, was_training)
        model.eval()
        for batch in batches:
            model(batch)
    return {path: torch.cat(parts) for path, parts in found.items()}


class TokenUse(NamedTuple):
    """What an expert's tokens are."""

    expert: int
    """The expert's number."""
    tokens: int
    """Positions on which its coefficient is at least 0.5."""
    most_frequent: tuple[tuple[int, int], ...]
    """The most frequent token ids there, and how often each is."""


def token_use(
    coefficients: Float[Tensor, "contexts positions num_experts"],
    ids: Int[Tensor, "contexts positions"],
    most: int = 6,
    threshold: float = STRONG,
) -> list[TokenUse]:
    """Return for each expert on how many tokens it is strong, and which these are, the busiest expert first."""
    uses: list[TokenUse] = []
    for expert in range(coefficients.shape[-1]):
        own = ids[coefficients[..., expert] >= threshold]
        values, counts = own.unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:most]
        frequent = tuple(zip(values[order].tolist(), counts[order].tolist(), strict=True))
        uses.append(TokenUse(expert, len(own), frequent))
    return sorted(uses, key=lambda use: -use.tokens)
