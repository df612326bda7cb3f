"""An MLP-Mixer in plain PyTorch, whose weights have the names that timm gives them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mxd.multilinear import MultilinearMLPConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MixerConfig:
    """Shape of an `MlpMixer`; the defaults are those of Mixer S/16 on 224 × 224 images."""

    image_size: int = 224
    """Height and width of an image."""
    channels: int = 3
    """Colour channels of an image."""
    patch_size: int = 16
    """Height and width of a patch."""
    num_blocks: int = 8
    """Number of blocks."""
    d_model: int = 512
    """Width of a patch's vector."""
    d_token: int = 256
    """Hidden width of the MLPs that mix patches."""
    d_channel: int = 2048
    """Hidden width of the MLPs that mix the entries of a vector."""
    num_classes: int = 1000
    """Number of classes."""
    stochastic_depth: float = 0.0
    """Share of the images for which training leaves out the last block's branches; it grows linearly from 0."""

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "patch_size", "num_blocks", "d_model", "d_token", "d_channel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}.")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch-size must divide the image's size, {self.image_size}; got {self.patch_size}. "
                "Choose another --patch-size."
            )
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {self.num_classes}.")
        if not 0 <= self.stochastic_depth < 1:
            raise ValueError(f"stochastic-depth must lie in [0, 1); got {self.stochastic_depth}.")


class Mlp(nn.Module):
    """Two linear layers and a GELU, with timm's names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Return the MLP's output."""
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, a branch's output is zero for a share of the images, and larger for the others."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens d_model"]:
        """Return the branch's output, or nothing of it."""
        if not self.training or self.share == 0:
            return x
        kept = 1 - self.share
        return x * torch.empty(len(x), 1, 1, dtype=x.dtype, device=x.device).bernoulli_(kept) / kept


class MixerBlock(nn.Module):
    """An MLP across patches and one across the entries of each patch's vector, each around a residual."""

    def __init__(self, config: MixerConfig, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model, eps=1e-6)
        self.mlp_tokens = Mlp(config.num_patches, config.d_token)
        self.drop_path = DropPath(drop)
        self.norm2 = nn.LayerNorm(config.d_model, eps=1e-6)
        self.mlp_channels = Mlp(config.d_model, config.d_channel)

    def forward(self, x: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens d_model"]:
        """Return the block's output."""
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class Stem(nn.Module):
    """Cuts an image into patches and maps each to a vector."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.channels, config.d_model, kernel_size=size, stride=size)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens d_model"]:
        """Return the patches' vectors, row by row of the image."""
        return self.proj(images).flatten(2).transpose(1, 2)


class MlpMixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al., 2021): its state dict fits timm's `mixer_s16_224` where the sizes agree.

    It begins as timm's does: Xavier-uniform linear layers, a stem of variance 1 / fan-in, a head of zeros.
    """

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        last = max(1, config.num_blocks - 1)
        drops = [config.stochastic_depth * n / last for n in range(config.num_blocks)]
        self.blocks = nn.Sequential(*(MixerBlock(config, drop) for drop in drops))
        self.norm = nn.LayerNorm(config.d_model, eps=1e-6)
        self.head = nn.Linear(config.d_model, config.num_classes)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.normal_(module.bias, std=1e-6)
        nn.init.kaiming_normal_(self.stem.proj.weight, nonlinearity="linear")
        for parameter in (self.stem.proj.bias, self.head.weight, self.head.bias):
            assert parameter is not None
            nn.init.zeros_(parameter)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        return self.head(self.norm(self.blocks(self.stem(images))).mean(1))


def mixer_config(model: nn.Module) -> MixerConfig | None:
    """Return the shape of an MLP-Mixer of any library with timm's names, mixtures in its blocks or not.

    None for any other model. Stochastic depth, which only training knows, is not read.
    """
    stem, head = (getattr(part, "proj", part) for part in (getattr(model, "stem", None), getattr(model, "head", None)))
    blocks = getattr(model, "blocks", None)
    if not isinstance(stem, nn.Conv2d) or not isinstance(head, nn.Linear) or not isinstance(blocks, nn.Sequential):
        return None
    tokens, channels = (_widths(getattr(blocks[0], name, None)) for name in ("mlp_tokens", "mlp_channels"))
    if tokens is None or channels is None:
        return None
    return MixerConfig(
        image_size=math.isqrt(tokens[0]) * stem.kernel_size[0],
        channels=stem.in_channels,
        patch_size=stem.kernel_size[0],
        num_blocks=len(blocks),
        d_model=channels[0],
        d_token=tokens[1],
        d_channel=channels[1],
        num_classes=head.out_features,
    )


def _widths(mlp: nn.Module | None) -> tuple[int, int] | None:
    """Return the input's and the hidden width of a block's MLP."""
    config, first = getattr(mlp, "config", None), getattr(mlp, "fc1", None)
    if isinstance(config, MultilinearMLPConfig):
        return config.d_in, config.d_hidden
    return (first.in_features, first.out_features) if isinstance(first, nn.Linear) else None
