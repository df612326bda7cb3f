"""Whether steps that are timed against each other compute the same: asked before anything is timed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from variants import Dtype, Shape, autocast, dense_loss, make_batch, make_layer, mxd_loss, sparsify_coder

TOLERANCE = 1e-3
"""Largest relative error of a gradient in float32; one latent chosen otherwise among equals costs that much."""


class Agreement(NamedTuple):
    """How far variants are from the dense formulation in float32."""

    errors: dict[str, dict[str, float]]
    """Relative errors of loss and gradients (of sparsify: of its output) by variant and type."""
    complaints: list[str]
    """A sentence for each error that rounding does not explain."""


def gradients(loss: Tensor, layer: torch.nn.Module) -> dict[str, Tensor]:
    names, weights = zip(*layer.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, weights), strict=True))}


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def agreement(
    shape: Shape, dtypes: Sequence[Dtype], *, with_sparsify: bool = False, tolerance: float = TOLERANCE
) -> Agreement:
    """Compare loss and gradients of `mxd` with the dense ones in float32.

    In bfloat16 many scores are equal and each variant chooses among them, so mxd is held to what dense errs by.

    Args:
        shape: What is learnt.
        dtypes: Types of the products.
        with_sparsify: Whether sparsify's output is compared too, which must be the transcoder's.
        tolerance: The largest error that needs no explanation.
    """
    layer, batch = make_layer(shape), make_batch(shape)
    exact = gradients(dense_loss(layer, batch), layer)
    errors: dict[str, dict[str, float]] = {}
    allowed: dict[str, dict[str, float]] = {}
    for dtype in dtypes:
        for variant, loss_of in {"dense": dense_loss, "mxd": mxd_loss}.items():
            with autocast(dtype, shape.device):
                loss = loss_of(layer, batch)
            found = gradients(loss, layer)
            errors[f"{variant}, {dtype}"] = {name: relative_error(found[name], exact[name]) for name in exact}
        of_dense = errors[f"dense, {dtype}"]
        allowed[f"mxd, {dtype}"] = {name: max(tolerance, 1.1 * error) for name, error in of_dense.items()}
    if with_sparsify:
        with torch.no_grad():
            error = relative_error(sparsify_coder(shape)(batch.x).sae_out, layer(batch.x).prediction)
        errors["sparsify, float32"] = {"prediction": error}
        allowed["sparsify, float32"] = {"prediction": tolerance}
    complaints = [
        f"The relative error of {name} must be at most {most:.1e} for {variant}; got {errors[variant][name]:.1e}."
        for variant, limits in allowed.items()
        for name, most in limits.items()
        if not errors[variant][name] <= most
    ]
    return Agreement(errors, complaints)
