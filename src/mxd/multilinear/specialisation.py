"""What experts do, by their use and by what is lost without them: tensors in, numbers out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STRONG = 0.5
"""Coefficient from which an input counts as an expert's own (Oldfield et al., 2024)."""
ROWS_AT_ONCE = 4096


def expert_load(
    coefficients: Float[Tensor, "inputs num_experts"], threshold: float = STRONG
) -> Int[Tensor, " num_experts"]:
    """Return the number of inputs on which each expert's coefficient is at least the threshold."""
    return (coefficients >= threshold).sum(0)


class ClassDrops(NamedTuple):
    """What each class loses without each expert, by one measure."""

    drops: Float[Tensor, "num_experts classes"]
    """By how much the class's mean falls when the expert is removed; negative where it rises."""

    @property
    def polysemanticity(self) -> Float[Tensor, " num_experts"]:
        """How many classes each expert matters for; see `polysemanticity`."""
        return polysemanticity(self.drops)

    @property
    def matters(self) -> Bool[Tensor, " num_experts"]:
        """Which experts cost some class something when they are removed."""
        return (self.drops > 0).any(-1)

    @property
    def mean(self) -> float:
        """Mean polysemanticity of the experts that matter; NaN where none does."""
        return float(self.polysemanticity[self.matters].mean())


class Specialisation(NamedTuple):
    """What is lost without each expert, measured twice."""

    accuracy: ClassDrops
    """By each class's accuracy: what the paper describes; it moves only where a decision changes."""
    probability: ClassDrops
    """By the mean probability of the right class, which moves with every input."""


def polysemanticity(drops: Float[Tensor, "num_experts classes"]) -> Float[Tensor, " num_experts"]:
    r"""Return $\lVert p_n - e_{\arg\max p_n} \rVert_2$ with $p_n = [d_n]_+ / \sum_c [d_{nc}]_+$.

    $d_{nc}$ is what class c's accuracy loses without expert n; gains count as nothing, and an expert that costs no
    class anything has no value (NaN). It is 0 for an expert that only one class needs, and $\sqrt{1 - 1/C}$ for one
    that all C classes need alike. The paper's exact formula is not known; this one is ours (docs/multilinear.md).
    """
    losses = drops.clamp_min(0)
    shares = losses / losses.sum(-1, keepdim=True)
    most = torch.nn.functional.one_hot(shares.nan_to_num().argmax(-1), drops.shape[-1])
    return (shares - most).norm(dim=-1)


@torch.no_grad()
def counterfactual_specialisation(
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "inputs d_in"],
    coefficients: Float[Tensor, "inputs num_experts"],
    labels: Int[Tensor, " inputs"],
    num_classes: int,
) -> Specialisation:
    """Remove one expert after the other and see which classes suffer.

    Removing sets its coefficient to zero and changes nothing else. Only inputs on which the coefficient is not zero are
    computed anew, which are few with an entmax gate.

    Args:
        predict: What the rest of the model makes of the mixture's inputs and coefficients: logits.
        x: Inputs of the mixture.
        coefficients: The gate's on them, of a single level.
        labels: Class of each input.
        num_classes: Number of classes.
    """

    def judged(rows: Tensor, given: Tensor, truth: Tensor) -> Tensor:
        # Not every device has float64.
        logits, truth = predict(rows, given).cpu(), truth.cpu()
        right = logits.argmax(-1).eq(truth).to(torch.float64)
        certain = logits.double().softmax(-1).gather(-1, truth[:, None])[:, 0]
        return torch.stack([right, certain], dim=-1)

    parts = zip(x.split(ROWS_AT_ONCE), coefficients.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True)
    before = torch.cat([judged(*part) for part in parts])
    counts = torch.bincount(labels.cpu(), minlength=num_classes).clamp_min(1)
    lost = torch.zeros(coefficients.shape[1], num_classes, 2, dtype=torch.float64)
    for n in range(coefficients.shape[1]):
        for rows in coefficients[:, n].nonzero()[:, 0].split(ROWS_AT_ONCE):
            without = coefficients[rows].index_fill(1, torch.tensor([n], device=x.device), 0.0)
            after = judged(x[rows], without, labels[rows])
            lost[n].index_add_(0, labels[rows].cpu(), before[rows.cpu()] - after)
    accuracy, probability = (lost / counts[:, None]).unbind(-1)
    return Specialisation(ClassDrops(accuracy), ClassDrops(probability))
