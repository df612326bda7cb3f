"""What surgery requires of what it is given: one sentence where torch or transformers would fail deep inside.

Nothing here looks into a tensor, so no device is waited for.
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from mxd.bundled import MODEL_NAME, bundled_model_folder
from mxd.layers import Provenance, SparseLayer
from mxd.models.sites import MlpSite


def require_layers(layers: object) -> None:
    """Check that these are blocks' indices, as far as it shows before the model is asked.

    Raises:
        TypeError: If they are not.
    """
    if isinstance(layers, str) or not isinstance(layers, Collection):
        raise TypeError(f"layers must be several blocks' indices, such as [3]; got {_short(layers)}.")


def require_ids(input_ids: object) -> None:
    """Check that these are token ids, as a model takes them.

    Raises:
        TypeError: If they are no tensor of whole numbers.
        ValueError: If they are not (batch, seq).
    """
    if not isinstance(input_ids, Tensor):
        ids = getattr(input_ids, "input_ids", None)
        hint = (
            "Give its .input_ids, and its .attention_mask too where texts are padded."
            if isinstance(ids, Tensor)
            else "Ask the tokenizer for return_tensors='pt'."
        )
        raise TypeError(f"input_ids must be a tensor of token ids; got {type(input_ids).__name__}. {hint}")
    if input_ids.is_floating_point() or input_ids.is_complex():
        raise TypeError(f"input_ids must be whole numbers; got {input_ids.dtype}. Give what the tokenizer returns.")
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids must have shape (batch, seq); got {tuple(input_ids.shape)}. For one text, give input_ids[None]."
        )


def require_by_block(given: object, name: str) -> None:
    """Check that something is given for each block by its index.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be given by block, such as {{3: ...}}; got {_short(given)}.")


def require_replacement(block: int, replacement: object) -> None:
    """Check that this can stand in an MLP's place.

    Raises:
        TypeError: If it cannot.
    """
    if not callable(replacement):
        raise TypeError(
            f"What stands in for block {block}'s MLP must be a sparse layer, an MlpSite, a module or a function of x; "
            f"got {_short(replacement)}. Load layers with mxd.load."
        )


def require_tokens(tokens: object) -> None:
    """Check that these are token ids at which the MLP stays.

    Raises:
        TypeError: If they are not.
    """
    if isinstance(tokens, str) or not isinstance(tokens, Collection) or any(token is None for token in tokens):
        raise TypeError(
            f"passthrough must be several token ids, such as [tokenizer.bos_token_id]; got {_short(tokens)}."
        )


def require_widths(site: MlpSite, replacement: object) -> None:
    """Check that what replaces an MLP is as wide as it is, where it says how wide it is.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(replacement, MlpSite):
        widths, expected = (replacement.d_in, replacement.d_out), (site.d_in, site.d_out)
    elif isinstance(replacement, SparseLayer):
        widths = (replacement.config.d_in, replacement.config.d_out)
        expected = (site.d_in if replacement.reads == "input" else site.d_out, site.d_out)
    else:
        return
    if widths != expected:
        raise ValueError(
            f"What replaces the MLP at '{site.path}' must have (d_in, d_out) = {expected}; got {widths}. "
            "Use a layer that was trained for this model."
        )


def require_own_place(model: nn.Module, site: MlpSite, provenance: Provenance) -> None:
    """Check that a layer belongs to this MLP, as far as its provenance and the model say where they come from.

    Models are compared by name, and only where both are known to be of the hub (or bundled): a folder may hold any
    model. Copies of a model under other accounts count as the same.

    Raises:
        ValueError: If it belongs elsewhere.
    """
    allow = "Pass allow_misplaced=True to put it there nevertheless."
    if provenance.layer is not None and provenance.layer != site.layer:
        raise ValueError(
            f"A layer must stand in the block whose MLP it was trained on, {provenance.layer}; got block "
            f"{site.layer}. {allow}"
        )
    trained, here = _below_block(provenance.module_path, site.layer), _below_block(site.path, site.layer)
    if trained and here and trained != here:
        raise ValueError(
            f"A layer must stand where the module was that it was trained on, '{provenance.module_path}'; got "
            f"'{site.path}'. {allow}"
        )
    trained, here = _name_of_trained(provenance), _name_of(model)
    if trained and here and trained.rpartition("/")[2].casefold() != here.rpartition("/")[2].casefold():
        raise ValueError(f"A layer must stand in the model that it was trained on, {trained}; got {here}. {allow}")


def _below_block(path: str | None, layer: int) -> str:
    """Return the part of a module's path behind the block's number, nothing where there is none."""
    return "" if path is None else path.partition(f".{layer}.")[2]


def _name_of_trained(provenance: Provenance) -> str | None:
    # A revision is known of models of the hub alone: what looks like an id without one may be a folder elsewhere.
    return provenance.model if provenance.revision is not None or provenance.model == MODEL_NAME else None


def _name_of(model: nn.Module) -> str | None:
    config: object = getattr(model, "config", None)
    name, commit = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not isinstance(name, str):
        return None
    if name == str(bundled_model_folder()):
        return MODEL_NAME
    return name if isinstance(commit, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def _short(value: object) -> str:
    """Return a value, or its type where it may be long."""
    return f"{value!r:.60}" if isinstance(value, (int, float, str, list)) else type(value).__name__
