"""Models in folders: our own classifiers, and transformers models that classify or continue text or classify images."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from mxd.atomic import filled_folder
from mxd.models.loading import load_language_model, load_tokenizer, resolve_device
from mxd.privacy.classifiers import CONFIG_FILE, PixelNormalization, is_classifier, load_classifier, save_classifier
from mxd.privacy.text_examples import TextReader, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TASKS: dict[str, TextTask] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}
_IMAGES = "ForImageClassification"
PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """A model from a folder, ready to be tuned."""

    model: nn.Module
    """It, in evaluation mode, all its weights requiring gradients; images go in as pixels from 0 to 1."""
    reader: TextReader | None
    """How text becomes what it reads; None where it reads numbers."""
    class_names: tuple[str, ...]
    """Names of its classes where it has any."""
    write: Callable[[Path, nn.Module], None]
    """Writes a tuned copy of `model` into a folder, in the form that it was read in."""


def load_model(model: str, *, device: str = "auto", max_tokens: int = 512) -> SavedModel:
    """Load a classifier of ours, or a transformers model for sequences, tokens, images or causal language modelling.

    Args:
        model: A folder; for transformers models also a hub id, or `bundled`.
        device: Where to put it; `auto` takes an accelerator if there is one.
        max_tokens: Longest text that it is given.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is damaged or of another kind, or the device cannot be used.
    """
    device = resolve_device(device)
    folder = Path(model).expanduser()
    if is_classifier(folder):
        loaded = load_classifier(folder)
        ours = loaded.model.to(device).requires_grad_(True)
        return SavedModel(
            model=ours,
            reader=None,
            class_names=loaded.class_names,
            write=lambda out, tuned: save_classifier(out, loaded.config, tuned, loaded.class_names),
        )
    architecture = _architecture(model, folder)
    if architecture.endswith(_IMAGES):
        return _image_model(folder, device)
    endings = (ending for ending in _TASKS if architecture.endswith(ending))
    task = _TASKS.get(next(endings, ""))
    if task is None:
        raise ValueError(
            f"the model must classify sequences, tokens or images, or be a causal language model; '{model}' is "
            f"{architecture or 'of no known kind'}."
        )
    if task == "causal":
        language_model = load_language_model(model, dtype=torch.float32, device=device)
        found, tokenizer = language_model.model, language_model.tokenizer
    else:
        kind = "AutoModelForSequenceClassification" if task == "sequence" else "AutoModelForTokenClassification"
        found, tokenizer = _pretrained(kind, folder), load_tokenizer(str(folder))
        cast(nn.Module, found).to(device)
        # Classifiers on decoders take the last token that is not the padding's; without one they refuse batches.
        if found.config.pad_token_id is None:
            known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
            found.config.pad_token_id = next(token for token in known if isinstance(token, int))

    def write(out: Path, tuned: nn.Module) -> None:
        with filled_folder(out) as place:
            cast("PreTrainedModel", tuned).save_pretrained(place, safe_serialization=True)
            tokenizer.save_pretrained(place)
            shutil.rmtree(out, ignore_errors=True)

    return SavedModel(
        model=cast(nn.Module, found).eval().requires_grad_(True),
        reader=TextReader(tokenizer, task, max_tokens, _padding(found)),
        class_names=() if task == "causal" else _class_names(found),
        write=write,
    )


def _image_model(folder: Path, device: str) -> SavedModel:
    found = _pretrained("AutoModelForImageClassification", folder)
    settings = _read_json(folder / PREPROCESSOR_FILE)
    mean, std = settings.get("image_mean", [0.0]), settings.get("image_std", [1.0])
    whole = nn.Sequential(PixelNormalization(tuple(mean), tuple(std)), cast(nn.Module, found)).to(device)

    def write(out: Path, tuned: nn.Module) -> None:
        with filled_folder(out) as place:
            cast("PreTrainedModel", cast(nn.Sequential, tuned)[1]).save_pretrained(place, safe_serialization=True)
            if (folder / PREPROCESSOR_FILE).is_file():
                shutil.copyfile(folder / PREPROCESSOR_FILE, place / PREPROCESSOR_FILE)
            shutil.rmtree(out, ignore_errors=True)

    return SavedModel(
        model=whole.eval().requires_grad_(True), reader=None, class_names=_class_names(found), write=write
    )


def _padding(model: "PreTrainedModel") -> int:
    token = getattr(model.config, "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def _class_names(model: "PreTrainedModel") -> tuple[str, ...]:
    """The model's names of its classes; none where it has only the numbered ones that transformers makes up."""
    named = cast("dict[int, str]", getattr(model.config, "id2label", None) or {})
    names = tuple(named[place] for place in sorted(named))
    return () if names == tuple(f"LABEL_{place}" for place in range(len(names))) else names


def _architecture(model: str, folder: Path) -> str:
    """The class that the model was saved from."""
    if model == "bundled" or not (folder.is_dir() or model.startswith((".", "/", "~"))):
        # A hub id: what is no causal language model is downloaded first, by whoever wants it.
        return "ForCausalLM"
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"a model's folder must hold {CONFIG_FILE}; {folder} does not; check the path.")
    names = _read_json(folder / CONFIG_FILE).get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: object = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON; it does not ({error}); copy it again.") from error
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _pretrained(kind: str, folder: Path) -> "PreTrainedModel":
    """Load a transformers model from safetensors in a folder, running none of its own code."""
    import transformers

    try:
        loaded: Any = getattr(transformers, kind).from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
        )
    # Everything, on purpose: what a stranger's config leads to inside transformers has no common base.
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{folder} must hold a model that transformers can load from safetensors; it fails "
            f"({type(error).__name__}: {first})."
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"the weights in {folder} must be complete; {len(missing)} are missing ({missing[0]}).")
    return model
