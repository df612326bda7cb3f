"""Edits as plain weights, where the algebra allows."""

import copy
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple, cast

import torch

from mxd.edits.editor import edits_of, with_edits
from mxd.edits.operations import Ablate, Add, Clamp, Edit, Scale, Set, few
from mxd.layers import SparseLayer

_UNIT_LENGTH = ("normalize_experts", "normalize_decoder")
"""Fields of configurations that keep the rows of a table at unit length, which a scaled row has not."""


class _Affine(NamedTuple):
    """What a row of edits comes to: value -> factor · value + offset."""

    factor: float = 1.0
    offset: float = 0.0


@torch.no_grad()
def fold_edits(layer: SparseLayer) -> SparseLayer:
    r"""Return a layer without edits whose weights do what the edits of the given one did.

    Edits of one latent compose to $v \mapsto \alpha v + \beta$. The factor goes into the weights through which alone
    the latent acts: its row of $C$ in an MxD, its decoder row in a transcoder, its block of rows in a MOLT. The offset
    is $\beta$ times the latent's atom at every token, so it goes into the output bias where atoms do not depend on the
    input; elsewhere there is no weight for it. Which latents are active does not change in either.

    Returns:
        A copy; the layer that was given stays as it is. Rows that were kept at unit length in training are so no more.

    Raises:
        ValueError: If an edit clamps, sets or adds to a latent whose atom depends on the input, or names one that has
            no weights of its own.
    """
    result = copy.deepcopy(with_edits(layer, ()))
    for latent, (factor, offset) in _composed(layer).items():
        rows = result.atom_rows(latent)
        if rows is None:
            raise ValueError(
                f"Weights hold a changed latent only where it has rows of its own; in {layer.kind} what latent "
                f"{latent} adds passes through weights that it shares. Keep the edit beside the layer instead."
            )
        if offset and not layer.fixed_atoms:
            raise ValueError(
                "Weights hold a latent that is set or added to only where what it adds is the same for every input; in "
                f"{layer.kind} that of latent {latent} depends on the input. Keep the edit beside the layer, or scale "
                "or ablate, which weights hold."
            )
        if offset:
            result.add_to_output_(offset * rows.table[rows.start : rows.stop].sum(0))
        rows.table[rows.start : rows.stop] *= factor
    _forget_unit_length(result)
    # Of the new weights it is as true as of the old ones, edited.
    result.provenance = layer.provenance
    return result


def _composed(layer: SparseLayer) -> Mapping[int, _Affine]:
    """Return what the edits do to each latent that they name."""
    affine: dict[int, _Affine] = {}
    for edit in edits_of(layer):
        for latent in edit.latents:
            affine[latent] = _after(affine.get(latent, _Affine()), edit)
    return affine


def _after(before: _Affine, edit: Edit) -> _Affine:
    match edit.operation:
        case Scale(factor=factor):
            return _Affine(factor * before.factor, factor * before.offset)
        case Ablate():
            return _Affine(0.0, 0.0)
        case Set(amount=amount):
            return _Affine(0.0, amount)
        case Add(amount=amount):
            return _Affine(before.factor, before.offset + amount)
        case Clamp():
            raise ValueError(
                "Weights hold only edits that are affine in a latent's value; clamp bends it (latents "
                f"{few(edit.latents)}). Keep the edit beside the layer instead."
            )


def _forget_unit_length(layer: SparseLayer) -> None:
    config = cast(Any, layer.config)
    kept = {field.name: False for field in fields(config) if field.name in _UNIT_LENGTH}
    layer.config = replace(config, **kept)
