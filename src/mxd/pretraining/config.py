"""What to pre-train, on what, and how."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

import tyro

from mxd.pretraining.mixer import MixerConfig
from mxd.pretraining.surgery import MlpChoice

Schedule = Literal["cosine", "linear", "constant"]
"""How the learning rate falls after the warm-up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """AdamW, its schedule, and what a run computes with."""

    lr: float
    """Learning rate at its peak."""
    final_lr: float = 0.0
    """Learning rate that the schedule falls to; the last step is one short of it."""
    schedule: Schedule = "cosine"
    """How it falls from one to the other after the warm-up: `cosine`, `linear`, or `constant` (not at all)."""
    warmup_steps: int = 0
    """Steps over which it rises from nothing; a run of fewer never reaches the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the mean and of the mean square of gradients."""
    weight_decay: float = 0.1
    """AdamW's weight decay of matrices and factors, the factors of the bias among them; other vectors do not decay."""
    clip: float | None = 1.0
    """Largest norm of the gradient; none to leave it as it is."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; `auto` takes bfloat16 where the processor multiplies it itself."""
    micro_batch: int | None = None
    """Contexts or images of one pass, whose gradients are added up to the batch's; the whole batch by default."""
    seed: int = 0
    """Seed of weights, order and everything random."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `mps` …"""
    threads: int | None = None
    """Threads of the CPU; as many as there are cores by default."""

    def __post_init__(self) -> None:
        for name, rate in {"lr": self.lr, "final-lr": self.final_lr + self.lr}.items():
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"{name} must be a positive number; got {getattr(self, name.replace('-', '_'))}.")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"final-lr must lie in [0, lr], which is {self.lr}; got {self.final_lr}.")
        if self.warmup_steps < 0 or self.seed < 0:
            raise ValueError(f"warmup-steps and seed must be at least 0; got {self.warmup_steps} and {self.seed}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1); got {self.betas}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight-decay must be a finite number of at least 0; got {self.weight_decay}.")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be a finite positive number; got {self.clip}.")
        for name, count in {"micro-batch": self.micro_batch, "threads": self.threads}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1; got {count}.")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of so many."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        share = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.final_lr + share * (self.lr - self.final_lr)


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """A GPT-2 that is trained on text from scratch."""

    recipe: str
    """The recipe these values began as."""
    text: tuple[str, ...]
    """`stdlib`, local files, folders and globs, or one hub dataset."""
    text_field: str = "text"
    """Field of a row that holds the text."""
    split: str = "train"
    """Split of a hub dataset."""
    tokenizer: str = "bundled"
    """Model whose tokenizer is used: `bundled`, a local folder or a hub id."""
    d_model: int = 128
    """Width of the residual stream; the MLPs are four times as wide."""
    num_layers: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads of each block."""
    context: int = 128
    """Tokens of a context."""
    tokens: int = 1_000_000
    """Tokens to train on."""
    batch_tokens: int = 4096
    """Tokens of an optimiser step."""
    eval_tokens: int = 65_536
    """Held-out tokens on which the model is evaluated."""
    eval_every: int = 50
    """Steps between two evaluations."""
    mlp: Annotated[MlpChoice, tyro.conf.arg(name="")] = field(default_factory=MlpChoice)
    """What stands in the place of the MLPs."""
    optimization: Annotated[Optimization, tyro.conf.arg(name="")]
    """How the weights are learnt."""

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def batch_size(self) -> int:
        """Contexts of a step."""
        return self.batch_tokens // self.context

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads", "tokens", "batch_tokens", "eval_tokens", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}.")
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens; got {self.context}.")
        if self.d_model % self.num_heads:
            raise ValueError(f"d-model must be a multiple of num-heads, {self.num_heads}; got {self.d_model}.")
        if self.batch_tokens % self.context:
            raise ValueError(f"batch-tokens must be a multiple of context, {self.context}; got {self.batch_tokens}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """An MLP-Mixer that is trained to classify images from scratch."""

    recipe: str
    """The recipe these values began as."""
    images: str
    """Folder of train.npz and test.npz, each with `images` (count, height, width[, channels]) uint8 and `labels`."""
    mixer: Annotated[MixerConfig, tyro.conf.arg(name="")]
    """The model."""
    epochs: float = 1.0
    """How often the training images are seen."""
    batch_images: int = 128
    """Images of an optimiser step."""
    eval_every: int = 100
    """Steps between two evaluations."""
    mixup: float = 0.0
    """Parameter of the Beta distribution by which pairs of images are mixed; 0 for none."""
    randaugment: tuple[int, int] | None = None
    """Number and magnitude of random augmentations; needs timm (pip install 'mxd[vision]')."""
    mlp: Annotated[MlpChoice, tyro.conf.arg(name="")] = field(default_factory=MlpChoice)
    """What stands in the place of the MLPs."""
    optimization: Annotated[Optimization, tyro.conf.arg(name="")]
    """How the weights are learnt."""

    def __post_init__(self) -> None:
        if self.batch_images < 2 or self.eval_every < 1:
            raise ValueError(
                f"batch-images must be at least 2 and eval-every at least 1; got {self.batch_images} and "
                f"{self.eval_every}."
            )
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs must be a positive number; got {self.epochs}.")
        if not (math.isfinite(self.mixup) and self.mixup >= 0):
            raise ValueError(f"mixup must be a finite number of at least 0; got {self.mixup}.")


PretrainConfig: TypeAlias = LanguageConfig | ImageConfig
"""Either sort of model."""
