"""Everything that a run needs, checked, with nothing written yet."""

import importlib.metadata
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch

from mxd.atomic import JSON
from mxd.data.activation_cache import ActivationCache
from mxd.data.text import TextSource
from mxd.data.tokens import TokenStream
from mxd.models import LanguageModel, MlpSite, fingerprint
from mxd.runs.places import WORKING_FOLDER
from mxd.training.config import TrainConfig
from mxd.training.grid import StudentPlan
from mxd.training.optimizer import Schedule
from mxd.training.resources import Resources


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a run needs, checked, with nothing written yet."""

    config: TrainConfig
    """What was asked for."""
    resources: Resources
    """What it computes with."""
    language_model: LanguageModel
    """The model whose MLPs are decomposed."""
    sites: Mapping[int, MlpSite]
    """Those MLPs, by block."""
    text: TextSource
    """Where the documents come from."""
    tokens: TokenStream
    """Contexts of training text."""
    students: Sequence[StudentPlan]
    """What is trained."""
    cache: ActivationCache | None
    """Where activations are kept; None where the model runs for every batch."""
    sources: Mapping[str, str]
    """SHA-256 of the weights that each student begins from, by its name, where they are another run's."""

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.config.steps

    @property
    def schedule(self) -> Schedule:
        """Learning rate over the steps."""
        steps = -(-self.config.warmup // self.config.batch_tokens)
        return Schedule(steps=self.steps, warmup_steps=steps, shape=self.config.schedule)

    @property
    def activation_dtype(self) -> torch.dtype:
        """Type of the activations that students see."""
        return self.cache.dtype if self.cache is not None else parameter_dtype(self.language_model)

    def description(self) -> dict[str, JSON]:
        """Return what run.json says: configuration, what was resolved, versions and identities."""
        versions = {name: importlib.metadata.version(name) for name in ("mxd", "torch", "transformers")}
        model = self.language_model
        # Absent where there are none, as in the run.json of older runs.
        sources: dict[str, JSON] = {"sources": dict(self.sources)} if self.sources else {}
        # What `auto` came to: another version may say otherwise, and a run goes on as it began.
        is_chosen = self.config.warmup_tokens == "auto"
        warmup: dict[str, JSON] = {"warmup_steps": self.schedule.warmup_steps} if is_chosen else {}
        return {
            "command": "train",
            WORKING_FOLDER: str(Path.cwd()),
            "config": cast(JSON, asdict(self.config)),
            "resources": cast(JSON, asdict(self.resources)),
            "model": {
                "id": model.id,
                "revision": model.revision,
                "fingerprint": fingerprint(model.module),
            },
            "text": cast(JSON, self.text.identity._asdict()),
            "cache": self._cache_description(),
            "modules": {str(layer): site.path for layer, site in self.sites.items()},
            "students": [cast(JSON, asdict(plan)) for plan in self.students],
            **sources,
            "steps": self.steps,
            **warmup,
            "versions": {"python": sys.version.split()[0], **versions},
        }

    def _cache_description(self) -> JSON:
        if self.cache is None:
            return None
        there, missing = self.cache.coverage()
        return {"dtype": str(self.cache.dtype).removeprefix("torch."), "bytes_there": there, "bytes_to_write": missing}


def buffer_bytes(config: TrainConfig, sites: Iterable[MlpSite], itemsize: int) -> int:
    """Memory of a run's shuffle buffer for these MLPs, in bytes; `itemsize` is that of one entry."""
    rows = max(config.batch_tokens, min(config.buffer_tokens, config.tokens))
    return rows * itemsize * sum(site.d_in + site.d_out for site in sites)


def parameter_dtype(language_model: LanguageModel) -> torch.dtype:
    """Type of a language model's weights."""
    return next(language_model.module.parameters()).dtype
