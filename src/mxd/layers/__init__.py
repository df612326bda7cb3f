"""Sparse layers: pure mathematics on tensors, without models, files or processes."""

from mxd.layers.activations import Activation
from mxd.layers.dense_encoder import Encoder, GluEncoder, MlpEncoder
from mxd.layers.linear_transform_mixture import LinearTransformMixture, LinearTransformMixtureConfig
from mxd.layers.low_rank_mixture import LowRankMixture, LowRankMixtureConfig
from mxd.layers.mixture_of_decoders import MixtureOfDecoders, MixtureOfDecodersConfig
from mxd.layers.mlp_weights import MlpWeights
from mxd.layers.provenance import Provenance
from mxd.layers.registry import LAYERS, LayerKind, field_types, register_kind, require_kind, require_kind_of
from mxd.layers.request import LayerRequest, RequestedConfig
from mxd.layers.selection import L1, BatchTopK, Selection, SelectionName, SparseCode, TopK, topk_relu
from mxd.layers.shared_transcoder import SharedTranscoder, SharedTranscoderConfig
from mxd.layers.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from mxd.layers.sparse_layer import AtomRows, Init, LinearMap, SparseLayer, SparseLayerConfig, SparseLayerOutput
from mxd.layers.topk_autoencoder import TopKAutoencoder, TopKAutoencoderConfig
from mxd.layers.transcoder import Transcoder, TranscoderConfig

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
    "field_types",
    "register_kind",
    "require_kind",
    "require_kind_of",
    "topk_relu",
]
