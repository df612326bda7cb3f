"""Small classifiers of standard blocks, and how one stands on disk: `config.json` + `model.safetensors`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from mxd.atomic import JSON, json_text, write_together
from mxd.tensor_files import read_tensors, require_described

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
EARLIER_NAMES = {"classes": "num_classes"}
"""What settings were called in a config.json that an earlier version wrote, and are called now."""


class PixelNormalization(nn.Module):
    """Subtracts a mean and divides by a standard deviation, channel by channel, inside the model.

    Data then are pixels from 0 to 1 everywhere, and an attack that is clamped to [0, 1] stays among images.

    Args:
        mean: A number for each channel.
        std: A number above 0 for each channel.
    """

    mean: Float[Tensor, "channels 1 1"]
    std: Float[Tensor, "channels 1 1"]

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The pixels, normalised."""
        return (pixels - self.mean) / self.std


@dataclass(frozen=True, kw_only=True, slots=True)
class LogisticRegressionConfig:
    """Multinomial logistic regression: one linear layer."""

    architecture: ClassVar[str] = "logistic-regression"
    d_in: int
    """Numbers in an example, however it is shaped."""
    num_classes: int
    """Number of classes."""

    def build(self) -> nn.Module:
        """A model with new weights."""
        return nn.Sequential(nn.Flatten(), nn.Linear(self.d_in, self.num_classes))


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpConfig:
    """A multilayer perceptron with ReLU."""

    architecture: ClassVar[str] = "mlp"
    d_in: int
    """Numbers in an example, however it is shaped."""
    num_classes: int
    """Number of classes."""
    hidden: tuple[int, ...] = (100,)
    """Width of each hidden layer; the paper's has one of 100."""

    def build(self) -> nn.Module:
        """A model with new weights."""
        widths = (self.d_in, *self.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], self.num_classes))


@dataclass(frozen=True, kw_only=True, slots=True)
class SlimResNetConfig:
    """A residual network of basic blocks (He et al., 2016), slim enough for a processor: about 0.2 million weights."""

    architecture: ClassVar[str] = "slim-resnet"
    num_classes: int = 10
    """Number of classes."""
    channels: int = 1
    """Channels of an image."""
    widths: tuple[int, ...] = (16, 32, 128)
    """Channels of each stage; every stage after the first halves height and width."""
    blocks: int = 1
    """Basic blocks a stage."""
    stem_stride: int = 2
    """Stride of the first convolution."""
    mean: tuple[float, ...] = (0.1307,)
    """Mean of each channel's pixels, MNIST's unless given."""
    std: tuple[float, ...] = (0.3081,)
    """Standard deviation of each channel's pixels, MNIST's unless given."""

    def __post_init__(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"mean and std must have a number for each of the {self.channels} channels; got {len(self.mean)} and "
                f"{len(self.std)}."
            )

    def build(self) -> nn.Module:
        """A model with new weights."""
        width = self.widths[0]
        layers: list[nn.Module] = [
            PixelNormalization(self.mean, self.std),
            nn.Conv2d(self.channels, width, 3, stride=self.stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        for stage, after in enumerate(self.widths):
            for block in range(self.blocks):
                layers.append(BasicBlock(width, after, stride=2 if stage > 0 and block == 0 else 1))
                width = after
        model: nn.Module = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, self.num_classes)
        )
        # On a processor a training step takes a quarter of the time with the channels last.
        return cast(Any, model).to(memory_format=torch.channels_last)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: relu(F(x) + x), with a 1×1 convolution on x where shapes differ.

    He et al. (2016), section 3.3, option B.

    Args:
        width: Channels of the input.
        after: Channels of the output.
        stride: By how much height and width shrink.
    """

    def __init__(self, width: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        same = width == after and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(width, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(
        self, x: Float[Tensor, "batch width height breadth"]
    ) -> Float[Tensor, "batch after height_out breadth_out"]:
        """The block's output."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


ClassifierConfig: TypeAlias = LogisticRegressionConfig | MlpConfig | SlimResNetConfig
_CONFIGS: dict[str, type[ClassifierConfig]] = {
    config.architecture: config for config in (LogisticRegressionConfig, MlpConfig, SlimResNetConfig)
}


def save_classifier(folder: Path, config: ClassifierConfig, model: nn.Module, class_names: Sequence[str] = ()) -> None:
    """Write a classifier's configuration, weights and names of classes into a folder, which is made if need be.

    Raises:
        ValueError: If the weights are not those of the configuration.
        OSError: If they cannot be written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    require_described(folder / WEIGHTS_FILE, config.build().state_dict(), weights)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, object] = {"format": 1, "architecture": config.architecture, "settings": asdict(config)}
    content |= {"class_names": list(class_names)} if class_names else {}
    text = json_text(cast(JSON, content))
    write_together({folder / WEIGHTS_FILE: save(weights), folder / CONFIG_FILE: text.encode()})


class LoadedClassifier(NamedTuple):
    """A classifier read from a folder."""

    config: ClassifierConfig
    """What it is."""
    model: nn.Module
    """It, in evaluation mode."""
    class_names: tuple[str, ...] = ()
    """Names of its classes in their order, where it was saved with any."""


def load_classifier(folder: Path) -> LoadedClassifier:
    """Read a classifier that `save_classifier` wrote.

    Raises:
        FileNotFoundError: If the folder or one of the two files does not exist.
        ValueError: If the configuration is not one of ours, or the weights are damaged, not finite, or others than it
            asks for.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"a model's folder must hold {name}; {folder} does not; check the path.")
    config, class_names = _read_config(folder / CONFIG_FILE)
    weights = read_tensors(folder / WEIGHTS_FILE)
    model = config.build()
    require_described(folder / WEIGHTS_FILE, model.state_dict(), weights)
    model.load_state_dict(weights)
    return LoadedClassifier(config, model.eval(), class_names)


def is_classifier(folder: Path) -> bool:
    """Whether a folder's `config.json` is that of a classifier of ours, and not of a transformers model."""
    try:
        content: object = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "architecture" in cast("dict[str, object]", content)


def _read_config(path: Path) -> tuple[ClassifierConfig, tuple[str, ...]]:
    known = ", ".join(_CONFIGS)
    try:
        content = json.loads(path.read_text("utf-8"))
        config = _CONFIGS[content["architecture"]]
        settings: dict[str, Any] = {
            EARLIER_NAMES.get(str(name), str(name)): tuple(value) if isinstance(value, list) else value
            for name, value in content["settings"].items()
        }
        return config(**settings), tuple(str(name) for name in content.get("class_names", []))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold a classifier's architecture (one of {known}) and settings; it does not "
            f"({type(error).__name__}: {error})."
        ) from error
