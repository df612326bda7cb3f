"""Complete training configurations by name: the paper's four models, two newer ones, and small ones of our own.

An ablation, `ablation-<what>` on the bundled model and `ablation-<what>-stories` on the other small one, is a grid
in which one setting varies (`mxd.training.ablations`).

`mxd train --recipe NAME` begins with a recipe's values, and every option given beside it replaces one. In Python a
recipe is a function that returns a `TrainConfig`; change it with `dataclasses.replace`. Nothing here is loaded or
looked up: a recipe resolves offline.

**What is the paper's** (Oldfield et al., NeurIPS 2025, and its released code): corpus, tokens, batch, learning rate,
warm-up and schedule, AdamW without decay or clipping, context, size of the shuffle buffer, float32, seed, the ks, the
three methods, and a budget of parameters of a transcoder 32 times as wide as its input.

**What is ours**, because the paper differs from what mxd does:

* Parameters are matched exactly, for every kind. The released scripts charge the mixture some biases that it does not
  have (`layers.sizing.paper_num_experts`), so that they have 0.07 % fewer experts for GPT-2, and they give a Skip
  Transcoder as many latents as a Transcoder, hence 1.6 % more parameters.
* The last batch is whole: 117,188 steps where the paper's code makes 117,187.
* The shuffle buffer is emptied before it is filled again, so that its blocks do not mix. The released code refills half
  of a buffer of the same size and mixes that with the half that is still there.
* A run of few tokens warms up over a tenth of them, one of 205M and more over the paper's 5,000 steps.
* Activations are those of the Hugging Face model, unfolded, with whatever its norm multiplies; the paper's are
  TransformerLens's, with folded norms and centred weights.
* A twentieth of the documents is held out, and evaluation uses as many tokens of it as the paper used of the text
  that it also trained on.
* All students learn at once, from the same stream.

**What is not known** (neither the paper nor its code says) and had to have a value here: which dense encoder and
activation the headline run on Llama 3.2 3B had (ours: those of the model, a GLU with SiLU; its number of experts is the
one that the paper's figure has); whether expert rows were normalised in the published runs (ours: yes, the released
default); after how many tokens a latent counts as dead (ours: mxd's default; it is only logged).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from mxd.bundled import MODEL_NAME
from mxd.training.ablations import ABLATIONS
from mxd.training.config import TrainConfig
from mxd.training.shapes import ModelShape

METHODS = ("mxd", "transcoder", "skip-transcoder")
"""The paper's three methods."""


def paper_gpt2(layer: int = 8) -> TrainConfig:
    """GPT-2 124M. The paper's activation is GELU, taken to be the exact one; the model's own is its tanh approximation.

    Args:
        layer: Block whose MLP is decomposed; 8 is the paper's headline.
    """
    return _paper("paper-gpt2", "openai-community/gpt2", layer, activation="gelu")


def paper_pythia_410m(layer: int = 15) -> TrainConfig:
    """Pythia 410M.

    Args:
        layer: Block whose MLP is decomposed; 15 is the paper's headline.
    """
    return _paper("paper-pythia-410m", "EleutherAI/pythia-410m", layer, activation="gelu")


def paper_pythia_1_4b(layer: int = 12) -> TrainConfig:
    """Pythia 1.4B.

    Args:
        layer: Block whose MLP is decomposed; 12 is the paper's headline.
    """
    return _paper("paper-pythia-1.4b", "EleutherAI/pythia-1.4b", layer, activation="gelu")


def paper_llama_3_2_3b(layer: int = 12) -> TrainConfig:
    """Llama 3.2 3B. The paper's encoder and activation are not known; ours are the model's own.

    Args:
        layer: Block whose MLP is decomposed; 12 is the paper's headline.
    """
    return _paper("paper-llama-3.2-3b", "meta-llama/Llama-3.2-3B", layer, activation="auto")


