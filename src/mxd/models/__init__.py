"""Surgery on Hugging Face language models: find an MLP, read what flows through it, put something in its place."""

from mxd.models.loading import LanguageModel, digest, fingerprint, load_language_model, load_tokenizer, require_device
from mxd.models.sites import MLP_SITES, MlpSite, MlpSpec, find_mlp, num_layers
from mxd.models.surgery import MlpPair, Replacement, ablate_mlp, capture_mlp, mlp_pairs, replace_mlp
from mxd.models.weights import apply_mlp, mlp_weights

__all__ = [
    "MLP_SITES",
    "LanguageModel",
    "MlpPair",
    "MlpSite",
    "MlpSpec",
    "Replacement",
    "ablate_mlp",
    "apply_mlp",
    "capture_mlp",
    "digest",
    "find_mlp",
    "fingerprint",
    "load_language_model",
    "load_tokenizer",
    "mlp_pairs",
    "mlp_weights",
    "num_layers",
    "replace_mlp",
    "require_device",
]
