"""What a pretraining run learns from: images in order, contexts read ahead."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mxd.data.tokens import LocalTokens, TokenPosition
from mxd.pretraining.ahead import ContextsAhead
from mxd.pretraining.config import ImageConfig, Optimization
from mxd.pretraining.images import ImageOrder, LabelledImages, read_images, standardization_of
from mxd.pretraining.mixer import MixerConfig
from mxd.pretraining.run import MAY_DIFFER, make_plan
from mxd.pretraining.surgery import MlpChoice
from mxd.pretraining.tasks import ImageData, ImageTask


def test_mixup_mixes_images_and_targets_alike(images: Path) -> None:
    config = image_config(images)
    task = make_plan(config).task
    mixed_task = make_plan(replace(config, mixup=0.5)).task
    assert isinstance(task, ImageTask)
    plain = task.next_batch(torch.Generator().manual_seed(0))
    mixed = mixed_task.next_batch(torch.Generator().manual_seed(0))
    share = ((mixed.targets - plain.targets.flip(0)) * (plain.targets - plain.targets.flip(0))).sum() / (
        plain.targets - plain.targets.flip(0)
    ).square().sum()
    assert 0 < float(share) < 1
    torch.testing.assert_close(mixed.targets, share * plain.targets + (1 - share) * plain.targets.flip(0))
    torch.testing.assert_close(mixed.inputs, share * plain.inputs + (1 - share) * plain.inputs.flip(0))


def image_config(images: Path) -> ImageConfig:
    mixer = MixerConfig(
        image_size=8, channels=1, patch_size=2, num_blocks=1, d_model=8, d_token=8, d_channel=16, num_classes=4
    )
    return ImageConfig(
        recipe="test",
        images=str(images),
        mixer=mixer,
        batch_images=20,
        mlp=MlpChoice(kind="cp", num_experts=(3,), normalization="batch"),
        optimization=Optimization(lr=0.01, threads=1, device="cpu", precision="float32"),
    )


def test_an_epoch_shows_every_image_once_and_positions_are_restored() -> None:
    order = ImageOrder(23, 5, seed=1)
    first = torch.cat([order.take() for _ in range(order.steps_per_epoch)])
    assert len(first.unique()) == 20
    position = order.state()
    later = [order.take() for _ in range(6)]
    again = ImageOrder(23, 5, seed=1)
    again.restore(position)
    assert all(torch.equal(again.take(), batch) for batch in later)
    assert not torch.equal(torch.cat(later[:4]), first)


def test_contexts_read_ahead_are_the_same_and_so_are_their_positions() -> None:
    def stream() -> LocalTokens:
        return LocalTokens(np.arange(100), context=7, bos=None, seed=1)

    plain, ahead = ContextsAhead(stream(), 3, ahead=False), ContextsAhead(stream(), 3, ahead=True)
    positions = [ahead.position()]
    assert positions == [plain.position()] == [TokenPosition(0, 0)]
    for _ in range(12):
        assert torch.equal(plain.take(), ahead.take())
        assert plain.position() == ahead.position()
        positions.append(ahead.position())
    middle = positions[5]
    ahead.restore(middle)
    assert ahead.position() == middle
    expected = stream()
    expected.restore(middle)
    assert torch.equal(ahead.take(), expected.take(3))


def test_what_goes_wrong_ahead_is_raised_when_it_is_asked_for() -> None:
    class Breaking(LocalTokens):
        left = 2

        def take(self, count: int) -> Tensor:
            self.left -= 1
            if self.left < 0:
                raise OSError("the hub is gone")
            return super().take(count)

    ahead = ContextsAhead(Breaking(np.arange(100), context=7, bos=None, seed=1), 3, ahead=True)
    for _ in range(2):
        ahead.take()
    with pytest.raises(OSError, match="the hub is gone"):
        ahead.take()


def test_images_are_standardised_by_their_own_channels(images: Path) -> None:
    data = read_images(images / "train.npz")
    assert data.images.shape == (200, 1, 8, 8)
    standardised = standardization_of(data)(data.images)
    assert standardised.mean().item() == pytest.approx(0, abs=1e-4)
    assert standardised.std().item() == pytest.approx(1, abs=1e-3)


def test_other_images_of_the_same_number_are_another_run() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    part = LabelledImages(images, torch.tensor([0, 1]))
    other = LabelledImages(images + 1, torch.tensor([0, 1]))
    assert ImageData(part, part).identity != ImageData(other, part).identity
    assert not {"resources.device", "resources.kernels", "resources"} & set(MAY_DIFFER)
