"""What probing found, and the file it is kept in."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Int

from mxd.atomic import JSON, write_text_atomically
from mxd.probing import PROBING_FILE, VERSION
from mxd.probing.collecting import HIDDEN, RESIDUAL
from mxd.probing.examples import PART_NAMES, Skipped
from mxd.probing.statistics import Quality, Verdict, judge

KS = (1, 2, 5, 20, 100)
"""How many features a probe may see."""
KEPT_LATENTS = 20
"""How many features of a probe are named."""
CHANCE = "chance"
"""Names what a guess without looking reaches: that every example is of the class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRow:
    """How well a class can be told by some features of one student, or of a dense layer."""

    concept: str
    """The class."""
    features: str
    """Whose features: `<layer>/<student>`, `<layer>/dense hidden`, `<layer>/residual stream`, `token identity` or
    `chance`."""
    layer: int | None
    """The block; null where it is none's."""
    kind: str
    """The kind of sparse layer, or the same as `features` without the layer."""
    k: int | None
    """Number of features that the probe sees, or fewer where fewer tell anything; null for all there are."""
    latents: Sequence[int]
    """Which, the best first; the first twenty."""
    quality: Quality
    """How good it is on the test part."""

    def to_json(self) -> dict[str, JSON]:
        """Return the row as the file has it, with null for what is not finite."""
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "quality"}
        return named | {name: _finite(value) for name, value in self.quality._asdict().items()}


def chance_row(
    positive: Bool[np.ndarray, " test"], concept: str, groups: Int[np.ndarray, " test"] | None = None
) -> ProbeRow:
    """Return what is reached by taking every example for the class: no guess that does not look has a larger F1.

    Args:
        positive: Which test examples are of the class.
        concept: The class.
        groups: As `judge` takes them.
    """
    [quality] = judge([Verdict(positive, np.ones_like(positive), np.zeros(len(positive)))], groups)
    return ProbeRow(concept=concept, features=CHANCE, layer=None, kind=CHANCE, k=None, latents=(), quality=quality)


class NamedLatent(NamedTuple):
    """A latent and the concept that it names best."""

    latent: int
    """Its number."""
    data: str
    """The data set that has the concept."""
    concept: str
    """The concept, chosen with its threshold before the test part was looked at."""
    threshold: float
    """Value from which on the latent says yes, chosen on the training part."""
    f1_validation: float
    """F1 on the validation part."""
    skill_validation: float
    """How much of what there is to gain over always saying yes, (F1 − F1 always) / (1 − F1 always), on the validation
    part; by this the concept was chosen."""
    f1: float
    """F1 on the test part."""
    precision: float
    """Share of the test tokens at which it says yes that are of the concept."""
    recall: float
    """Share of the concept's test tokens at which it says yes."""
    average_precision: float
    """Area under the precision-recall curve of its value on the test part."""
    firing_rate: float
    """Share of all tokens on which it fires."""


def number_of_classes(features: str, found: Sequence[object], classes: int) -> int:
    """Return over how many classes a mean is: all, as a class that no latent tells has no row and counts as 0.

    A dense layer, of which not all tokens are kept where they are many, has no row for a concept of too few of them;
    its mean is over those found.
    """
    return len(found) if features.partition("/")[2] in (HIDDEN, RESIDUAL) else classes


@dataclass(frozen=True, kw_only=True, eq=False)
class SetResult:
    """What was found on one data set."""

    data: str
    """The data set."""
    examples: Mapping[str, int]
    """Number of texts of each class, or of tokens of each concept."""
    total: int
    """Number of all texts, or tokens."""
    parts: Sequence[int]
    """How many of them are for training, validation and test."""
    skipped: Sequence[Skipped]
    """Classes with too few examples."""
    left_out: Mapping[str, int]
    """How many texts were left out, by why."""
    rows: Sequence[ProbeRow]
    """The results."""
    documents: int | None = None
    """Number of documents that the tokens are from."""
    test_groups: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many documents of the test part, or texts or groups of texts, hold each class: with fewer than five of them
    there is no interval."""

    def to_json(self) -> dict[str, JSON]:
        """Return it as the file has it."""
        return {
            "data": self.data,
            "total": self.total,
            "documents": self.documents,
            "parts": dict(zip(PART_NAMES, self.parts, strict=True)),
            "examples": dict(self.examples),
            "skipped": [skip._asdict() for skip in self.skipped],
            "left_out": dict(self.left_out),
            "test_groups": dict(self.test_groups),
            "rows": [row.to_json() for row in self.rows],
        }

    def mean_f1(self, features: str, k: int | None) -> float | None:
        """Return the mean F1 over classes, 0 for one that no latent tells; None where there is no such probe."""
        found = [row.quality.f1 for row in self.rows if (row.features, row.k) == (features, k)]
        return math.fsum(found) / number_of_classes(features, found, len(self.examples)) if found else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Probing:
    """All that probing a run found."""

    facts: Mapping[str, str]
    """What a reader must know to repeat it."""
    identity: Mapping[str, JSON]
    """Whose latents these are."""
    texts: Sequence[SetResult] = ()
    """Sample level: sets of texts with a label each."""
    tokens: Sequence[SetResult] = ()
    """Token level: documents with labelled spans."""
    named: Mapping[str, Sequence[NamedLatent]] = field(default_factory=dict[str, Sequence[NamedLatent]])
    """For each student, `<layer>/<id>`, its latents that name a concept."""

    def to_json(self) -> dict[str, JSON]:
        """Return it as the file has it."""
        return {
            "version": VERSION,
            "identity": dict(self.identity),
            "facts": dict(self.facts),
            "sample_level": [result.to_json() for result in self.texts],
            "token_level": {
                "sets": [result.to_json() for result in self.tokens],
                "students": {
                    name: {
                        "latents": [
                            # All digits of the threshold: rounded, it may lie above a value that reaches it.
                            {key: _finite(value) for key, value in latent._asdict().items()}
                            | {"threshold": latent.threshold}
                            for latent in latents
                        ]
                    }
                    for name, latents in self.named.items()
                },
            },
        }


def write_probing(run: Path, probing: Probing) -> Path:
    """Write `probing.json` into a run's folder, and return its path."""
    path = run / PROBING_FILE
    # A line for each of a hundred thousand latents would be indented to ten.
    write_text_atomically(path, json.dumps(probing.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _finite(value: object) -> JSON:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_finite(number) for number in value]
    return cast("JSON", value)
