"""Sparse layers: pure mathematics on tensors, without models, files or processes."""

from typing import NamedTuple, cast

from mxd.layers.activations import Activation
from mxd.layers.dense_encoder import Encoder, GluEncoder, MlpEncoder
from mxd.layers.linear_transform_mixture import LinearTransformMixture, LinearTransformMixtureConfig
from mxd.layers.low_rank_mixture import LowRankMixture, LowRankMixtureConfig
from mxd.layers.mixture_of_decoders import MixtureOfDecoders, MixtureOfDecodersConfig
from mxd.layers.mlp_weights import MlpWeights
from mxd.layers.provenance import Provenance
from mxd.layers.request import LayerRequest, RequestedConfig
from mxd.layers.selection import L1, BatchTopK, Selection, SelectionName, SparseCode, TopK, topk_relu
from mxd.layers.shared_transcoder import SharedTranscoder, SharedTranscoderConfig
from mxd.layers.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from mxd.layers.sparse_layer import AtomRows, Init, LinearMap, SparseLayer, SparseLayerConfig, SparseLayerOutput
from mxd.layers.topk_autoencoder import TopKAutoencoder, TopKAutoencoderConfig
from mxd.layers.transcoder import Transcoder, TranscoderConfig


class LayerKind(NamedTuple):
    """The two classes that make up a kind of layer."""

    config: type
    """Frozen dataclass of everything that is not a tensor."""
    layer: type[SparseLayer]
    """The layer, built from its configuration."""

    def configure(self, request: LayerRequest) -> SparseLayerConfig:
        """Return the configuration of this kind that was asked for.

        Raises:
            ValueError: If a size does not fit, or something that the kind needs is missing.
        """
        return cast(type[RequestedConfig], self.config).from_request(request)


LAYERS: dict[str, LayerKind] = {
    "mxd": LayerKind(MixtureOfDecodersConfig, MixtureOfDecoders),
    "transcoder": LayerKind(TranscoderConfig, Transcoder),
    "skip-transcoder": LayerKind(SkipTranscoderConfig, SkipTranscoder),
    "shared-transcoder": LayerKind(SharedTranscoderConfig, SharedTranscoder),
    "topk-sae": LayerKind(TopKAutoencoderConfig, TopKAutoencoder),
    "low-rank": LayerKind(LowRankMixtureConfig, LowRankMixture),
    "molt": LayerKind(LinearTransformMixtureConfig, LinearTransformMixture),
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
    "L1",
    "LAYERS",
    "Activation",
    "AtomRows",
    "BatchTopK",
    "Encoder",
    "GluEncoder",
    "Init",
    "LayerKind",
    "LayerRequest",
    "LinearMap",
    "LinearTransformMixture",
    "LinearTransformMixtureConfig",
    "LowRankMixture",
    "LowRankMixtureConfig",
    "MixtureOfDecoders",
    "MixtureOfDecodersConfig",
    "MlpEncoder",
    "MlpWeights",
    "Provenance",
    "RequestedConfig",
    "Selection",
    "SelectionName",
    "SharedTranscoder",
    "SharedTranscoderConfig",
    "SkipTranscoder",
    "SkipTranscoderConfig",
    "SparseCode",
    "SparseLayer",
    "SparseLayerConfig",
    "SparseLayerOutput",
    "TopK",
    "TopKAutoencoder",
    "TopKAutoencoderConfig",
    "Transcoder",
    "TranscoderConfig",
    "require_kind",
    "topk_relu",
]
