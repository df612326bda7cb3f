"""Images as arrays: read from disk, shuffled, made batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

from mxd.atomic import JSON


class LabelledImages(NamedTuple):
    """Images and what they show."""

    images: UInt8[Tensor, "count channels height width"]
    """Grey values or colours from 0 to 255."""
    labels: Int[Tensor, " count"]
    """Class of each image, from 0."""

    def select(self, indices: Int[Tensor, " chosen"]) -> "LabelledImages":
        """Return some of the images."""
        return LabelledImages(self.images[indices], self.labels[indices])


def read_images(file: Path) -> LabelledImages:
    """Return the images of an .npz file with the arrays `images` and `labels`; nothing is unpickled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} must be an .npz file with arrays images and labels; there is none. Give the folder with --images."
        )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = (np.asarray(arrays[name]) for name in ("images", "labels"))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ValueError(f"{file} must be an .npz file with arrays images and labels; {error}.") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) == 0:
        raise ValueError(
            f"images in {file} must be uint8 and (count, height, width) or (count, height, width, channels); got "
            f"{images.dtype} {images.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1] or int(labels.min()) < 0:
        raise ValueError(
            f"labels in {file} must be one whole number of at least 0 for each of {len(images)} images; got "
            f"{labels.dtype} {labels.shape}."
        )
    shaped = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return LabelledImages(torch.from_numpy(np.ascontiguousarray(shaped)), torch.from_numpy(labels.astype(np.int64)))


class ImageOrder:
    """Batches of image numbers without end, in an order that is drawn anew from `(seed, epoch)` each epoch.

    An epoch's last batch is left out where it is not full.

    Args:
        count: Number of images.
        batch: Images of a batch.
        seed: Seed of the orders.

    Raises:
        ValueError: If there are fewer images than a batch holds.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        if count < batch:
            raise ValueError(f"batch-images must be at most the number of training images, {count}; got {batch}.")
        self._count, self._batch, self._seed = count, batch, seed
        self.restore({"epoch": 0, "item": 0})

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self._count // self._batch

    def take(self) -> Int[Tensor, " batch"]:
        """Return the next batch's numbers."""
        if self._item + self._batch > self._count:
            self.restore({"epoch": self._epoch + 1, "item": 0})
        chosen = self._order[self._item : self._item + self._batch]
        self._item += self._batch
        return torch.from_numpy(chosen)

    def state(self) -> Mapping[str, JSON]:
        """Return the position of the next batch."""
        return {"epoch": self._epoch, "item": self._item}

    def restore(self, position: Mapping[str, JSON]) -> None:
        """Go to a position that `state` gave."""
        self._epoch, self._item = cast(int, position["epoch"]), cast(int, position["item"])
        order: Integer[np.ndarray, " count"] = np.random.default_rng([self._seed, self._epoch]).permutation(self._count)
        self._order = order.astype(np.int64)


class Standardization(NamedTuple):
    """Mean and deviation of the training images' channels, by which all images are standardised."""

    mean: Float[Tensor, "channels 1 1"]
    """Mean of each channel, on the scale from 0 to 1."""
    deviation: Float[Tensor, "channels 1 1"]
    """Standard deviation of each channel."""

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Return standardised images."""
        return (images.float() / 255 - self.mean) / self.deviation


def standardization_of(data: LabelledImages, most: int = 10_000) -> Standardization:
    """Return the standardisation of about so many images, spread evenly: a file may have them by class."""
    sample = data.images[:: max(1, len(data.labels) // most)].float() / 255
    mean = sample.mean((0, 2, 3))[:, None, None]
    deviation = sample.std((0, 2, 3))[:, None, None].clamp_min(1e-3)
    return Standardization(mean, deviation)
