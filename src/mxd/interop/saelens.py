"""SAELens: a folder for each layer, with `cfg.json` and `sae_weights.safetensors`, as `SAE.load_from_disk` reads it.

What its architectures compute, as read in sae-lens 6.54.12, with z = x @ W_enc + b_enc: `transcoder` and `standard`
keep every positive z, `topk` the k largest of each token, rectified, and `jumprelu...` those above `threshold`. Where
`apply_b_dec_to_input` is set, `b_dec` is taken off x first. `skip_transcoder`s add `x @ W_skip.T`. There is no
transcoder with top-k; but `topk` without `apply_b_dec_to_input` computes just that where there is one width, and
`metadata.hook_name_out` says that it writes elsewhere than it reads.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from mxd.atomic import JSON, json_text
from mxd.interop.files import write_tensors, write_text
from mxd.interop.places import Place, require_own_module, require_the_blocks_mlp
from mxd.interop.plain import DoesNotFit, PlainLayer, require_one_width
from mxd.layers import SelectionName

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The version that was read. Without one, or with one below 6, SAELens takes a file for one of its older formats."""

_AUTOENCODERS: Mapping[SelectionName, str] = {"topk": "topk", "batch-topk": "jumprelu", "l1": "standard"}
_TRANSCODERS: Mapping[SelectionName, str] = {"topk": "topk", "batch-topk": "jumprelu_transcoder", "l1": "transcoder"}
_SKIP_TRANSCODERS: Mapping[SelectionName, str] = {"batch-topk": "jumprelu_skip_transcoder", "l1": "skip_transcoder"}


def require_saelens(layer: PlainLayer, place: Place) -> None:
    """Check that SAELens can hold a layer.

    Raises:
        DoesNotFit: If it cannot.
    """
    if layer.rule not in _architectures(layer):
        raise DoesNotFit(
            "SAELens has no skip transcoder with top-k; its skip_transcoder keeps every positive latent, and would be "
            "denser. What fits: --format sparsify or circuit-tracer, or a layer that was trained with selection l1 or "
            "batch-topk."
        )
    if layer.rule == "topk":
        require_one_width(layer, "saelens")
    require_the_blocks_mlp(place, "saelens")
    require_own_module(place, "saelens")


def write_saelens(layer: PlainLayer, place: Place, about: Mapping[str, JSON], folder: Path) -> None:
    """Write one layer's folder below that of the layers."""
    target = folder / f"blocks.{place.block}.mlp"
    target.mkdir()
    tensors = {"W_enc": layer.W_enc, "b_enc": layer.b_enc, "W_dec": layer.W_dec, "b_dec": layer.b_dec}
    if layer.rule == "batch-topk":
        tensors["threshold"] = torch.full_like(layer.b_enc, layer.threshold)
    if layer.W_skip is not None:
        tensors["W_skip"] = layer.W_skip.t()
    write_tensors(target / WEIGHTS_FILE, tensors)
    write_text(target / CONFIG_FILE, json_text(_config(layer, place, about)))


def _config(layer: PlainLayer, place: Place, about: Mapping[str, JSON]) -> dict[str, object]:
    output = f"blocks.{place.block}.mlp.hook_out"
    read = {"hook_name": output} if layer.is_autoencoder else {"hook_name": f"blocks.{place.block}.mlp.hook_in"}
    written = {} if layer.is_autoencoder else {"hook_name_out": output}
    architecture = _architectures(layer)[layer.rule]
    config: dict[str, object] = {
        "architecture": architecture,
        "d_in": layer.d_in,
        "d_sae": layer.num_latents,
        "dtype": layer.dtype_name,
        "device": "cpu",
        "apply_b_dec_to_input": layer.is_autoencoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if architecture == "topk":
        config |= {"k": layer.k, "rescale_acts_by_decoder_norm": False}
    elif not layer.is_autoencoder:
        config["d_out"] = layer.d_out
    versions = {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None}
    return config | {"metadata": {**versions, "model_name": about["model"], **read, **written, "mxd": about}}


def _architectures(layer: PlainLayer) -> Mapping[SelectionName, str]:
    if layer.is_autoencoder:
        return _AUTOENCODERS
    return _TRANSCODERS if layer.W_skip is None else _SKIP_TRANSCODERS
