"""Loading a language model from the hub or a folder, with errors that say what to do."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, cast

import torch

from mxd.bundled import MODEL_NAME, bundled_model_folder
from mxd.models.sites import require_causal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES_REFUSED = (
    ".bin, .pt and .pth weights are pickles, which can run code, and are refused; on a machine where you trust them, "
    "load them with transformers' AutoModelForCausalLM and convert them with model.save_pretrained(FOLDER), "
    "then give FOLDER"
)


class LanguageModel(NamedTuple):
    """A pretrained language model, frozen, and where it comes from."""

    model: "PreTrainedModel"
    """The model, in evaluation mode and without gradients of its weights."""
    tokenizer: "PreTrainedTokenizerBase"
    """Its tokenizer."""
    id: str
    """The hub id or folder that it was loaded from."""
    revision: str | None
    """The hub's commit if it is known, else the revision that was asked for; None for a folder."""

    @property
    def module(self) -> torch.nn.Module:
        """The model, as PyTorch's types know it."""
        return cast("torch.nn.Module", self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.module)


def load_language_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: Literal["auto"] | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a language model and its tokenizer from the hub or a local folder.

    Weights are read from safetensors only; nothing is ever unpickled.

    Args:
        model_id: A hub id such as `openai-community/gpt2`, a local folder, or `bundled`.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights; "auto" takes the checkpoint's.
        device: Where to put the model; `auto` takes the first accelerator there is.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        FileNotFoundError: If the folder, its config.json, its safetensors weights or its tokenizer do not exist.
        ValueError: If the device cannot be used, the hub has no such model or cannot be reached, the model reads in
            both directions, the weights are damaged or do not fit the config, or transformers does not know the
            architecture, cannot use the config or misses a library that the model needs.
    """
    device = resolve_device(str(device))
    source = _source(model_id)
    if Path(source).is_dir():
        _check_folder(Path(source))
    model = _load_model(model_id, source, revision, dtype, trust_remote_code)
    tokenizer = _load_tokenizer(model_id, source, revision, trust_remote_code)
    commit = getattr(model.config, "_commit_hash", None)
    cast("torch.nn.Module", model).to(device).eval().requires_grad_(False)
    known = commit if isinstance(commit, str) else revision
    return LanguageModel(model, tokenizer, model_id, None if Path(source).is_dir() else known)


def load_outline(model_id: str, *, revision: str | None = None) -> torch.nn.Module:
    """Return a language model without its weights, from its config.json alone: where its modules are and how wide.

    Its tensors are on the device `meta`; it cannot be run.

    Args:
        model_id: A hub id, a local folder, or `bundled`.
        revision: Branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the hub has no such model or cannot be reached, it reads in both directions, or transformers does
            not know its architecture.
    """
    from transformers import AutoModelForCausalLM

    source = _source(model_id)
    config = _load_config(model_id, source, revision, trust_remote_code=False)
    try:
        with torch.device("meta"):
            # Where nothing is said, transformers asks the user whether to run a stranger's code.
            model: object = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # As in loading the whole model.
    except Exception as error:
        _explain_weights(model_id, error)
    return cast("torch.nn.Module", model).eval()


def load_tokenizer(model_id: str, *, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Load a language model's tokenizer alone.

    Args:
        model_id: A hub id, a local folder, or `bundled`.
        revision: Branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: If there is no such folder, or no tokenizer in it.
    """
    return _load_tokenizer(model_id, _source(model_id), revision, trust_remote_code=False)


def require_device(device: str | torch.device) -> None:
    """Check that tensors can be put on this device and read back.

    Raises:
        ValueError: If they cannot.
    """
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"device must be one that this machine's PyTorch can use; '{device}' is not ({reason}). Choose cpu."
        ) from error


def resolve_device(asked: str) -> str:
    """Return the device that was asked for; `auto` takes the first accelerator there is.

    Raises:
        ValueError: If the device is unknown or not there.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    require_device(asked)
    return asked


def device_of(module: torch.nn.Module) -> torch.device:
    """Return where a module's weights are."""
    return next(module.parameters()).device


def vocabulary_size(model: Any) -> int:
    """Return the number of token ids that a language model can read."""
    return int(model.get_input_embeddings().weight.shape[0])


