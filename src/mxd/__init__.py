"""Decompose the MLP layers of pretrained language models into sparse layers that can replace the originals."""

from importlib.metadata import version

from mxd.checkpoint import Checkpoint, load_checkpoint
from mxd.checkpoint import load_layer as load
from mxd.checkpoint import save_layer as save
from mxd.hub import from_pretrained, push_to_hub
from mxd.layers import (
    LAYERS,
    LinearTransformMixture,
    LinearTransformMixtureConfig,
    LowRankMixture,
    LowRankMixtureConfig,
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    Provenance,
    SharedTranscoder,
    SharedTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseCode,
    SparseLayer,
    TopKAutoencoder,
    TopKAutoencoderConfig,
    Transcoder,
    TranscoderConfig,
    register_kind,
)
from mxd.models import (
    LanguageModel,
    ablate_mlp,
    capture_mlp,
    find_mlp,
    load_language_model,
    mlp_pairs,
    replace_mlp,
)
from mxd.reading import codes, latent_statistics

__version__ = version("mxd")

__all__ = [
    "LAYERS",
    "Checkpoint",
    "LanguageModel",
    "LinearTransformMixture",
    "LinearTransformMixtureConfig",
    "LowRankMixture",
    "LowRankMixtureConfig",
    "MixtureOfDecoders",
    "MixtureOfDecodersConfig",
    "Provenance",
    "SharedTranscoder",
    "SharedTranscoderConfig",
    "SkipTranscoder",
    "SkipTranscoderConfig",
    "SparseCode",
    "SparseLayer",
    "TopKAutoencoder",
    "TopKAutoencoderConfig",
    "Transcoder",
    "TranscoderConfig",
    "ablate_mlp",
    "capture_mlp",
    "codes",
    "find_mlp",
    "from_pretrained",
    "latent_statistics",
    "load",
    "load_checkpoint",
    "load_language_model",
    "mlp_pairs",
    "push_to_hub",
    "register_kind",
    "replace_mlp",
    "save",
]
