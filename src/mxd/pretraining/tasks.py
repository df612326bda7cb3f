"""What is trained: a language model on text, or an MLP-Mixer on images; each knows its batches and its evaluation."""

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from mxd.atomic import JSON
from mxd.bundled import held_out_modules
from mxd.data.text import TextSource, open_text
from mxd.data.tokenization import Tokenizer, eos_token, tokenizer_digest
from mxd.data.tokens import HeldOut, TokenPosition, TokenStream, held_out_contexts, open_tokens
from mxd.models import load_tokenizer
from mxd.multilinear import MultilinearMLPConfig
from mxd.pretraining.ahead import ContextsAhead
from mxd.pretraining.config import ImageConfig, LanguageConfig
from mxd.pretraining.images import (
    ImageOrder,
    LabelledImages,
    Standardization,
    read_images,
    standardization_of,
)
from mxd.pretraining.mixer import MlpMixer
from mxd.pretraining.surgery import replace_mlps

EVALUATED_AT_ONCE = 16_384
"""Tokens, or 32 times images, of one pass in evaluation."""


class Batch(NamedTuple):
    """What one optimiser step sees."""

    inputs: Tensor
    """Contexts of token ids, or images."""
    targets: Tensor
    """What should come out; for text the contexts again."""

    def split(self, size: int | None) -> list["Batch"]:
        """Return the batch in parts of at most `size`."""
        if size is None or size >= len(self.inputs):
            return [self]
        return [Batch(*pair) for pair in zip(self.inputs.split(size), self.targets.split(size), strict=True)]


@runtime_checkable
class Task(Protocol):
    """What the loop needs to know of a model and its data."""

    model: nn.Module
    unit: str
    steps: int
    units_per_step: int
    blocks: Mapping[str, MultilinearMLPConfig]

    def next_batch(self, generator: torch.Generator) -> Batch:
        """Return the next batch, on the model's device; whatever is random in it comes from the generator."""
        ...

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean loss of a batch."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Return what the model is worth on held-out data."""
        ...

    def position(self) -> Mapping[str, JSON]:
        """Return where in the data the next batch is."""
        ...

    def restore(self, position: Mapping[str, JSON]) -> None:
        """Go to a position that `position` gave."""
        ...


class LanguageData(NamedTuple):
    """Text, cut into contexts."""

    source: TextSource
    """The documents."""
    tokenizer: Tokenizer
    """What makes tokens of them."""
    tokens: TokenStream
    """Training contexts."""
    held_out: HeldOut
    """Contexts to evaluate on."""
    vocabulary: int
    """Number of token ids."""

    @property
    def identity(self) -> dict[str, JSON]:
        """Return what was read, for `run.json`."""
        return {"text": self.source.identity._asdict(), "tokenizer": tokenizer_digest(self.tokenizer)}