def qwen3_1_7b(layer: int = 14) -> TrainConfig:
    """Qwen3 1.7B (base), which the paper has not: its settings carried over, encoder and activation the model's own.

    Args:
        layer: Block whose MLP is decomposed; the middle one is our choice.
    """
    return _paper("qwen3-1.7b", "Qwen/Qwen3-1.7B-Base", layer, activation="auto")


def gemma_3_4b(layer: int = 17) -> TrainConfig:
    """Gemma 3 4B (pretrained), which the paper has not: its settings carried over, encoder and activation the model's.

    The paper's code had Gemma 2 27B in half precision in a partial run, of which nothing else is known; ours is
    float32 like the others.

    Args:
        layer: Block whose MLP is decomposed; the middle one is our choice.
    """
    return _paper("gemma-3-4b", "google/gemma-3-4b-pt", layer, activation="auto")


def demo(layer: int = 3) -> TrainConfig:
    """The bundled model's middle layer on the standard library, as `mxd demo` trains it. All of it is ours.

    Args:
        layer: Block whose MLP is decomposed.
    """
    return TrainConfig(
        recipe="demo",
        model=MODEL_NAME,
        text=("stdlib",),
        layer=(layer,),
        kind=(*METHODS, "shared-transcoder"),
        k=(8, 32),
        expansion=8,
        tokens=500_000,
        model_dtype="float32",
        batch_tokens=2048,
        schedule="linear",
        eval_tokens=32_768,
    )


def stories260k(layer: int | None = None) -> TrainConfig:
    """A Llama of 260 thousand parameters on TinyStories: all layers, ks from 4 to 128, three seeds. All of it is ours.

    The model is read from the folder `stories260K`; name another place, or another small model, with `--model`, and
    local text with `--text`.

    Args:
        layer: Block whose MLP is decomposed; all five where None.
    """
    return TrainConfig(
        recipe="stories260k",
        model="stories260K",
        text=("roneneldan/TinyStories",),
        layer=tuple(range(5)) if layer is None else (layer,),
        kind=METHODS,
        k=(4, 8, 16, 32, 64, 128),
        tokens=8_000_000,
        seeds=3,
    )


def ablation(name: str, layer: int = 3) -> TrainConfig:
    """An ablation on the bundled model's middle layer and the standard library: 2M tokens, K 32 and three seeds.

    Args:
        name: What varies, a key of `mxd.training.ablations.ABLATIONS`.
        layer: Block whose MLP is decomposed.
    """
    base = replace(demo(layer), recipe=f"ablation-{name}", k=(32,), expansion=32, tokens=2_000_000, seeds=3)
    return ABLATIONS[name](base, RECIPES["demo"].shape.d_model)


def ablation_stories260k(name: str, layer: int = 2) -> TrainConfig:
    """The same on the middle layer of a Llama of 260 thousand parameters and TinyStories: 8M tokens, K 16, three seeds.

    Args:
        name: What varies, a key of `mxd.training.ablations.ABLATIONS`.
        layer: Block whose MLP is decomposed.
    """
    base = replace(stories260k(layer), recipe=f"ablation-{name}-stories", k=(16,))
    return ABLATIONS[name](base, RECIPES["stories260k"].shape.d_model)


class Recipe(NamedTuple):
    """A configuration to begin with, and what its model looks like."""

    config: Callable[[], TrainConfig]
    """Returns the configuration; the functions of this module also take a layer."""
    shape: ModelShape
    """Sizes of its model, for estimates where the model is not there."""


