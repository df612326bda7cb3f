"""A finished run, opened for evaluation: its model and the held-out text, wherever they lie now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from mxd.atomic import JSON
from mxd.bundled import MODEL_NAME, held_out_modules
from mxd.data.text import STDLIB, TextSource, open_text
from mxd.data.tokenization import Tokenizer
from mxd.data.tokens import HeldOut, held_out_contexts, special_tokens
from mxd.evaluation.faithfulness import EvaluationText
from mxd.evaluation.record import EvaluationIdentity, identify
from mxd.models import (
    LanguageModel,
    fingerprint,
    load_language_model,
    load_outline,
    load_tokenizer,
    resolve_device,
    vocabulary_size,
)
from mxd.runs.places import finding_model, finding_text, recorded_place
from mxd.runs.run import is_finished, read_configuration

_DESCRIBED = {
    "config": (
        *("model", "model_dtype", "module", "text", "text_field", "split"),
        *("context", "eval_tokens", "special_positions"),
    ),
    "resources": ("device",),
    "model": ("revision", "fingerprint"),
    "text": ("digest", "revision", "split"),
}
"""What evaluation reads of a run.json, beside its students."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedRun:
    """All that evaluation needs beside the students."""

    language_model: LanguageModel
    """The model, where it was asked to run."""
    held_out: HeldOut
    """The text."""
    text: EvaluationText
    """The text as measurements take it."""
    text_name: str
    """The text's name, for people."""
    on_own_text: bool
    """Whether it is the text that the run was trained on, of which held-out documents are read."""
    identity: EvaluationIdentity
    """The model and the text; of edits nothing, because no layer is read."""


def read_finished_run(run: Path) -> dict[str, Any]:
    """Return the run.json of a run that can be evaluated.

    Raises:
        ValueError: If there is none, the run has not finished, or its run.json lacks what evaluation reads.
    """
    description = read_configuration(run)
    if not is_finished(run):
        raise ValueError(f"{run} must be a finished run; it is not; finish it with mxd train --resume.")
    _require_described(run, description)
    return cast("dict[str, Any]", description)


def load_run_model(
    run: Path, description: Mapping[str, Any], device: str | None = None, model: str | None = None
) -> LanguageModel:
    """Load the language model that a run was trained on, called what the run calls it.

    Args:
        run: The run's folder, for messages.
        description: Its run.json.
        device: Where to run; the run's own where None.
        model: Where the model is now (a folder or an id on the hub); where the run found it if None.

    Raises:
        FileNotFoundError: If there is no model where the run found it.
        ValueError: If the model's weights or settings are others than those that the run was trained on.
    """
    config, place = description["config"], _model_place(description, model)
    # First, since it may be what is wrong with a model that is there.
    where = resolve_device(device or str(description["resources"]["device"]))
    with finding_model(str(run), place.name, is_given=model is not None):
        language_model = load_language_model(
            place.name,
            revision=place.revision,
            dtype="auto" if config["model_dtype"] == "auto" else getattr(torch, config["model_dtype"]),
            device=where,
        )
    if description["model"]["fingerprint"] != fingerprint(language_model.module):
        raise ValueError(
            f"{run} must be evaluated with the model that it was trained on; {place.name} has other weights or "
            "another config.json now, or an older version of mxd wrote the run. Restore that model, name where it is "
            "with --model, or train anew."
        )
    return language_model._replace(id=config["model"])


def load_run_outline(run: Path, description: Mapping[str, Any], model: str | None = None) -> nn.Module:
    """Load the language model that a run was trained on without its weights: where its modules are.

    Args:
        run: The run's folder, for messages.
        description: Its run.json.
        model: Where the model is now (a folder or an id on the hub); where the run found it if None.

    Raises:
        FileNotFoundError: If there is no model where the run found it.
        ValueError: If transformers cannot make the model of its configuration.
    """
    place = _model_place(description, model)
    with finding_model(str(run), place.name, is_given=model is not None):
        return load_outline(place.name, revision=place.revision)


def open_run(
    run: Path,
    description: Mapping[str, Any],
    text: Sequence[str],
    tokens: int | None,
    device: str | None,
    model: str | None = None,
) -> OpenedRun:
    """Load a run's model and the text to evaluate it on.

    Args:
        run: The run's folder, for messages.
        description: Its run.json.
        text: Other text than the run's own, or where that is now.
        tokens: Tokens at most; the run's own `eval_tokens` where None.
        device: Where to run; the run's own where None.
        model: Where the model is now; where the run found it if None.

    Raises:
        FileNotFoundError: If the model or a file of the text is missing.
        ValueError: If the model is not the one that the run was trained on, or the text cannot be used.
    """
    config = description["config"]
    source = open_run_text(run, description, text)
    language_model = load_run_model(run, description, device, model)
    held_out = _held_out(source, config, language_model.tokenizer, vocabulary_size(language_model.module), tokens)
    return OpenedRun(
        language_model=language_model,
        held_out=held_out,
        text=EvaluationText(
            contexts=held_out.contexts,
            documents=held_out.documents,
            special_ids=special_tokens(language_model.tokenizer),
            passthrough=config["special_positions"] == "passthrough",
            module_path=config["module"],
        ),
        text_name=source.name,
        on_own_text=is_own_text(description, source),
        identity=_identity(description, held_out),
    )


