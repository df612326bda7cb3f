"""Sparse layers: pure mathematics on tensors, without models, files or processes."""

from typing import NamedTuple

from mxd.layers.activations import Activation
from mxd.layers.dense_encoder import Encoder, GluEncoder, MlpEncoder
from mxd.layers.mixture_of_decoders import MixtureOfDecoders, MixtureOfDecodersConfig
from mxd.layers.selection import SparseCode, topk_relu
from mxd.layers.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from mxd.layers.sparse_layer import LinearMap, SparseLayer, SparseLayerConfig, SparseLayerOutput
from mxd.layers.topk_autoencoder import TopKAutoencoder, TopKAutoencoderConfig
from mxd.layers.transcoder import Transcoder, TranscoderConfig


class LayerKind(NamedTuple):
    """The two classes that make up a kind of layer."""

    config: type
    """Frozen dataclass of everything that is not a tensor."""
    layer: type[SparseLayer]
    """The layer, built from its configuration."""


LAYERS: dict[str, LayerKind] = {
    "mxd": LayerKind(MixtureOfDecodersConfig, MixtureOfDecoders),
    "transcoder": LayerKind(TranscoderConfig, Transcoder),
    "skip-transcoder": LayerKind(SkipTranscoderConfig, SkipTranscoder),
    "topk-sae": LayerKind(TopKAutoencoderConfig, TopKAutoencoder),
}
"""Every kind of sparse layer: the one registry."""


def require_kind(kind: str) -> LayerKind:
    """Return the classes of this kind.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in LAYERS:
        raise ValueError(f"kind must be one of {', '.join(LAYERS)}; got {kind!r}.")
    return LAYERS[kind]


__all__ = [
    "LAYERS",
    "Activation",
    "Encoder",
    "GluEncoder",
    "LayerKind",
    "LinearMap",
    "MixtureOfDecoders",
    "MixtureOfDecodersConfig",
    "MlpEncoder",
    "SkipTranscoder",
    "SkipTranscoderConfig",
    "SparseCode",
    "SparseLayer",
    "SparseLayerConfig",
    "SparseLayerOutput",
    "TopKAutoencoder",
    "TopKAutoencoderConfig",
    "Transcoder",
    "TranscoderConfig",
    "require_kind",
    "topk_relu",
]
