"""Edits applied to codes, and to the layers that make them."""

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mxd.edits.operations import Edit, Operation, Span, few
from mxd.layers import SparseCode, SparseLayer


class _Step(NamedTuple):
    """An edit, made ready for one device."""

    edit: Edit
    columns: Int[Tensor, " columns"]
    """Which of the woken latents it names."""
    quiet: Int[Tensor, " quiet"]
    """Those that it names beside: they stay in the slots that they have."""
    positions: Int[Tensor, " positions"] | None
    """Where it applies, if that is a list of positions."""


class _Plan(NamedTuple):
    """All edits, made ready for one device."""

    steps: Sequence[_Step]
    woken: Int[Tensor, " woken"]
    """Latents that some edit can make active, sorted: each gets a slot of its own."""


class CodeEditor:
    """Applies edits to codes, in their order.

    The code grows by one slot for each latent that an edit can wake, and stays as wide as it is where all edits scale
    or ablate: nothing of size tokens × num_latents is made. Where no edit applies, values stay in their slots.

    Args:
        edits: What to do; later ones see what earlier ones left.
        num_latents: Size of the code.

    Raises:
        ValueError: If an edit names a latent that does not exist.
    """

    def __init__(self, edits: Sequence[Edit], num_latents: int):
        beyond = [latent for edit in edits for latent in edit.latents if latent >= num_latents]
        if beyond:
            raise ValueError(f"An edit's latents must lie in [0, {num_latents - 1}]; got {few(beyond)}.")
        self.edits = tuple(edits)
        self._plans: dict[torch.device, _Plan] = {}

    def __call__(self, code: SparseCode, positions: Int[Tensor, "*batch"] | None = None) -> SparseCode:
        """Return the edited code.

        Args:
            code: Any code of the layer.
            positions: Where in its sequence each row stands, with a negative number at padding; needed if an edit is
                for chosen positions.

        Raises:
            ValueError: If positions are needed and there are none, or they are not one for each row.
        """
        plan = self._plan(code.values.device)
        values, indices = code
        where = [None if step.edit.positions is None else _mask(step, code, positions) for step in plan.steps]
        columns = values.new_zeros(*values.shape[:-1], len(plan.woken))
        if len(plan.woken):
            place = torch.searchsorted(plan.woken, indices.contiguous()).clamp(max=len(plan.woken) - 1)
            moved = plan.woken[place] == indices
            masks = [mask for mask in where if mask is not None]
            if len(masks) == len(where):
                moved &= torch.stack(masks).any(0)[..., None]
            columns = columns.scatter_add(-1, place, torch.where(moved, values, 0))
            values = torch.where(moved, 0, values)
        for (edit, own, quiet, _), mask in zip(plan.steps, where, strict=True):
            if len(own):
                columns = columns.index_copy(-1, own, _apply(edit.operation, columns[..., own], mask))
            if len(quiet):
                values = torch.where(torch.isin(indices, quiet), _apply(edit.operation, values, mask), values)
        woken = plan.woken.to(indices.dtype).expand(*indices.shape[:-1], -1)
        return SparseCode(torch.cat([values, columns], -1), torch.cat([indices, woken], -1))

    def _plan(self, device: torch.device) -> _Plan:
        if device not in self._plans:
            awake = {latent for edit in self.edits if edit.wakes for latent in edit.latents}
            woken = {latent: column for column, latent in enumerate(sorted(awake))}

            def whole(numbers: Iterable[int]) -> Tensor:
                return torch.tensor(list(numbers), dtype=torch.int64, device=device)

            steps = [
                _Step(
                    edit,
                    whole(woken[n] for n in edit.latents if n in woken),
                    whole(n for n in edit.latents if n not in woken),
                    None if edit.positions is None or isinstance(edit.positions, Span) else whole(edit.positions),
                )
                for edit in self.edits
            ]
            self._plans[device] = _Plan(steps, whole(woken))
        return self._plans[device]


def _mask(step: _Step, code: SparseCode, positions: Tensor | None) -> Bool[Tensor, "*batch"]:
    if positions is None or positions.shape != code.values.shape[:-1]:
        found = "none" if positions is None else f"positions of shape {tuple(positions.shape)}"
        raise ValueError(
            "An edit at chosen positions needs the position of each row of the code, of shape "
            f"{tuple(code.values.shape[:-1])}; got {found}. Use mxd.steering.steer, or edit everywhere."
        )
    span = step.edit.positions
    if isinstance(span, Span):
        mask = positions >= span.start
        return mask if span.stop is None else mask & (positions < span.stop)
    assert step.positions is not None
    return torch.isin(positions, step.positions)


def edit_code(
    code: SparseCode, edits: Sequence[Edit], num_latents: int, positions: Int[Tensor, "*batch"] | None = None
) -> SparseCode:
    """Return a code with these edits applied, in their order; see `CodeEditor`.

    Example:
        >>> from mxd.edits import Add, Edit
        >>> code = SparseCode(torch.tensor([2.0, 1.0]), torch.tensor([7, 3]))
        >>> edit_code(code, [Edit(latents=(3, 5), operation=Add(amount=10.0))], num_latents=8)
        SparseCode(values=tensor([ 2.,  0., 11., 10.]), indices=tensor([7, 3, 3, 5]))
    """
    return CodeEditor(edits, num_latents)(code, positions)


def with_edits(layer: SparseLayer, edits: Sequence[Edit]) -> SparseLayer:
    """Return the layer with these edits and no others in force; it shares its weights with the one given.

    Whatever uses the result (`encode`, `forward`, `replace_mlp`, evaluation) sees edited codes.

    Raises:
        ValueError: If an edit is for chosen positions, which a layer does not know of (`mxd.steering.steer` does), or
            names a latent that does not exist.
    """
    if any(edit.positions is not None for edit in edits):
        raise ValueError(
            "An edit that stays with a layer must be for all positions; got one for chosen positions. "
            "Use mxd.steering.steer for it."
        )
    result = copy.copy(layer)
    result.edit = CodeEditor(edits, layer.config.num_latents) if edits else None
    return result


def edits_of(layer: SparseLayer) -> tuple[Edit, ...]:
    """Return the edits that are in force in a layer, none for a layer as it was trained."""
    return layer.edit.edits if isinstance(layer.edit, CodeEditor) else ()


def _apply(
    operation: Operation, values: Float[Tensor, "*batch m"], mask: Bool[Tensor, "*batch"] | None
) -> Float[Tensor, "*batch m"]:
    changed = operation(values)
    return changed if mask is None else torch.where(mask[..., None], changed, values)
