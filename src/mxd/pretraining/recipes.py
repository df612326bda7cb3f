"""Complete configurations of pre-training, by name.

**What is the papers'** (Oldfield et al., 2024): placement in every MLP, number of experts, ranks as a
share of the width, gates and their normalisation, and of the training what its released configurations say: batch,
steps, learning rates, warm-up, betas, weight decay and clipping; for the Mixer also mixup, RandAugment and stochastic
depth.

**What is ours**, because the papers' runs differ from what can be done here: GPT-2's other linear layers and norms have
their biases (transformers knows no other GPT-2); products are in bfloat16 where the GPT-2 run had float16, which needs
its loss scaled; attention has no dropout. The released GPT-2 configuration takes 983,040 tokens a step, and the comment
beside it says half of that; ours is the configuration's. Steps and epochs are run on one device.

**What is not known** and had to have a value: the final learning rate of the Mixer (ours: 0) and AdamW's betas there
(ours: PyTorch's).
"""

from collections.abc import Callable
from functools import partial

from mxd.pretraining.config import ImageConfig, LanguageConfig, Optimization, PretrainConfig
from mxd.pretraining.mixer import MixerConfig
from mxd.pretraining.surgery import Kind, MlpChoice

PAPER_FRACTIONS = {"cp": 0.725, "tr": 0.195}
"""Rank of the paper's GPT-2 with 256 experts as a share of the width."""
MIXER_FRACTIONS = {"cp": 0.75, "tr": 0.19}
"""The same of its MLP-Mixer with 64 experts."""
PAPER_STEP_TOKENS = 24 * 1024 * 40
STDLIB_LR, MNIST_LR = 3e-3, 2e-3


def paper_gpt2(kind: Kind = "cp") -> LanguageConfig:
    """GPT-2 124M on OpenWebText, every MLP a mixture of 256 experts.

    Args:
        kind: What its MLPs are.
    """
    fraction = PAPER_FRACTIONS.get(kind)
    return LanguageConfig(
        recipe=f"paper-gpt2-{kind}",
        text=("Skylion007/openwebtext",),
        tokenizer="openai-community/gpt2",
        d_model=768,
        num_layers=12,
        num_heads=12,
        context=1024,
        tokens=100_000 * PAPER_STEP_TOKENS,
        batch_tokens=PAPER_STEP_TOKENS,
        eval_tokens=2_097_152,
        eval_every=1000,
        mlp=MlpChoice(
            kind=kind, num_experts=(256,), rank_fraction=fraction, normalization="layer", normalize_input=True
        ),
        optimization=Optimization(
            lr=6e-4,
            final_lr=6e-5,
            schedule="cosine",
            warmup_steps=2000,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            clip=1.0,
            precision="bfloat16",
            micro_batch=24,
        ),
    )


def paper_mixer(kind: Kind = "cp") -> ImageConfig:
    """MLP-Mixer S/16 on ImageNet-1k, every token- and channel-mixing MLP a mixture of 64 experts.

    Args:
        kind: What its MLPs are.
    """
    return ImageConfig(
        recipe=f"paper-mixer-s16-{kind}",
        images="imagenet-1k",
        mixer=MixerConfig(stochastic_depth=0.1),
        epochs=300.0,
        batch_images=4096,
        eval_every=1000,
        mixup=0.5,
        randaugment=(2, 15),
        mlp=MlpChoice(kind=kind, num_experts=(64,), rank_fraction=MIXER_FRACTIONS.get(kind), normalization="batch"),
        optimization=Optimization(
            lr=1e-3,
            final_lr=0.0,
            schedule="linear",
            warmup_steps=10_000,
            betas=(0.9, 0.999),
            weight_decay=1e-4,
            clip=1.0,
            precision="bfloat16",
            micro_batch=512,
        ),
    )


def stdlib(kind: Kind) -> LanguageConfig:
    """A GPT-2 of 1.4 million parameters on the standard library, in minutes on two cores. All of it is ours.

    Args:
        kind: What its MLPs are; the mixtures' ranks match the dense MLPs' parameters.
    """
    return LanguageConfig(
        recipe=f"stdlib-{kind}",
        text=("stdlib",),
        tokens=819_200,
        batch_tokens=2048,
        eval_tokens=32_768,
        eval_every=50,
        mlp=MlpChoice(kind=kind, num_experts=(64,)),
        optimization=Optimization(lr=STDLIB_LR, final_lr=3e-4, warmup_steps=20),
    )


def mnist(kind: Kind) -> ImageConfig:
    """A Mixer of 112 thousand parameters on MNIST, in minutes on two cores. All of it is ours.

    The images are read from the folder `mnist`; name another place with `--images`.

    Args:
        kind: What its MLPs are; the mixtures' ranks match the dense MLPs' parameters.
    """
    return ImageConfig(
        recipe=f"mnist-{kind}",
        images="mnist",
        mixer=MixerConfig(
            image_size=28,
            channels=1,
            patch_size=4,
            num_blocks=3,
            d_model=64,
            d_token=32,
            d_channel=256,
            num_classes=10,
        ),
        epochs=1.0,
        batch_images=128,
        eval_every=100,
        mlp=MlpChoice(kind=kind, num_experts=(16,), normalization="batch"),
        optimization=Optimization(
            lr=MNIST_LR, schedule="cosine", warmup_steps=50, betas=(0.9, 0.99), weight_decay=0.05
        ),
    )


KINDS: tuple[Kind, ...] = ("dense", "cp", "tr")
RECIPES: dict[str, Callable[[], PretrainConfig]] = {}
"""Every recipe by its name on the command line."""
for _kind in KINDS:
    RECIPES[f"stdlib-{_kind}"] = partial(stdlib, _kind)
for _kind in KINDS:
    RECIPES[f"mnist-{_kind}"] = partial(mnist, _kind)
for _kind in KINDS:
    RECIPES[f"paper-gpt2-{_kind}"] = partial(paper_gpt2, _kind)
    RECIPES[f"paper-mixer-s16-{_kind}"] = partial(paper_mixer, _kind)


def find_recipe(name: str) -> PretrainConfig:
    """Return the configuration of this name.

    Raises:
        ValueError: If there is none; the sentence lists those there are.

    Example:
        >>> find_recipe("paper-gpt2-cp").mlp.num_experts
        (256,)
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {name!r}; --recipe list shows them.")
    return RECIPES[name]()