def open_run_text(run: Path, description: Mapping[str, Any], text: Sequence[str]) -> TextSource:
    """Open the text that a run was trained on, or other text as the run would read it.

    Args:
        run: The run's folder, for messages.
        description: Its run.json.
        text: Other text than the run's own, or where that is now.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the run's own text is not what it was trained on: a document is held out by what is in it, so
            that one which was changed by a word may be held out now and have been trained on.
    """
    config, trained_on = description["config"], description["text"]
    own = [recorded_place(name, description, alias=STDLIB) for name in config["text"]]
    with finding_text(str(run), is_given=bool(text)):
        source = open_text(
            list(text) or own,
            text_field=config["text_field"],
            split=config["split"],
            revision=None if text else trained_on["revision"],
            held_out_modules=held_out_modules(),
        )
    if not text and not is_own_text(description, source):
        raise ValueError(
            f"The text of {run} must be what the run was trained on; {source.name} has changed since, so that what is "
            "held out of it now may have been trained on. Restore it (for stdlib, the version of Python), or name "
            "with --text where it is now, or other text."
        )
    return source


def is_own_text(description: Mapping[str, Any], source: TextSource) -> bool:
    """Whether a text is the one that a run was trained on: local text by its content, a hub dataset by its commit."""
    found, trained_on = source.identity, description["text"]
    # An id on the hub says which dataset a commit is of; files may be called anything.
    is_called_so = found.digest is not None or list(found.names) == list(trained_on.get("names", found.names))
    return is_called_so and all(getattr(found, field) == trained_on[field] for field in _DESCRIBED["text"])


class Foreseen(NamedTuple):
    """What a run would be evaluated on."""

    identity: EvaluationIdentity
    """The model and the text."""
    on_own_text: bool
    """Whether it is the text that the run was trained on."""


def foresee_identity(
    run: Path, description: Mapping[str, Any], text: Sequence[str], tokens: int | None, model: str | None = None
) -> Foreseen:
    """Return what `open_run` would evaluate on, without loading the model: its tokenizer is enough."""
    source, place = open_run_text(run, description, text), _model_place(description, model)
    with finding_model(str(run), place.name, is_given=model is not None):
        tokenizer = load_tokenizer(place.name, revision=place.revision)
    # Whether ids fit the model is found out when it is there.
    held_out = _held_out(source, description["config"], tokenizer, 2**31, tokens)
    return Foreseen(_identity(description, held_out), is_own_text(description, source))


class _ModelPlace(NamedTuple):
    name: str
    revision: str | None


def _model_place(description: Mapping[str, Any], given: str | None) -> _ModelPlace:
    """Return where a run's model is to be loaded from, and at which commit; what is given now is no other commit's."""
    recorded, revision = description["config"]["model"], description["model"]["revision"]
    if given is not None:
        return _ModelPlace(given, revision if given == recorded else None)
    return _ModelPlace(recorded_place(recorded, description, alias=MODEL_NAME), revision)


def _identity(description: Mapping[str, Any], held_out: HeldOut) -> EvaluationIdentity:
    return identify(held_out, description["model"]["fingerprint"], description["config"]["special_positions"])


def _held_out(
    source: TextSource, config: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int, tokens: int | None
) -> HeldOut:
    return held_out_contexts(
        source,
        tokenizer,
        context=config["context"],
        num_tokens=config["eval_tokens"] if tokens is None else tokens,
        vocab_size=vocab_size,
    )


def _require_described(run: Path, description: Mapping[str, JSON]) -> None:
    parts = {name: description.get(name) for name in _DESCRIBED}
    missing = [
        f"{part}.{name}"
        for part, names in _DESCRIBED.items()
        for name in names
        if not isinstance(parts[part], dict) or name not in cast(dict[str, JSON], parts[part])
    ]
    if not description.get("students"):
        missing.append("students")
    if missing:
        raise ValueError(
            f"{run}/run.json must describe a run as mxd train writes it; {', '.join(missing)} missing. "
            "Restore it from a copy, or evaluate with the version of mxd that wrote it."
        )
