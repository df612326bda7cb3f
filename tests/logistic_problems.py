"""Small random logistic regressions with protected examples."""

import torch

from mxd.privacy.logistic import LogisticObjective, logistic_constants, with_constant
from mxd.privacy.objective import ObjectiveConfig, Uniformity

KINDS: tuple[Uniformity, ...] = ("kl-u-p", "kl-p-u", "square")


def problem(
    *, kind: Uniformity = "kl-u-p", classes: int = 3, theta: float = 0.6, decay: float = 0.1, seed: int = 0
) -> LogisticObjective:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(classes, (30,), generator=generator)
    config = ObjectiveConfig(theta=theta, weight_decay=decay, uniformity=kind)
    return LogisticObjective(
        protected=with_constant(x[:10]),
        retained=with_constant(x[10:]),
        labels=labels,
        num_classes=classes,
        config=config,
    )


def random_problem(seed: int, kind: Uniformity) -> LogisticObjective:
    generator = torch.Generator().manual_seed(seed)
    classes = int(torch.randint(2, 6, (1,), generator=generator))
    theta = float(0.05 + 0.9 * torch.rand(1, generator=generator))
    base = problem(kind=kind, classes=classes, theta=theta, decay=1.0, seed=seed)
    needed = logistic_constants(base).smallest_weight_decay
    decay = needed + float(10 ** (2 * torch.rand(1, generator=generator) - 2))
    return problem(kind=kind, classes=classes, theta=theta, decay=decay, seed=seed)