RECIPES: dict[str, Recipe] = {
    "paper-gpt2": Recipe(
        paper_gpt2,
        ModelShape(
            d_model=768,
            d_hidden=3072,
            num_layers=12,
            d_attention=768,
            activation="gelu_tanh",
            gated=False,
            positions=1024,
            parameters=124_439_808,
            block_parameters=7_087_872,
        ),
    ),
    "paper-pythia-410m": Recipe(
        paper_pythia_410m,
        ModelShape(
            d_model=1024,
            d_hidden=4096,
            num_layers=24,
            d_attention=1024,
            activation="gelu",
            gated=False,
            positions=2048,
            parameters=405_334_016,
            block_parameters=12_596_224,
        ),
    ),
    "paper-pythia-1.4b": Recipe(
        paper_pythia_1_4b,
        ModelShape(
            d_model=2048,
            d_hidden=8192,
            num_layers=24,
            d_attention=2048,
            activation="gelu",
            gated=False,
            positions=2048,
            parameters=1_414_647_808,
            block_parameters=50_358_272,
        ),
    ),
    "paper-llama-3.2-3b": Recipe(
        paper_llama_3_2_3b,
        ModelShape(
            d_model=3072,
            d_hidden=8192,
            num_layers=28,
            d_attention=3072,
            activation="silu",
            gated=True,
            positions=131_072,
            parameters=3_212_749_824,
            block_parameters=100_669_440,
        ),
    ),
    "qwen3-1.7b": Recipe(
        qwen3_1_7b,
        ModelShape(
            d_model=2048,
            d_hidden=6144,
            num_layers=28,
            d_attention=2048,
            activation="silu",
            gated=True,
            positions=32_768,
            parameters=1_720_574_976,
            block_parameters=50_336_000,
        ),
    ),
    "gemma-3-4b": Recipe(
        gemma_3_4b,
        ModelShape(
            d_model=2560,
            d_hidden=10_240,
            num_layers=34,
            d_attention=2048,
            activation="gelu_tanh",
            gated=True,
            positions=131_072,
            # With its vision tower, which is loaded too.
            parameters=4_300_079_472,
            block_parameters=94_382_592,
        ),
    ),
    "demo": Recipe(
        demo,
        ModelShape(
            d_model=256,
            d_hidden=1024,
            num_layers=6,
            d_attention=256,
            activation="gelu",
            gated=False,
            positions=256,
            parameters=5_853_184,
            block_parameters=789_760,
        ),
    ),
    "stories260k": Recipe(
        stories260k,
        ModelShape(
            d_model=64,
            d_hidden=172,
            num_layers=5,
            d_attention=64,
            activation="silu",
            gated=True,
            positions=512,
            parameters=260_032,
            block_parameters=45_440,
        ),
    ),
}
"""Every recipe by its name on the command line."""
for _name in ABLATIONS:
    RECIPES[f"ablation-{_name}"] = Recipe(partial(ablation, _name), RECIPES["demo"].shape)
    RECIPES[f"ablation-{_name}-stories"] = Recipe(partial(ablation_stories260k, _name), RECIPES["stories260k"].shape)


def find_recipe(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises:
        ValueError: If there is none; the sentence lists those there are.

    Example:
        >>> find_recipe("paper-gpt2").config().k
        (16, 32, 64, 128, 256)
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {name!r}; --recipe list describes them.")
    return RECIPES[name]


def _paper(name: str, model: str, layer: int, *, activation: str) -> TrainConfig:
    """Return the paper's settings (Oldfield et al., 2025) for one layer of a model."""
    return TrainConfig(
        recipe=name,
        model=model,
        text=("Skylion007/openwebtext",),
        split="train",
        layer=(layer,),
        kind=METHODS,
        k=(16, 32, 64, 128, 256),
        expansion=32,
        activation=activation,
        init="paper",
        tokens=480_000_000,
        batch_tokens=4096,
        context=128,
        buffer_tokens=128 * 32 * 128,
        lr=1e-4,
        schedule="constant",
        # The paper's 5,000 steps at the paper's tokens, fewer where fewer tokens are asked for.
        warmup_tokens="auto",
        weight_decay=0.0,
        clip=None,
        aux_coefficient=0.0,
        output_bias="zeros",
        normalize_input=False,
        special_positions="replace",
        precision="float32",
        model_dtype="float32",
        seeds=1,
        seed=42,
        eval_tokens=200 * 128 * 128,
    )
