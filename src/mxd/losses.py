"""What a student is trained to make small."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def distillation_loss(
    prediction: Float[Tensor, "*batch d_out"], target: Float[Tensor, "*batch d_out"]
) -> Float[Tensor, ""]:
    r"""Return the squared error over the length of each target, averaged over tokens and coordinates.

    $$L = \frac{1}{BO} \sum_{b,o} \frac{(y_{bo} - t_{bo})^2}{\lVert t_b \rVert_2}$$

    The length is not squared, as in the paper's released code (Oldfield et al., 2025; its constant −1 is left out), so
    that a token counts in proportion to its target's length. A target of zeros has no direction to learn and counts 0,
    instead of outweighing all others.
    """
    return _mean_square(prediction - target, target)


def _mean_square(difference: Float[Tensor, "*batch d_out"], target: Float[Tensor, "*batch d_out"]) -> Float[Tensor, ""]:
    return (difference.square() * _weight(target)).mean()


def _weight(target: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch 1"]:
    length = torch.linalg.vector_norm(target, dim=-1, keepdim=True)
    return torch.where(length > 0, 1 / length, 0)


def dead_latent_loss(
    residual: Float[Tensor, "tokens d_out"], prediction: Float[Tensor, "tokens d_out"]
) -> Float[Tensor, ""]:
    r"""Return the share of the residual's square that dead latents, asked to predict it, leave over.

    $$L_\mathrm{aux} = \frac{\sum_b \lVert e_b - \hat e_b \rVert^2}{\sum_b \lVert e_b \rVert^2}$$

    Gao et al. (2024), appendix A.2. The residual is a constant here, and training hands the gradient to what belongs to
    single latents alone (`SparseLayer.latent_parameters`): only the dead latents learn from this loss, and their
    encoder does too, since their code is selected anew among them. A dense branch that all experts share does not.
    """
    residual = residual.detach()
    scale = residual.square().sum().clamp_min(torch.finfo(residual.dtype).tiny)
    return (residual - prediction).square().sum() / scale


def l1_penalty(values: Float[Tensor, "tokens k"], lengths: Float[Tensor, "tokens k"]) -> Float[Tensor, ""]:
    r"""Return the sum of a code's values, each times the length of what it multiplies, averaged over tokens.

    $$L_1 = \frac{1}{B} \sum_{b,n} a_{bn} \lVert c_n \rVert_2$$

    With the length, a latent cannot escape by a small value and a long vector (Oldfield et al., 2025, which leaves it
    out where vectors have unit length).
    """
    return (values * lengths).sum(-1).mean()


def shared_energy(shared: Float[Tensor, "tokens d_out"], target: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    r"""Return the variance of what the shared expert adds, weighed as the distillation loss weighs an error.

    $$L_\mathrm{shared} = \frac{1}{BO} \sum_{b,o} \frac{(s_{bo} - \bar s_o)^2}{\lVert t_b \rVert_2}$$

    The batch's mean is free: what is the same for all tokens is a bias, and explains nothing.
    """
    return _mean_square(shared - shared.mean(0), target)


class SharedMoments(NamedTuple):
    """What a part of a batch has to know of the whole for its share of `shared_energy`."""

    mean: Float[Tensor, " d_out"]
    r"""$\bar s$, the mean of what the shared expert adds."""
    slope: Float[Tensor, " d_out"]
    r"""$\frac{1}{B} \sum_b (s_b - \bar s) / \lVert t_b \rVert_2$."""

    @classmethod
    def of(cls, shared: Float[Tensor, "tokens d_out"], target: Float[Tensor, "tokens d_out"]) -> "SharedMoments":
        """Return those of a whole batch."""
        mean = shared.mean(0)
        return cls(mean, ((shared - mean) * _weight(target)).mean(0))


def shared_energy_of_part(
    shared: Float[Tensor, "tokens d_out"], target: Float[Tensor, "tokens d_out"], whole: SharedMoments
) -> Float[Tensor, ""]:
    r"""Return what a part of a batch has of `shared_energy`, averaged over the part.

    $$\frac{1}{BO} \sum_{b,o} \frac{(s_{bo} - \bar s_o)^2}{\lVert t_b \rVert_2} - 2 c_o (s_{bo} - \bar s_o)$$

    Mean and slope $c$ are constants of the whole batch. Averaged over all its tokens the second term is 0, and its
    gradient is what the mean's own dependence on the shared expert adds: loss and gradient are those of the whole.
    """
    distance = shared - whole.mean
    return _mean_square(distance, target) - 2 * (distance * whole.slope).mean()
