"""The recipes of `mxd pretrain`, field by field against Oldfield et al., 2024."""

from dataclasses import asdict, replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mxd.pretraining.config import ImageConfig, LanguageConfig
from mxd.pretraining.mixer import MlpMixer
from mxd.pretraining.recipes import RECIPES, find_recipe
from mxd.pretraining.surgery import MlpChoice, block_config, find_mlps
from tests.tiny_run import command

PAPER_GPT2 = {
    "text": ("Skylion007/openwebtext",),
    "tokenizer": "openai-community/gpt2",
    "d_model": 768,
    "num_layers": 12,
    "num_heads": 12,
    "context": 1024,
    "batch_tokens": 983_040,
    "tokens": 98_304_000_000,
}
PAPER_GPT2_OPTIMIZATION = {
    "lr": 6e-4,
    "final_lr": 6e-5,
    "schedule": "cosine",
    "warmup_steps": 2000,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "clip": 1.0,
    "micro_batch": 24,
}
PAPER_MIXER = {"epochs": 300, "batch_images": 4096, "mixup": 0.5, "randaugment": (2, 15)}
PAPER_MIXER_OPTIMIZATION = {
    "lr": 1e-3,
    "schedule": "linear",
    "warmup_steps": 10_000,
    "weight_decay": 1e-4,
    "clip": 1.0,
    "precision": "bfloat16",
}
PAPER_MIXER_MODEL = {
    "image_size": 224,
    "patch_size": 16,
    "num_blocks": 8,
    "d_model": 512,
    "d_token": 256,
    "d_channel": 2048,
    "num_classes": 1000,
    "stochastic_depth": 0.1,
}


@pytest.mark.parametrize(("kind", "fraction", "ranks"), [("cp", 0.725, (556,)), ("tr", 0.195, (4, 4, 149, 4))])
def test_the_papers_gpt2_recipe_field_by_field(kind: str, fraction: float, ranks: tuple[int, ...]) -> None:
    config = find_recipe(f"paper-gpt2-{kind}")
    assert isinstance(config, LanguageConfig)
    assert {name: getattr(config, name) for name in PAPER_GPT2} == PAPER_GPT2
    assert config.steps == 100_000
    optimization = asdict(config.optimization)
    assert {name: optimization[name] for name in PAPER_GPT2_OPTIMIZATION} == PAPER_GPT2_OPTIMIZATION
    assert config.mlp == MlpChoice(
        kind=config.mlp.kind, num_experts=(256,), rank_fraction=fraction, normalize_input=True
    )
    assert (config.mlp.kind, config.mlp.gate, config.mlp.normalization) == (kind, "entmax", "layer")
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(activation_function="gelu"))
    blocks = [block_config(found, config.mlp) for found in find_mlps(model)]
    assert len(blocks) == 12
    assert {block.ranks for block in blocks} == {ranks}
    # The paper's count, and the LayerNorm of the value path.
    assert {block.num_parameters for block in blocks} == {{"cp": 4_752_472, "tr": 4_783_272}[kind] + 1536}
    assert {(block.d_in, block.d_hidden, block.activation) for block in blocks} == {(768, 3072, "gelu")}


@pytest.mark.parametrize(
    ("kind", "fraction", "ranks"),
    [("cp", 0.75, ((147,), (384,))), ("tr", 0.19, ((4, 4, 37, 4), (4, 4, 97, 4)))],
)
def test_the_papers_mixer_recipe_field_by_field(kind: str, fraction: float, ranks: tuple[tuple[int, ...], ...]) -> None:
    config = find_recipe(f"paper-mixer-s16-{kind}")
    assert isinstance(config, ImageConfig)
    assert {name: getattr(config, name) for name in PAPER_MIXER} == PAPER_MIXER
    optimization = asdict(config.optimization)
    assert {name: optimization[name] for name in PAPER_MIXER_OPTIMIZATION} == PAPER_MIXER_OPTIMIZATION
    mixer = asdict(config.mixer)
    assert {name: mixer[name] for name in PAPER_MIXER_MODEL} == PAPER_MIXER_MODEL
    assert (config.mlp.num_experts, config.mlp.rank_fraction) == ((64,), fraction)
    assert (config.mlp.gate, config.mlp.normalization) == ("entmax", "batch")
    with torch.device("meta"):
        model = MlpMixer(config.mixer)
    assert [block_config(found, config.mlp).ranks for found in find_mlps(model)] == list(ranks) * 8


def test_every_recipe_has_its_name_and_the_kinds_differ_in_their_mlps_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = command(capsys)("pretrain", "--recipe", "list")
    assert ended.status == 0
    assert "…" not in ended.out
    for name in RECIPES:
        config = find_recipe(name)
        assert config.recipe == name
        family = name.rpartition("-")[0]
        dense = find_recipe(f"{family}-dense")
        assert replace(config, recipe=dense.recipe, mlp=dense.mlp) == dense
        assert name in ended.out.split()