def read_language(config: LanguageConfig, revision: str | None = None) -> LanguageData:
    """Return the text that a configuration names.

    Args:
        config: The configuration.
        revision: Commit of a hub dataset; the newest where None.

    Raises:
        ValueError: If the text is too short or cannot be used.
        FileNotFoundError: If the text or the tokenizer is not there.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    vocabulary = len(cast(Any, tokenizer))
    source = open_text(
        config.text,
        text_field=config.text_field,
        split=config.split,
        revision=revision,
        held_out_modules=held_out_modules(),
    )
    tokens = open_tokens(
        source,
        tokenizer,
        context=config.context,
        batch_tokens=config.batch_tokens,
        vocab_size=vocabulary,
        seed=config.optimization.seed,
    )
    held_out = held_out_contexts(
        source, tokenizer, context=config.context, num_tokens=config.eval_tokens, vocab_size=vocabulary
    )
    return LanguageData(source, tokenizer, tokens, held_out, vocabulary)


class LanguageTask:
    """A GPT-2 whose MLPs were replaced, on text; what is not an MLP begins alike whatever the MLPs are."""

    unit = "tokens"

    def __init__(self, config: LanguageConfig, data: LanguageData, device: str) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        end = eos_token(data.tokenizer)
        shape = GPT2Config(
            vocab_size=data.vocabulary,
            n_positions=config.context,
            n_embd=config.d_model,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
        self.model, self.blocks = build(lambda: GPT2LMHeadModel(shape), config, device)
        self.steps, self.units_per_step = config.steps, config.batch_tokens
        self._data, self._device = data, device
        self._contexts = ContextsAhead(data.tokens, config.batch_size, ahead=torch.device(device).type == "cuda")

    def next_batch(self, generator: torch.Generator) -> Batch:
        """Return the next contexts."""
        contexts = self._contexts.take().to(self._device)
        return Batch(contexts, contexts)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean cross-entropy of the next tokens, in nats."""
        logits = cast(Tensor, self.model(batch.inputs, use_cache=False).logits)
        return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch.targets[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return cross-entropy in nats a token, and bits a byte, on the held-out contexts."""
        contexts, total = self._data.held_out.contexts, 0.0
        for part in contexts.split(max(1, EVALUATED_AT_ONCE // contexts.shape[1])):
            rows = part.to(self._device)
            total += float(self.loss(Batch(rows, rows))) * rows[:, 1:].numel()
        found = {"held_out_loss": total / contexts[:, 1:].numel()}
        num_bytes = self._data.held_out.num_bytes
        return found if not num_bytes else found | {"bits_per_byte": total / math.log(2) / num_bytes}

    def position(self) -> Mapping[str, JSON]:
        """Return where in the text the next context is."""
        return cast("Mapping[str, JSON]", self._contexts.position()._asdict())

    def restore(self, position: Mapping[str, JSON]) -> None:
        """Go to a position in the text."""
        self._contexts.restore(TokenPosition(**cast("dict[str, int]", dict(position))))


class ImageData(NamedTuple):
    """Images to train and to evaluate on."""

    train: LabelledImages
    """What is trained on."""
    test: LabelledImages
    """What is evaluated on."""

    @property
    def identity(self) -> dict[str, JSON]:
        """Return what was read, for `run.json`."""
        digest = hashlib.sha256()
        for part in self:
            digest.update(part.images.numpy().tobytes() + part.labels.numpy().tobytes())
        counts = {"train_images": len(self.train.labels), "test_images": len(self.test.labels)}
        return {**counts, "sha256": digest.hexdigest()}


def read_image_folder(config: ImageConfig) -> ImageData:
    """Return the images that a configuration names.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If they do not fit the model.
    """
    folder = Path(config.images).expanduser()
    data = ImageData(read_images(folder / "train.npz"), read_images(folder / "test.npz"))
    mixer = config.mixer
    wanted = (mixer.channels, mixer.image_size, mixer.image_size)
    for part in data:
        if tuple(part.images.shape[1:]) != wanted:
            raise ValueError(
                f"images in {folder} must have channels, height and width {wanted}, as the model; got "
                f"{tuple(part.images.shape[1:])}. Set --channels and --image-size."
            )
        if int(part.labels.max()) >= mixer.num_classes:
            raise ValueError(
                f"labels in {folder} must be below num-classes, {mixer.num_classes}; got {int(part.labels.max())}."
            )
    return data


class ImageTask:
    """An MLP-Mixer whose MLPs were replaced, on images."""

    unit = "images"

    def __init__(self, config: ImageConfig, data: ImageData, device: str) -> None:
        self.model, self.blocks = build(lambda: MlpMixer(config.mixer), config, device)
        self._order = ImageOrder(len(data.train.labels), config.batch_images, config.optimization.seed)
        self.steps = max(1, math.floor(config.epochs * self._order.steps_per_epoch))
        self.units_per_step = config.batch_images
        self._standardise = standardization_of(data.train)
        self._data, self._device, self._config = data, device, config
        self._augment = None if config.randaugment is None else RandAugment(*config.randaugment)

    @property
    def standardise(self) -> Standardization:
        """What images go through before the model."""
        return self._standardise

    def next_batch(self, generator: torch.Generator) -> Batch:
        """Return the next images, augmented and mixed in pairs where the configuration says so."""
        chosen = self._data.train.select(self._order.take())
        images = chosen.images if self._augment is None else self._augment(chosen.images, generator)
        inputs = self._standardise(images).to(self._device)
        targets = functional.one_hot(chosen.labels, self._config.mixer.num_classes).float().to(self._device)
        if self._config.mixup:
            seed = int(torch.randint(2**31, (), generator=generator))
            share = float(np.random.default_rng(seed).beta(self._config.mixup, self._config.mixup))
            inputs = share * inputs + (1 - share) * inputs.flip(0)
            targets = share * targets + (1 - share) * targets.flip(0)
        return Batch(inputs, targets)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean cross-entropy."""
        return functional.cross_entropy(self.model(batch.inputs).float(), batch.targets)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return cross-entropy and accuracy on the test images."""
        test, loss, right = self._data.test, 0.0, 0
        for images, labels in zip(
            test.images.split(EVALUATED_AT_ONCE // 32), test.labels.split(EVALUATED_AT_ONCE // 32), strict=True
        ):
            logits = self.model(self._standardise(images).to(self._device)).float()
            there = labels.to(self._device)
            loss += float(functional.cross_entropy(logits, there, reduction="sum"))
            right += int((logits.argmax(1) == there).sum())
        return {"held_out_loss": loss / len(test.labels), "accuracy": right / len(test.labels)}

    def position(self) -> Mapping[str, JSON]:
        """Return where in the order of images the next batch is."""
        return self._order.state()

    def restore(self, position: Mapping[str, JSON]) -> None:
        """Go to a position in the order of images."""
        self._order.restore(position)


class RandAugment:
    """Timm's RandAugment (Cubuk et al., 2020) of one image after the other.

    Args:
        count: Augmentations of each image.
        magnitude: How strong they are. As timm reads it, 10 is the strongest and what is above acts as 10; each
            augmentation is applied with probability one half.

    Raises:
        ValueError: If timm is not installed or cannot be imported.
    """

    def __init__(self, count: int, magnitude: int) -> None:
        try:
            from timm.data.auto_augment import (  # pyright: ignore[reportMissingImports]
                rand_augment_transform,
            )
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"randaugment needs timm, which cannot be imported here ({error}); run pip install 'mxd[vision]', or "
                "train without it: --randaugment None."
            ) from error
        self._transform = rand_augment_transform(f"rand-m{magnitude}-n{count}", {})

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Return augmented images; timm draws from Python's and NumPy's global states, which are seeded here."""
        import random

        from PIL import Image

        seed = int(torch.randint(2**31, (), generator=generator))
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 # it is what timm reads
        arrays = images.permute(0, 2, 3, 1).squeeze(-1).numpy()
        changed = [np.asarray(self._transform(Image.fromarray(array))) for array in arrays]
        stacked = torch.from_numpy(np.stack(changed))
        return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def build(
    make: Callable[[], nn.Module], config: LanguageConfig | ImageConfig, device: str
) -> tuple[nn.Module, Mapping[str, MultilinearMLPConfig]]:
    """Return a model with its MLPs replaced, and their shapes.

    The dense model is drawn first, so that equal seeds give equal weights outside the MLPs whatever stands for these.
    """
    seed = config.optimization.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    blocks = replace_mlps(model, config.mlp, torch.Generator().manual_seed(seed + 1))
    return model.to(device).train(), blocks
