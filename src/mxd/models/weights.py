"""The weights of a model's MLP in one form, whatever its family calls them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mxd.layers import MlpWeights
from mxd.layers.activations import activation_function
from mxd.models.sites import MlpSite

TOLERANCE = 1e-3
"""Relative error within which weights must reproduce the MLP on random inputs, in the MLP's own type or float32."""
PROBES = 16


class _Linear(NamedTuple):
    weight: Float[Tensor, "d_in d_map"]
    bias: Float[Tensor, " d_map"]


def mlp_weights(site: MlpSite) -> MlpWeights:
    """Return the weights of a dense MLP, gated or not, in float32.

    Which linear map is which is found by trying: the one reading is returned that makes of random inputs what the
    MLP itself makes of them.

    Raises:
        ValueError: If no reading does, as with a mixture of experts, quantised weights or an activation of another
            kind.
    """
    dtype, device = _placed(site)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBES, site.d_in, generator=generator).to(device)
    with torch.no_grad():
        expected = site(x.to(dtype)).float()
        tolerance = max(TOLERANCE, 8 * torch.finfo(dtype).eps)
        for weights in _readings(site):
            error = (apply_mlp(weights, x, site.activation) - expected).norm() / expected.norm()
            if error <= tolerance:
                return weights
    raise ValueError(
        f"the MLP at {site.path} must be dense linear maps around a known activation for a layer to begin as it; "
        "it computes something else. Begin with --init paper, or name another --kind."
    )


def apply_mlp(
    weights: MlpWeights, x: Float[Tensor, "*batch d_in"], activation: str | None
) -> Float[Tensor, "*batch d_out"]:
    """Return what an MLP with these weights makes of x.

    Raises:
        ValueError: If there is no such activation.
    """
    return hidden_units(weights, x, activation) @ weights.W_dec + weights.b_dec


def hidden_units(
    weights: MlpWeights, x: Float[Tensor, "*batch d_in"], activation: str | None
) -> Float[Tensor, "*batch d_hidden"]:
    """Return the hidden layer of an MLP with these weights: what its last linear map is applied to.

    Raises:
        ValueError: If there is no such activation.
    """
    function = activation_function(str(activation))
    hidden = x @ weights.W_enc + weights.b_enc
    if weights.W_enc_gate is None or weights.b_enc_gate is None:
        return function(hidden)
    return function(x @ weights.W_enc_gate + weights.b_enc_gate) * hidden


def _readings(site: MlpSite) -> Iterator[MlpWeights]:
    linears = [found for found in _linears(site.modules) if found is not None]
    if site.activation is None or len(linears) not in (2, 3):
        return
    *up, down = linears
    if down.weight.shape != (site.d_hidden, site.d_out):
        return
    if len(up) == 1 and not site.gated and up[0].weight.shape[1] == site.d_hidden:
        yield MlpWeights(*up[0], None, None, *down)
    elif len(up) == 1 and up[0].weight.shape[1] == 2 * site.d_hidden:
        halves = [_Linear(*parts) for parts in zip(*(tensor.chunk(2, -1) for tensor in up[0]), strict=True)]
        yield from _gated(halves, down)
    elif len(up) == 2:
        yield from _gated(up, down)


def _gated(up: Sequence[_Linear], down: _Linear) -> Iterator[MlpWeights]:
    for gate, other in (up, reversed(up)):
        yield MlpWeights(*other, *gate, *down)


def _linears(modules: Sequence[nn.Module]) -> Iterator[_Linear | None]:
    for module in (inner for outer in modules for inner in outer.modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            continue
        # Conv1D keeps (in, out), Linear (out, in).
        as_used = weight.detach().float() if type(module).__name__ == "Conv1D" else weight.detach().float().t()
        bias = cast("Tensor | None", getattr(module, "bias", None))
        zeros = as_used.new_zeros(as_used.shape[1])
        yield _Linear(as_used, zeros if bias is None else bias.detach().float())


def _placed(site: MlpSite) -> tuple[torch.dtype, torch.device]:
    parameters = (parameter for module in site.modules for parameter in module.parameters())
    first = next((parameter for parameter in parameters if parameter.is_floating_point()), torch.zeros(()))
    return first.dtype, first.device
