"""Which model it is: digests of what decides what a model computes, wherever it was loaded from."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

_DECIDE_NOTHING = {
    *("architectures", "attn_implementation", "dtype", "id2label", "label2id", "output_attentions"),
    *("output_hidden_states", "problem_type", "return_dict", "task_specific_params", "torch_dtype"),
    *("transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
}
"""Settings in a config.json that say nothing of what a forward pass computes from tokens, or that weights say too;
those that begin with `_`, such as where it was loaded from, are others."""


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's settings and of the names, shapes, types and a few entries of its weights.

    It is cheap, and other models have another. The same model has the same one wherever it is loaded from. Buffers
    count where they are saved with the weights; others are computed, and may differ between machines by rounding.
    """
    digest = hashlib.sha256(_settings(model).encode())
    saved = model.state_dict(keep_vars=True)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    for name, tensor in (*model.named_parameters(), *buffers):
        few = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(few.numpy().tobytes())
    return digest.hexdigest()


def digest(model: nn.Module) -> str:
    """Return a SHA-256 of everything that decides what a model computes: its settings, weights and buffers.

    Reads all of it: about a second for every gigabyte.
    """
    result = hashlib.sha256(_settings(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()


def _settings(model: nn.Module) -> str:
    """Return as JSON what a language model's configuration decides; of sparse layers and other modules nothing.

    What is as in a new configuration of the family is left out, as every version of transformers adds such settings.
    """
    config = cast(Any, getattr(model, "config", None))
    if not hasattr(config, "to_dict"):
        return ""
    try:
        usual: dict[str, object] = type(config)().to_dict()
    # Some families have no configuration without arguments.
    except TypeError:
        usual = {}
    return json.dumps({**_unusual(config.to_dict(), usual), "model_type": config.model_type}, sort_keys=True)


def _unusual(settings: Mapping[str, object], usual: Mapping[str, object]) -> dict[str, object]:
    kept: dict[str, object] = {}
    for name, value in settings.items():
        if name in _DECIDE_NOTHING or name.startswith("_") or (name in usual and usual[name] == value):
            continue
        if isinstance(value, dict):
            other = usual.get(name)
            inner, beside = cast("dict[str, object]", value), cast("dict[str, object]", other or {})
            value = _unusual(inner, beside if beside.keys() == inner.keys() else {})
        kept[name] = value
    return kept
