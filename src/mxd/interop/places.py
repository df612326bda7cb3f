"""Where a layer belongs in a language model, as other tools name it."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from mxd.atomic import JSON
from mxd.interop.plain import DoesNotFit, Format, PlainLayer
from mxd.layers import SparseLayer
from mxd.models import MLP_SITES, find_mlp, num_layers, require_widths


class Place(NamedTuple):
    """Where the MLP is for which a layer stands."""

    block: int
    """Index of its block."""
    num_blocks: int | None
    """Number of blocks of the model; None where the place is not a block's own MLP."""
    path: str
    """Dotted path of its module in the Hugging Face model."""
    hookpoint: str | None
    """The same below the model's base; None where the MLP is no module of its own."""
    adds_residual: bool
    """Whether the module itself adds the residual stream, so that its output is more than the layer's target."""
    is_the_blocks: bool
    """Whether it is where the model's family keeps the MLP of a block, so that other tools' names for it mean it."""


class Prepared(NamedTuple):
    """A layer that fits a format."""

    layer: PlainLayer
    """What it computes."""
    place: Place
    """Where it belongs."""
    about: Mapping[str, JSON]
    """What else is known of it, for people."""


def place_of(layer: SparseLayer, model: nn.Module) -> Place:
    """Return where a layer belongs.

    Args:
        layer: The layer, which remembers block and module.
        model: The Hugging Face language model, with or without weights.

    Raises:
        TypeError: If the model is none of PyTorch's.
        ValueError: If the layer does not say of which block it is, or the model has no such block or module, or one of
            other widths; widths of a module that is named without its block's number are not known.
    """
    block, path = layer.provenance.layer, layer.provenance.module_path
    if block is None:
        raise ValueError(
            f"A layer must say of which block it is to be exported; this {layer.kind} does not. Set its provenance, "
            "as in layer.provenance = mxd.Provenance(layer=8)."
        )
    is_listed = getattr(getattr(model, "config", None), "model_type", None) in MLP_SITES
    site = find_mlp(model, block) if is_listed or path is None else None
    if site is not None and path in (None, site.path):
        require_widths(site, layer)
        is_module = len(site.modules) == 1
        return Place(
            block=block,
            num_blocks=num_layers(model),
            path=site.path,
            hookpoint=_below_base(model, site.path) if is_module else None,
            adds_residual=site.takes_residual,
            is_the_blocks=True,
        )
    assert path is not None
    template = re.sub(rf"(?<=\.){block}(?=\.|$)", "{layer}", path, count=1)
    if path not in dict(model.named_modules()):
        raise ValueError(
            f"A layer must be exported with the model that it was trained on; it is of {path}, and "
            f"{type(model).__name__} has no such module. Name that model."
        )
    if template != path:
        require_widths(find_mlp(model, block, template), layer)
    return Place(
        block=block,
        num_blocks=None,
        path=path,
        hookpoint=_below_base(model, path),
        adds_residual=False,
        is_the_blocks=False,
    )


def require_the_blocks_mlp(place: Place, form: Format) -> None:
    """Check that a place is the one that TransformerLens's names for a block's MLP mean.

    Raises:
        DoesNotFit: If it is another module, or the model's family is not one whose MLPs are known.
    """
    if not place.is_the_blocks:
        raise DoesNotFit(
            f"{form} names places by TransformerLens's hooks, of which one is known for the MLP of a block of a listed "
            f"family alone; this layer is of {place.path}. What fits: --format sparsify, which names modules."
        )


def require_own_module(place: Place, form: Format) -> None:
    """Check that the MLP is one module that returns nothing else, for tools that hook the modules of the model itself.

    Raises:
        DoesNotFit: If it is not.
    """
    fits = "What fits: --format circuit-tracer, whose models have MLPs of their own."
    if place.hookpoint is None:
        raise DoesNotFit(f"{form} hooks one module; the MLP at {place.path} is several. {fits}")
    if place.adds_residual:
        raise DoesNotFit(
            f"{form} takes a module's whole output; {place.path} adds the residual stream to the MLP's. {fits}"
        )


def _below_base(model: nn.Module, path: str) -> str:
    return path.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
