"""What each ablation varies: functions that turn a configuration into a grid, and leave its model and text alone.

All of it is ours: the paper lists its ablations and gives neither values nor numbers (Oldfield et al., 2025).
Parameters stay matched wherever the number of latents is not what varies.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from mxd.training.config import TrainConfig

FEW_LATENTS = 1024
"""Latents where selections are compared: at first, with l1, half of them are active on every token."""


def activation(base: TrainConfig, d_model: int) -> TrainConfig:
    """Activations of the dense encoder, each as a plain encoder and as a GLU (of which SiLU's is called Swish-GLU)."""
    return replace(base, kind=("mxd",), activation=("relu", "gelu", "silu"), encoder=("mlp", "glu"))


def rank(base: TrainConfig, d_model: int) -> TrainConfig:
    """Full-rank experts against low-rank ones at matched parameters, over ranks up to the model's width."""
    ranks = tuple(d_model >> halvings for halvings in range(4, -1, -1))
    return replace(base, kind=("mxd", "low-rank"), rank=ranks)


def experts(base: TrainConfig, d_model: int) -> TrainConfig:
    """Numbers of experts from 1,024 to 65,536 at fixed K: parameters grow with them."""
    return replace(base, kind=("mxd",), num_latents=tuple(2**power for power in range(10, 17)))


def random_k(base: TrainConfig, d_model: int) -> TrainConfig:
    """Training with K drawn anew each step against a fixed one; `mxd evaluate --k` then measures both at other Ks."""
    return replace(base, kind=("mxd", "transcoder"), k=(16, 32, 64), random_k=(False, True))


def selection(base: TrainConfig, d_model: int) -> TrainConfig:
    """The three selections, at few latents; each coefficient of the L1 penalty comes to its own number of active ones.

    One seed and fewer tokens: codes with hundreds of active latents are slow.
    """
    return replace(
        base,
        kind=("mxd", "transcoder"),
        k=(8, 16, 32, 64),
        num_latents=FEW_LATENTS,
        selection=("topk", "batch-topk", "l1"),
        l1_coefficient=(3e-5, 1e-4, 3e-4, 1e-3),
        tokens=min(base.tokens, 2_000_000),
        seeds=1,
    )


def normalization(base: TrainConfig, d_model: int) -> TrainConfig:
    """Rows of latents kept at unit length or left free, for the kinds that have the choice."""
    return replace(base, kind=("mxd", "low-rank", "transcoder"), normalize_experts=(True, False))


def shared_expert(base: TrainConfig, d_model: int) -> TrainConfig:
    """A mixture of decoders with and without an expert that is active on every token, over Ks."""
    return replace(base, kind=("mxd",), k=(8, 16, 32, 64), shared_expert=(False, True))


def sae(base: TrainConfig, d_model: int) -> TrainConfig:
    """A sparse autoencoder of the MLP's output beside two kinds that replace the MLP, over Ks."""
    return replace(base, kind=("mxd", "transcoder", "topk-sae"), k=(8, 16, 32, 64))


def molt(base: TrainConfig, d_model: int) -> TrainConfig:
    """A mixture of linear transforms beside two other kinds, over Ks, its widest transforms of two ranks."""
    return replace(base, kind=("mxd", "transcoder", "molt"), k=(8, 16, 32, 64), rank=(d_model // 4, d_model))


def shared(base: TrainConfig, d_model: int) -> TrainConfig:
    """What a shared expert is charged, beside the paper's three kinds at their best: what docs/method.md draws."""
    return replace(
        base,
        kind=("transcoder", "skip-transcoder", "mxd", "shared-transcoder"),
        k=(16,),
        init=("auto", "model"),
        shared_penalty=(0.03, 0.1, 0.3, 1.0),
        normalize_experts=(True, False),
        tokens=8_000_000,
        schedule="linear",
    )


ABLATIONS: Mapping[str, Callable[[TrainConfig, int], TrainConfig]] = {
    "activation": activation,
    "rank": rank,
    "experts": experts,
    "random-k": random_k,
    "selection": selection,
    "normalization": normalization,
    "shared-expert": shared_expert,
    "sae": sae,
    "molt": molt,
    "shared": shared,
}
"""Every ablation by its name: a function of a configuration and of its model's width."""
