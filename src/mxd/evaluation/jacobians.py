"""Whether a layer bends as its MLP does: the cosine of their Jacobians."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.metrics import widest_dtype

TokenMap = Callable[[Tensor], Tensor]
"""A differentiable function of each token by itself, from (tokens, d_in) to (tokens, d_out)."""


def jacobian_cosines(
    layer: TokenMap,
    mlp: TokenMap,
    x: Float[Tensor, "tokens d_in"],
    *,
    probes: int = 16,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " tokens"]:
    r"""Return an estimate of the cosine similarity of two functions' Jacobians at each token, in [-1, 1].

    $$\cos_t = \frac{\langle J_t, J^*_t \rangle_F}{\|J_t\|_F \, \|J^*_t\|_F}, \qquad
      J_t = \partial y / \partial x_t, \quad J^*_t = \partial t / \partial x_t$$

    For a vector r of random signs, E[(Jᵀr)·(J*ᵀr)] = ⟨J, J*⟩ (Hutchinson, 1990). Both functions are given the same r,
    drawn anew for each token and probe, and each of the three products is summed over the probes; so the estimate is
    exactly 1 where the Jacobians are equal, and its error falls as 1/√probes. The mean over tokens is the measure that
    Anthropic's circuits updates (2025) compare replacements of MLPs by.

    A sparse layer's selection is taken as fixed, as it is almost everywhere: its Jacobian is that of the latents that
    are active. The cost is one forward pass and `probes` backward passes of each function, no Jacobian is ever held.

    Args:
        layer: The stand-in.
        mlp: What it stands in for.
        x: The tokens at which to differentiate.
        probes: Number of random vectors, at least 1.
        generator: Draws them, on the CPU; PyTorch's own where None.

    Returns:
        The cosines; 0 where one of the Jacobians is zero.

    Raises:
        ValueError: If there is no probe.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1; got {probes}.")

    with torch.enable_grad():
        x = x.detach().requires_grad_()
        predictions, targets = layer(x), mlp(x)
    widest = widest_dtype(x.device)
    sums = x.new_zeros(3, len(x), dtype=widest)
    for _ in range(probes):
        signs = torch.randint(0, 2, targets.shape, generator=generator) * 2 - 1
        # The tokens do not mix, so that one product with the batch's Jacobian is one with every token's.
        ours, theirs = (
            torch.autograd.grad(outputs, x, signs.to(outputs), retain_graph=True)[0].to(widest)
            for outputs in (predictions, targets)
        )
        sums += torch.stack([(one * other).sum(-1) for one, other in ((ours, theirs), (ours, ours), (theirs, theirs))])
    norms = sums[1].sqrt() * sums[2].sqrt()
    return torch.where(norms > 0, sums[0] / torch.where(norms > 0, norms, 1), 0).clamp(-1, 1)
