"""What a student is trained to make small."""

import torch
from jaxtyping import Float
from torch import Tensor


def distillation_loss(
    prediction: Float[Tensor, "*batch d_out"], target: Float[Tensor, "*batch d_out"]
) -> Float[Tensor, ""]:
    r"""Return the squared error over the length of each target, averaged over tokens and coordinates.

    $$L = \frac{1}{BO} \sum_{b,o} \frac{(y_{bo} - t_{bo})^2}{\lVert t_b \rVert_2}$$

    The length is not squared, as in the paper's released code (papers.md 1.3; its constant −1 is left out), so that
    a token counts in proportion to its target's length. A target of zeros counts as one of the type's rounding
    unit (1.2e-7 in float32), so that the loss stays finite.
    """
    length = torch.linalg.vector_norm(target, dim=-1, keepdim=True).clamp_min(torch.finfo(target.dtype).eps)
    return ((prediction - target).square() / length).mean()


def dead_latent_loss(
    residual: Float[Tensor, "tokens d_out"], prediction: Float[Tensor, "tokens d_out"]
) -> Float[Tensor, ""]:
    r"""Return the share of the residual's square that dead latents, asked to predict it, leave over.

    $$L_\mathrm{aux} = \frac{\sum_b \lVert e_b - \hat e_b \rVert^2}{\sum_b \lVert e_b \rVert^2}$$

    Gao et al. (2024), appendix A.2. The residual is a constant here: only the dead latents learn from this loss, and
    their encoder does too, since their code is selected anew among them.
    """
    residual = residual.detach()
    scale = residual.square().sum().clamp_min(torch.finfo(residual.dtype).tiny)
    return (residual - prediction).square().sum() / scale
