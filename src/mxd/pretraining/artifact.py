"""A model with multilinear MLPs as a folder: `config.json` and `model.safetensors`, nothing that is executed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mxd.atomic import JSON, json_text, write_together
from mxd.multilinear import MultilinearMLP, MultilinearMLPConfig
from mxd.pretraining.mixer import MixerConfig, MlpMixer, mixer_config
from mxd.tensor_files import read_tensors, require_described

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT, FORMAT_VERSION = "mxd-multilinear", 1
LANGUAGE, MIXER = "language", "mlp-mixer"


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write a model whose MLPs were replaced (or not) to a folder that `load_model` reads.

    `config.json` has no `model_type` of its own, so that transformers refuses the folder in place of filling what it
    does not know with random weights.

    Args:
        model: A Hugging Face language model, an `MlpMixer`, or timm's own MLP-Mixer, which is read as an `MlpMixer`.
        folder: Where to write; made where it does not exist.

    Raises:
        ValueError: If the model is none of these.
        OSError: If the folder cannot be written.
    """
    model = _as_our_mixer(model) or model
    if isinstance(model, MlpMixer):
        family, described = MIXER, cast("dict[str, JSON]", asdict(model.config))
    else:
        config = getattr(model, "config", None)
        if not hasattr(config, "to_dict"):
            raise ValueError(f"a model must be of transformers or an MlpMixer to be saved; got {type(model).__name__}.")
        family, described = LANGUAGE, cast("dict[str, JSON]", cast(Any, config).to_dict())
    blocks = {
        path: cast(JSON, asdict(module.config))
        for path, module in model.named_modules()
        if isinstance(module, MultilinearMLP)
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content: Mapping[str, JSON] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "family": family,
        "model": described,
        "blocks": blocks,
    }
    # Through JSON and back: a configuration of transformers may hold types that only its own encoder knows.
    text = json_text(json.loads(json.dumps(content, default=str)))
    write_together({folder / WEIGHTS_FILE: save(_distinct(model)), folder / CONFIG_FILE: text.encode()})


def load_model(folder: str | Path) -> nn.Module:
    """Return the model of a folder that `save_model` wrote, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} must hold a model's {CONFIG_FILE} and {WEIGHTS_FILE}; it has no {name}.")
    config = _read_config(folder / CONFIG_FILE)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    with torch.random.fork_rng(devices=[]):
        model = _described_model(folder / CONFIG_FILE, config)
    model.to(next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32))
    own = model.state_dict()
    require_described(folder / WEIGHTS_FILE, _distinct(model), tensors)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return model.eval()


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict on the CPU with tied weights once, under their first name."""
    distinct: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        distinct[name] = tensor.detach().cpu().contiguous()
    return distinct


def _as_our_mixer(model: nn.Module) -> MlpMixer | None:
    """Return an `MlpMixer` with the blocks and weights of another library's; None where the model is no such Mixer."""
    config = None if isinstance(model, MlpMixer) else mixer_config(model)
    if config is None:
        return None
    with torch.random.fork_rng(devices=[]):
        ours = MlpMixer(config)
    for path, module in model.named_modules():
        if isinstance(module, MultilinearMLP):
            ours.set_submodule(path, module, strict=True)
    ours.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return ours


def _described_model(path: Path, config: Mapping[str, Any]) -> nn.Module:
    try:
        model = _known_model(path, config)
        for place, described in dict(config["blocks"]).items():
            model.set_submodule(place, MultilinearMLP(_block_config(path, place, described)), strict=True)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must describe a model; it does not ({error}). Restore it from its source.") from error
    return model


def _known_model(path: Path, config: Mapping[str, Any]) -> nn.Module:
    try:
        return _skeleton(dict(config["model"]), config["family"])
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(". ")
        raise ValueError(
            f"{path} must describe a model; it does not ({reason}). Restore it from its source."
        ) from error


def _skeleton(described: dict[str, Any], family: str) -> nn.Module:
    if family == MIXER:
        return MlpMixer(MixerConfig(**described))
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = described.pop("model_type")
    # Where nothing is said, transformers asks the user whether to run a stranger's code.
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **described), trust_remote_code=False)


def _block_config(path: Path, place: str, described: Mapping[str, Any]) -> MultilinearMLPConfig:
    known = {field.name for field in fields(MultilinearMLPConfig)}
    if known != set(described):
        raise ValueError(
            f"{path} must give {', '.join(sorted(known))} for {place}; {', '.join(sorted(known ^ set(described)))} "
            "are missing or unknown. A newer mxd may have written it."
        )
    values: dict[str, Any] = {
        name: tuple(cast("list[int]", value)) if isinstance(value, list) else value for name, value in described.items()
    }
    return MultilinearMLPConfig(**values)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; it does not parse ({error}). Restore it from its source.") from error
    known = {"format", "format_version", "family", "model", "blocks"}
    if not isinstance(config, dict) or cast("dict[str, Any]", config).get("format") != FORMAT:
        raise ValueError(f'{path} must describe a multilinear model ("format": "{FORMAT}"); it is something else.')
    found = cast("dict[str, Any]", config)
    if found.keys() != known or found["family"] not in (LANGUAGE, MIXER) or found["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} must have format version {FORMAT_VERSION}, a known family and the keys "
            f"{', '.join(sorted(known))}; it has others. A newer mxd may have written it."
        )
    return found
