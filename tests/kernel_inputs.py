"""Random tensors, gradients and layers for the tests of the kernels."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mxd.layers import (
    LinearTransformMixtureConfig,
    LowRankMixtureConfig,
    MixtureOfDecodersConfig,
    SharedTranscoderConfig,
    SkipTranscoderConfig,
    TopKAutoencoderConfig,
    TranscoderConfig,
)

sizes = st.integers(1, 7)
seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0, by_column: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    stored = shape[::-1] if by_column else shape
    values = torch.randn(*stored, generator=generator, dtype=torch.float64)
    return (values.t() if by_column else values).requires_grad_()


def dense_gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


LAYER_CONFIGS = {
    "mxd": MixtureOfDecodersConfig(d_in=5, d_hidden=9, d_out=6, num_experts=997, k=3),
    "transcoder": TranscoderConfig(d_in=5, d_out=6, num_latents=997, k=3),
    "skip-transcoder": SkipTranscoderConfig(d_in=5, d_out=6, num_latents=997, k=3),
    "shared-transcoder": SharedTranscoderConfig(d_in=5, d_hidden=6, d_out=6, num_latents=997, k=3),
    "topk-sae": TopKAutoencoderConfig(d_in=5, num_latents=997, k=3),
    "low-rank": LowRankMixtureConfig(d_in=5, d_hidden=6, d_out=6, num_experts=997, rank=4, k=3),
    "molt": LinearTransformMixtureConfig(d_in=5, d_out=6, num_latents=997, rank=4, k=3),
}


def with_latents(config: Any, num_latents: int) -> Any:
    """Return a layer's configuration with so many latents, or experts."""
    return replace(config, **{"num_experts" if hasattr(config, "num_experts") else "num_latents": num_latents})
