"""What uncertainty is compared with: training without the protected examples, and four ways to blur them.

Ashiq et al. (2025) name them; where they leave a detail open, the docstring says how it is read here. All train a new
model by `fit_classifier`; none looks at test data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.privacy.examples import Examples, join, predict_all
from mxd.privacy.fitting import FitConfig, fit_classifier

Fresh = Callable[[], nn.Module]
"""Builds the model with new weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    """Settings of the baselines, the paper's unless given."""

    fit: FitConfig
    """How each model is trained."""
    num_classes: int
    """Number of classes."""
    copies: int = 25
    """Samples with random labels around each protected input; the paper has 5 to 5,000."""
    radius: float = 8 / 255
    """Radius of the ball that they are drawn from."""
    epsilon: float = 2.0
    """ε of label differential privacy."""
    noise: float = 0.1
    """Standard deviation of the noise on the images that keep their labels."""
    seed: int = 0
    """Of all draws."""


def retrain(fresh: Fresh, retained: Examples, config: BaselineConfig) -> nn.Module:
    """A model trained on the retained examples alone.

    It has not seen the protected examples, and is as confident on them as on any other: forgetting is not uncertainty.
    """
    model = fresh()
    fit_classifier(model, retained, config.fit)
    return model


def random_labels_around(fresh: Fresh, protected: Examples, retained: Examples, config: BaselineConfig) -> nn.Module:
    """A model trained on the retained examples and on points near each protected one with random labels.

    Points are uniform in the Euclidean ball around the protected input, clamped to [0, 1]; labels uniform over classes.
    """
    generator = torch.Generator().manual_seed(config.seed)
    around = _numbers(protected).repeat_interleave(config.copies, 0)
    drawn = (around + points_in_ball(around, config.radius, generator)).clamp(0, 1)
    labels = torch.randint(config.num_classes, (len(drawn),), generator=generator)
    model = fresh()
    fit_classifier(model, join(retained, Examples(inputs=drawn, labels=labels)), config.fit)
    return model


def gaussian_uniform(fresh: Fresh, protected: Examples, retained: Examples, config: BaselineConfig) -> nn.Module:
    """A model trained on retained examples, noisy protected ones with true labels and clean ones with random labels.

    The paper's description names noisy images with true labels and clean ones with uniform labels, and not which; here
    both are the protected ones, since random labels on all clean images would leave no accuracy to compare.
    """
    generator = torch.Generator().manual_seed(config.seed)
    clean = _numbers(protected).repeat_interleave(config.copies, 0)
    noisy = (clean + config.noise * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    true = protected.labels.repeat_interleave(config.copies)
    random = torch.randint(config.num_classes, (len(clean),), generator=generator)
    both = Examples(inputs=torch.cat([noisy, clean]), labels=torch.cat([true, random]))
    model = fresh()
    fit_classifier(model, join(retained, both), config.fit)
    return model


def label_private(fresh: Fresh, examples: Examples, config: BaselineConfig) -> nn.Module:
    """A model trained with ε-differential privacy of every label, in two stages (Ghazi et al., 2021, LP-2ST).

    Half the examples get labels by randomised response; a model trained on them (mixup α = 16) is the prior by which
    the other half's labels are drawn; the last model is trained on both halves (mixup α = 8). Each label is drawn once,
    so that the whole is ε-private.

    Args:
        fresh: Builds the model.
        examples: All of them, the protected ones too.
        config: ε, and how to train.
    """
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(examples), generator=generator)
    halves = [examples.take(order[: len(order) // 2]), examples.take(order[len(order) // 2 :])]
    uniform = torch.full((len(halves[0]), config.num_classes), 1 / config.num_classes)
    first = halves[0].with_labels(private_labels(halves[0].labels, uniform, config.epsilon, generator))
    teacher = fresh()
    fit_classifier(teacher, first, replace(config.fit, mixup=16.0))
    prior = predict_all(teacher, halves[1]).logits.softmax(-1)
    second = halves[1].with_labels(private_labels(halves[1].labels, prior, config.epsilon, generator))
    model = fresh()
    fit_classifier(model, join(first, second), replace(config.fit, mixup=8.0))
    return model


def private_labels(
    labels: Int[Tensor, " n"], prior: Float[Tensor, "n classes"], epsilon: float, generator: torch.Generator
) -> Int[Tensor, " n"]:
    r"""Labels by randomised response with a prior (Ghazi et al., 2021, algorithms 1 to 3), ε-private each.

    With the k likeliest classes of the prior, a label among them is kept with probability
    $e^\epsilon/(e^\epsilon+k-1)$, else another of the k is drawn; a label that is not among them is replaced by a
    uniform one of the k. For each example k is the one with which the label most likely is right under the prior. A
    uniform prior gives k = the number of classes: plain randomised response.

    Args:
        labels: The true labels.
        prior: Probabilities that do not depend on these labels.
        epsilon: ε of each label.
        generator: Of the draws.
    """
    classes = prior.shape[-1]
    ranked = prior.argsort(dim=-1, descending=True)
    sizes = torch.arange(1, classes + 1)
    keep = math.exp(epsilon) / (math.exp(epsilon) + sizes - 1)
    best = (keep * prior.gather(1, ranked).cumsum(-1)).argmax(-1)
    size, kept = sizes[best], keep[best]
    rank = (ranked == labels[:, None]).long().argmax(-1)
    draws = torch.rand(len(labels), 2, generator=generator, dtype=torch.float64)
    anyone = (draws[:, 1] * size).long().clamp_max(classes - 1)
    # One of the k − 1 others: the own rank is skipped.
    other = (draws[:, 1] * (size - 1)).long()
    other = torch.where(other >= rank, other + 1, other)
    chosen = torch.where(rank < size, torch.where(draws[:, 0] < kept, rank, other), anyone)
    return ranked.gather(1, chosen[:, None])[:, 0]


def points_in_ball(
    around: Float[Tensor, " n *shape"], radius: float, generator: torch.Generator
) -> Float[Tensor, " n *shape"]:
    """Offsets that are uniform in the Euclidean ball: a direction, times the radius times U^(1/d)."""
    flat = torch.randn(around.shape, generator=generator).flatten(1)
    direction = flat / flat.norm(dim=1, keepdim=True)
    share = torch.rand(len(flat), 1, generator=generator, dtype=torch.float64).pow(1 / flat.shape[1]).float()
    return (radius * share * direction).reshape(around.shape)


def _numbers(examples: Examples) -> Tensor:
    if not isinstance(examples.inputs, Tensor) or examples.labels_of != "example":
        raise ValueError("this baseline blurs numbers with one label each; got named tensors or labels of positions.")
    return examples.inputs