def most_positions(model: Any) -> int | None:
    """Return how many tokens a language model has positions for; None where its configuration does not say.

    A model of text and images says it in the part of its configuration that is about text.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def _source(model_id: str) -> str:
    """Return the folder that a model's id names, or the id where it is the hub's."""
    folder = bundled_model_folder() if model_id == MODEL_NAME else Path(model_id).expanduser()
    if folder.is_dir():
        return str(folder)
    if model_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"A model must be a hub id or a folder; found no folder '{model_id}'. Check the path.")
    return model_id


def _load_model(
    model_id: str,
    source: str,
    revision: str | None,
    dtype: Literal["auto"] | torch.dtype,
    trust_remote_code: bool,
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    config = _load_config(model_id, source, revision, trust_remote_code)
    verbosity = transformers_logging.get_verbosity()
    # Its report on missing and mismatched weights is a table; ours is a sentence.
    transformers_logging.set_verbosity_error()
    try:
        loaded: object = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    # Everything, on purpose, as above: here the model is built from the config's values, and quantized ones need
    # libraries that may be missing.
    except Exception as error:
        _explain_weights(model_id, error)
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, info = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"The weights of '{model_id}' must hold every tensor of {type(model).__name__}; {len(missing)} are missing "
            f"({', '.join(missing[:3])}). Give a complete checkpoint of a causal language model."
        )
    return model


def _load_config(model_id: str, source: str, revision: str | None, trust_remote_code: bool) -> "PreTrainedConfig":
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    # Everything, on purpose: the config is a stranger's, and what its values lead to inside transformers (a division by
    # zero, a missing attribute, huggingface_hub's own validation errors) has no common base.
    except Exception as error:
        _explain_config(model_id, revision, error)
    require_causal(config, model_id)
    return cast("PreTrainedConfig", config)


def _load_tokenizer(
    model_id: str, source: str, revision: str | None, trust_remote_code: bool
) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FileNotFoundError(_no_tokenizer(model_id)) from error
    # Some tokenizer classes load without any file, and then know no token.
    if tokenizer.vocab_size == 0:
        raise FileNotFoundError(_no_tokenizer(model_id))
    return tokenizer


def _no_tokenizer(model_id: str) -> str:
    return (
        f"A model must come with its tokenizer (tokenizer.json and tokenizer_config.json); found none that can be read "
        f"in '{model_id}'. Save it there with tokenizer.save_pretrained(FOLDER)."
    )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"A model's folder must hold config.json; found {found} in '{folder}'. "
            "Give a folder that model.save_pretrained wrote."
        )
    for file in _weight_files(folder):
        if not file.is_file():
            raise FileNotFoundError(
                f"The weights in '{folder}' must include '{file.name}', which {_INDEX} names; found no such file. "
                "Copy or download the folder again."
            )
        _check_safetensors(file)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        try:
            names = {str(name) for name in json.loads((folder / _INDEX).read_text())["weight_map"].values()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"'{folder / _INDEX}' must be JSON with a weight_map; found something else ({error}). "
                "Copy or download the folder again."
            ) from error
        return [folder / name for name in sorted(names)]
    raise FileNotFoundError(_no_weights(str(folder)))


def _no_weights(model_id: str) -> str:
    return f"A model must have safetensors weights ({_WEIGHTS}); found none in '{model_id}': {_PICKLES_REFUSED}."


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"A weight file must be complete safetensors; found '{file}' truncated or damaged ({error}). "
            "Copy or download it again."
        ) from error


def _explain_config(model_id: str, revision: str | None, error: Exception) -> NoReturn:
    import transformers
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    text, cause = str(error), error.__cause__
    at = f"'{model_id}'" + (f" at revision '{revision}'" if revision else "")
    if "trust_remote_code" in text:
        message = (
            f"A model must need no code of its own unless you allow it; found {at} with Python code. "
            "If you trust its authors, read the code and pass trust_remote_code=True."
        )
    elif isinstance(cause, GatedRepoError):
        message = (
            f"Access to a model must have been granted; found {at} gated. "
            "Accept its terms on huggingface.co and run `hf auth login`."
        )
    elif isinstance(cause, RevisionNotFoundError):
        message = f"A revision must exist on the hub; found no {at}. Check the model's branches and tags."
    elif "valid JSON" in text:
        message = f"A model's config.json must be JSON; found something else in {at}. Copy or download it again."
    elif isinstance(error, ImportError):
        message = _library_missing(at, error)
    elif isinstance(error, (ValueError, KeyError)):
        message = (
            f"A model must be of an architecture that transformers {transformers.__version__} knows; found {at} with "
            f"a model_type in its config.json that is unknown or missing. Check the config, or upgrade transformers."
        )
    elif not isinstance(error, OSError):
        message = _unusable(at, error)
    else:
        message = (
            f"A model must be a folder, a model on the Hugging Face hub, or in its local cache when the hub cannot be "
            f"reached; found no {at}. Check the spelling and the network (and HF_HUB_OFFLINE), or download it first."
        )
    raise ValueError(message) from error


def _explain_weights(model_id: str, error: Exception) -> NoReturn:
    text = str(error)
    if isinstance(error, RuntimeError) and "mismatch" in text:
        raise ValueError(
            f"The weights of '{model_id}' must have the shapes that its config.json says; found some that do not. "
            "Take config.json and weights from the same model."
        ) from error
    if "trust_remote_code" in text:
        _explain_config(model_id, None, error)
    if "Unrecognized configuration class" in text:
        raise ValueError(
            f"A model must be a causal language model; found '{model_id}' of another kind, which "
            "AutoModelForCausalLM does not load. Give a model that generates text."
        ) from error
    if isinstance(error, OSError):
        raise FileNotFoundError(_no_weights(model_id)) from error
    at = f"'{model_id}'"
    raise ValueError(_library_missing(at, error) if isinstance(error, ImportError) else _unusable(at, error)) from error


def _library_missing(at: str, error: ImportError) -> str:
    # The whole text: its hint, what to install, may come after the first line.
    hint = " ".join(str(error).split()).rstrip(".")
    return (
        f"A model must need no library that is not installed; found {at} to need one ({hint}). "
        "Install it, or give a model that does without, such as the unquantized one."
    )


def _unusable(at: str, error: Exception) -> str:
    import transformers

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # huggingface_hub's validation errors are a heading, which ends in a colon, and the reason beneath it.
    reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(".")
    found = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return (
        f"A model must have a config.json from which transformers {transformers.__version__} can load a causal "
        f"language model; found {at} to fail ({found}). Correct its config.json, or copy or download the model again."
    )
