"""The paper's settings, as `mxd privacy --recipe` has them."""

from typing import cast

import pytest
import torch
from torch import nn

from mxd.privacy.recipes import PRIVACY_RECIPES, find_privacy_recipe


def test_the_papers_settings_stand_in_the_recipes() -> None:
    table = {
        name: (
            recipe.config.objective.theta,
            recipe.config.lr,
            recipe.config.steps,
            recipe.config.objective.weight_decay,
            recipe.config.min_accuracy,
            recipe.protected,
        )
        for name, recipe in PRIVACY_RECIPES.items()
    }
    assert table == {
        "cifar10-resnet50": (0.75, 0.1, 200, 5e-4, 0.87, 100),
        "cifar10-resnet50-theta95": (0.95, 0.1, 200, 5e-4, 0.80, 100),
        "cifar100-resnet50": (0.75, 0.1, 200, 5e-4, 0.87, 5000),
        "cifar100-resnet50-theta95": (0.95, 0.1, 100, 5e-4, 0.87, 100),
        "cifar100-vit-b16": (0.75, 1e-3, 60, 0.05, 0.86, 100),
    }
    for recipe in PRIVACY_RECIPES.values():
        assert (recipe.config.optimizer, recipe.config.momentum, recipe.config.schedule) == ("sgd", 0.9, "step")
        assert recipe.config.retained_batch is None
    with pytest.raises(ValueError, match="recipe must be one of cifar10-resnet50"):
        find_privacy_recipe("imagenet")


def test_the_recipes_architectures_are_those_of_their_names() -> None:
    sizes: dict[str, int] = {}
    for name in ("cifar10-resnet50", "cifar100-vit-b16"):
        with torch.device("meta"):
            model = cast(nn.Module, find_privacy_recipe(name).build())
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert sizes["cifar10-resnet50"] == 23_528_522
    assert 85_000_000 < sizes["cifar100-vit-b16"] < 87_000_000
