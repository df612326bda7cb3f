"""Surgery on Hugging Face language models: find an MLP, read what flows through it, put something in its place."""

from mxd.models.blocks import BlockActivations, block_activations
from mxd.models.families import MLP_SITES, MlpSpec
from mxd.models.identity import digest, fingerprint
from mxd.models.loading import (
    LanguageModel,
    device_of,
    load_language_model,
    load_outline,
    load_tokenizer,
    most_positions,
    require_device,
    resolve_device,
    vocabulary_size,
)
from mxd.models.requirements import require_own_place, require_widths
from mxd.models.sites import MlpSite, find_block, find_mlp, num_layers, require_model
from mxd.models.surgery import MlpPair, Replacement, ablate_mlp, capture_mlp, mlp_pairs, replace_mlp
from mxd.models.weights import apply_mlp, hidden_units, mlp_weights

__all__ = [
    "MLP_SITES",
    "BlockActivations",
    "LanguageModel",
    "MlpPair",
    "MlpSite",
    "MlpSpec",
    "Replacement",
    "ablate_mlp",
    "apply_mlp",
    "block_activations",
    "capture_mlp",
    "device_of",
    "digest",
    "find_block",
    "find_mlp",
    "fingerprint",
    "hidden_units",
    "load_language_model",
    "load_outline",
    "load_tokenizer",
    "mlp_pairs",
    "mlp_weights",
    "most_positions",
    "num_layers",
    "replace_mlp",
    "require_device",
    "require_model",
    "require_own_place",
    "require_widths",
    "resolve_device",
    "vocabulary_size",
]
