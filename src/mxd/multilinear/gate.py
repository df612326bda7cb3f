"""The gate of a multilinear mixture: dense scores, sparse coefficients."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mxd.kernels import linear
from mxd.multilinear.entmax import entmax15

GateName = Literal["entmax", "softmax"]
"""What makes coefficients of scores: 1.5-entmax, whose coefficients are mostly zero, or softmax, whose are not."""
Normalization = Literal["batch", "layer"]
"""Normalisation of the scores, without weights of its own: over the batch (vision) or over the experts (language)."""


def require_experts(num_experts: Sequence[int]) -> None:
    """Check the numbers of experts of a mixture.

    Raises:
        ValueError: If there is no level, or a level has no expert.
    """
    if not num_experts or min(num_experts) < 1:
        raise ValueError(
            f"num_experts must name at least one expert for each of at least one level; got {tuple(num_experts)}."
        )


def require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Check a setting that is one of a few names.

    Raises:
        ValueError: If it is none of them.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")


class ScoreBatchNorm(nn.BatchNorm1d):
    """Batch normalisation in the type of its input, whatever type its statistics are kept in."""

    def forward(self, input: Float[Tensor, "rows count"]) -> Float[Tensor, "rows count"]:
        """Return the normalised scores; training moves the statistics."""
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        wide_mean, wide_variance = mean.to(input.dtype), variance.to(input.dtype)
        result = functional.batch_norm(
            input, wide_mean, wide_variance, training=self.training, momentum=self.momentum or 0.0, eps=self.eps
        )
        if self.training:
            self.get_buffer("num_batches_tracked").add_(1)
            # Otherwise they are the statistics themselves, which the operation has moved.
            if mean.dtype != input.dtype:
                mean.copy_(wide_mean)
                variance.copy_(wide_variance)
        return result


class ExpertGate(nn.Module):
    r"""Coefficients $a = \mathrm{entmax}_{1.5}(\mathrm{norm}(G^\top x))$, one vector for each level of the hierarchy.

    $G$ begins at zero, so that all experts begin with equal coefficients; there is no bias (Oldfield et al., 2024). The
    scores are normalised and made coefficients in float32 or wider, whatever the products' type.
    """

    def __init__(
        self, d_in: int, num_experts: Sequence[int], *, gate: GateName = "entmax", normalization: Normalization
    ) -> None:
        super().__init__()
        require_experts(num_experts)
        require_one_of("gate", gate, get_args(GateName))
        require_one_of("normalization", normalization, get_args(Normalization))
        self.num_experts = tuple(num_experts)
        self.gate = gate
        self.W_gate = nn.ParameterList([nn.Parameter(torch.zeros(d_in, count)) for count in num_experts])
        self.norms = nn.ModuleList(_norm(normalization, count) for count in num_experts)

    def scores(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch _"], ...]:
        """Return the normalised scores of each level, in float32 or wider."""
        normalised: list[Tensor] = []
        for weight, norm in zip(self.W_gate, self.norms, strict=True):
            scores = linear(x, weight)
            wide = torch.promote_types(scores.dtype, torch.float32)
            normalised.append(norm(scores.to(wide).reshape(-1, scores.shape[-1])).view(scores.shape))
        return tuple(normalised)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch _"], ...]:
        """Return the coefficients of each level: not negative, summing to 1."""
        if self.gate == "entmax":
            return tuple(entmax15(scores) for scores in self.scores(x))
        return tuple(functional.softmax(scores, dim=-1) for scores in self.scores(x))


def _norm(normalization: Normalization, count: int) -> nn.Module:
    if normalization == "batch":
        return ScoreBatchNorm(count, affine=False)
    return nn.LayerNorm(count, elementwise_affine=False)
