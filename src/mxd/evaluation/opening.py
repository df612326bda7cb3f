"""A finished run, opened for evaluation: its model and the held-out text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mxd.atomic import JSON
from mxd.bundled import held_out_modules
from mxd.data.text import TextSource, open_text
from mxd.data.tokenization import Tokenizer
from mxd.data.tokens import HeldOut, held_out_contexts, special_tokens
from mxd.evaluation.faithfulness import EvaluationText
from mxd.evaluation.record import EvaluationIdentity, identify
from mxd.models import LanguageModel, fingerprint, load_language_model, load_tokenizer, vocabulary_size
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


def load_run_model(run: Path, description: Mapping[str, Any], device: str | None = None) -> LanguageModel:
    """Load the language model that a run was trained on.

    Args:
        run: The run's folder, for messages.
        description: Its run.json.
        device: Where to run; the run's own where None.

    Raises:
        ValueError: If the model's weights or settings are others than those that the run was trained on.
    """
    config = description["config"]
    dtype = "auto" if config["model_dtype"] == "auto" else getattr(torch, config["model_dtype"])
    language_model = load_language_model(
        config["model"],
        revision=description["model"]["revision"],
        dtype=dtype,
        device=device or str(description["resources"]["device"]),
    )
    if description["model"]["fingerprint"] != fingerprint(language_model.module):
        raise ValueError(
            f"{run} must be evaluated with the model that it was trained on; {language_model.id} has other weights or "
            "another config.json now, or an older version of mxd wrote the run. Restore that model, or train anew."
        )
    return language_model


def open_run(
    run: Path, description: Mapping[str, Any], text: Sequence[str], tokens: int | None, device: str | None
) -> OpenedRun:
    """Load a run's model and the text to evaluate it on.

    Args:
        run: The run's folder, for messages.
        description: Its run.json.
        text: Other text than the run's own.
        tokens: Tokens at most; the run's own `eval_tokens` where None.
        device: Where to run; the run's own where None.

    Raises:
        ValueError: If the model is not the one that the run was trained on, or the text cannot be used.
    """
    config = description["config"]
    source = open_run_text(run, description, text)
    language_model = load_run_model(run, description, device)
    model = language_model.module
    held_out = _held_out(source, config, language_model.tokenizer, vocabulary_size(model), tokens)
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
        identity=_identity(description, held_out),
    )


def open_run_text(run: Path, description: Mapping[str, Any], text: Sequence[str]) -> TextSource:
    """Open the text that a run was trained on, or other text as the run would read it.

    Args:
        run: The run's folder, for messages.
        description: Its run.json.
        text: Other text than the run's own.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the run's own text is not what it was trained on: a document is held out by what is in it, so
            that one which was changed by a word may be held out now and have been trained on.
    """
    config, trained_on = description["config"], description["text"]
    source = open_text(
        list(text) or config["text"],
        text_field=config["text_field"],
        split=config["split"],
        revision=None if text else trained_on["revision"],
        held_out_modules=held_out_modules(),
    )
    found = source.identity
    if not text and any(getattr(found, field) != trained_on[field] for field in _DESCRIBED["text"]):
        raise ValueError(
            f"The text of {run} must be what the run was trained on; {source.name} has changed since, so that what is "
            "held out of it now may have been trained on. Restore it (for stdlib, the version of Python), or name "
            "other text with --text."
        )
    return source


def foresee_identity(
    run: Path, description: Mapping[str, Any], text: Sequence[str], tokens: int | None
) -> EvaluationIdentity:
    """Return what `open_run` would evaluate on, without loading the model: its tokenizer is enough."""
    tokenizer = load_tokenizer(description["config"]["model"], revision=description["model"]["revision"])
    # Whether ids fit the model is found out when it is there.
    held_out = _held_out(open_run_text(run, description, text), description["config"], tokenizer, 2**31, tokens)
    return _identity(description, held_out)


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
