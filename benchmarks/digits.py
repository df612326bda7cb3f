"""A small convolutional classifier of MNIST with a wide layer before its output, for the two `digit_` scripts.

Scripts in this folder import it by its plain name, as they do `harness`.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mxd.multilinear import CPMixture, CPMixtureConfig, GateName, TRMixture, TRMixtureConfig, matched_rank, ranks_of
from mxd.pretraining.images import ImageOrder, LabelledImages, read_images

WIDTH, CLASSES = 1024, 10
BATCH = 128


class Digits(NamedTuple):
    """Images scaled to mean 0 and deviation 1, and their labels."""

    images: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """Two convolutions, a linear layer, the wide layer that is replaced, and the output."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(784, WIDTH),
            nn.GELU(),
        )
        self.wide: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.wide(self.trunk(images)))

    def after(self, wide: Tensor) -> Tensor:
        """Return what the model makes of the wide layer's output."""
        return self.head(functional.gelu(wide))


def load_digits(folder: Path) -> tuple[Digits, Digits]:
    """Return the 60,000 training and 10,000 test digits, shuffled once: a file may have them by class."""
    parts = [read_images(folder / f"{name}.npz") for name in ("train", "test")]
    train, test = (
        part.select(torch.randperm(len(part.labels), generator=torch.Generator().manual_seed(0))) for part in parts
    )
    return digits_of(train), digits_of(test)


def digits_of(data: LabelledImages) -> Digits:
    return Digits((data.images.float() / 255 - 0.1307) / 0.3081, data.labels)


def wide_layer(kind: str, num_experts: int, gate: GateName, seed: int) -> nn.Module:
    """Return a layer of 1024 → 1024 with as many parameters as a linear one."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "linear":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Linear(WIDTH, WIDTH)
    if kind == "cp":
        rank = matched_rank("cp", WIDTH, WIDTH, (num_experts,)).rank
        return CPMixture(
            CPMixtureConfig(
                d_in=WIDTH, d_out=WIDTH, num_experts=(num_experts,), rank=rank, gate=gate, normalization="batch"
            ),
            generator,
        )
    rank = matched_rank("tr", WIDTH, WIDTH, (num_experts,)).rank
    ranks = ranks_of("tr", rank, 1)
    return TRMixture(
        TRMixtureConfig(
            d_in=WIDTH, d_out=WIDTH, num_experts=(num_experts,), ranks=ranks, gate=gate, normalization="batch"
        ),
        generator,
    )


def fit(model: Classifier, data: Digits, *, epochs: float, lr: float, seed: int) -> None:
    """Train the whole model; the rate warms up over 50 steps and falls linearly to nothing."""
    order = ImageOrder(len(data.labels), BATCH, seed)
    steps = int(epochs * order.steps_per_epoch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, (steps - step) / max(1, steps - 50))
        chosen = order.take()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.train()(data.images[chosen])
        functional.cross_entropy(logits.float(), data.labels[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def predictions(model: Classifier, images: Tensor) -> Tensor:
    """Return the predicted classes."""
    return torch.cat([model.eval()(part).argmax(1) for part in images.split(1000)])


def accuracy(model: Classifier, data: Digits) -> float:
    return float(predictions(model, data.images).eq(data.labels).float().mean())


@torch.no_grad()
def wide_inputs(model: Classifier, images: Tensor) -> Tensor:
    """Return what the wide layer reads."""
    return torch.cat([model.eval().trunk(part) for part in images.split(1000)])
