"""Edits of a run's layers: which layer is meant, what its latents' units are, and what a change of edits does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mxd.bundled import held_out_modules
from mxd.checkpoint import layer_folder
from mxd.data.text import open_text
from mxd.edits import Edit, with_edits
from mxd.evaluation.faithfulness import Candidate
from mxd.evaluation.opening import OpenedRun, open_run, read_finished_run
from mxd.evaluation.students import load_students
from mxd.models import vocabulary_size
from mxd.steering.experiment import latent_units
from mxd.steering.side_effects import Effect, concept_text, side_effects


class LayerToEdit(NamedTuple):
    """One student of a run."""

    run: Path
    """The run's folder."""
    description: dict[str, Any]
    """Its run.json."""
    candidate: Candidate
    """The layer, with the edits that it has, and its place."""
    model: str | None = None
    """Where the model is now; where the run found it if None."""

    @property
    def folder(self) -> Path:
        """The layer's folder."""
        return layer_folder(self.run, self.candidate.name)

    def open(self, text: Sequence[str], tokens: int | None, device: str | None) -> OpenedRun:
        """Load the model and the text, and take the layer where the model is."""
        opened = open_run(self.run, self.description, text, tokens, device, self.model)
        self.candidate.network.to(opened.language_model.device)
        return opened


def find_layer(run: Path, student: str, model: str | None = None) -> LayerToEdit:
    """Return the student that is meant, and where the model is if it is not where the run found it.

    Raises:
        ValueError: If the run is not finished, or has no such student, or several.
    """
    description = read_finished_run(run)
    found = [one.candidate for one in load_students(run, description["students"], [student])]
    if len(found) > 1:
        raise ValueError(
            f"student must name one layer to edit; {student} names {', '.join(one.name for one in found)}. "
            "Put the block's number in front."
        )
    return LayerToEdit(run, description, found[0], model)


def units_of(
    place: LayerToEdit, latents: Sequence[int], *, text: Sequence[str], tokens: int | None, device: str | None
) -> dict[int, float]:
    """Return the 99th percentile of the values that each latent takes where it fires in held-out text, as trained.

    Raises:
        ValueError: If one of them fires nowhere, or does not exist.
    """
    opened = place.open(text, tokens, device)
    units = latent_units(opened.language_model.module, place.candidate, opened.text, latents)
    silent = [latent for latent, unit in units.items() if unit is None]
    if silent:
        raise ValueError(
            f"A strength in units of p99 needs latents that fire in the held-out text; latent {silent[0]} does not. "
            "Give the strength as a value, or more --tokens."
        )
    return {latent: unit for latent, unit in units.items() if unit is not None}


def measure_edits(
    place: LayerToEdit,
    before: Sequence[Edit],
    after: Sequence[Edit],
    *,
    concept: Sequence[str],
    text: Sequence[str],
    tokens: int | None,
    device: str | None,
) -> list[Effect]:
    """Return what a change of a layer's edits does to the model's predictions; see `side_effects`.

    Args:
        place: The layer.
        before: Its edits.
        after: Those that take their place.
        concept: Files of text that has the concept; may be none.
        text: Other held-out text than the run's own.
        tokens: Tokens of it at most; also of the concept's.
        device: Where to run; the run's own where None.

    Raises:
        ValueError: If a text cannot be used, or an edit names a latent that the layer has not.
    """
    with_edits(place.candidate.network, after)
    opened = place.open(text, tokens, device)
    model = opened.language_model.module
    with_concept = None
    if concept:
        source = open_text(
            list(concept),
            text_field=place.description["config"]["text_field"],
            split=place.description["config"]["split"],
            revision=None,
            held_out_modules=held_out_modules(),
        )
        with_concept = concept_text(
            source,
            opened.language_model.tokenizer,
            opened.text,
            vocab_size=vocabulary_size(model),
            tokens=opened.text.contexts.numel(),
        )
    return side_effects(model, place.candidate, before, after, opened.text, with_concept)
