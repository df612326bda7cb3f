"""`evaluation.json`: what was measured of a run, and on what, so that it is compared with its like only."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from mxd.atomic import JSON, write_json_atomically
from mxd.data.tokens import HeldOut
from mxd.evaluation.rows import METRICS_VERSION, EvaluationRow

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationIdentity:
    """What an evaluation was made on; the rows of two evaluations compare if all but the edits is equal."""

    model: str
    """Fingerprint of the language model."""
    text: str
    """Digest of the held-out contexts, and of which document each token is from."""
    tokens: int
    """Number of tokens in those contexts."""
    context: int
    """Length of a context, in tokens."""
    special_positions: str
    """What happens at BOS and padding: `replace` or `passthrough`."""
    metrics: int = METRICS_VERSION
    """Version of the definitions of the numbers."""
    edits: str | None = None
    """Digest of the edits of the run's layers (`mxd.checkpoint.edits_digest`); None where none is edited."""


class StoredEvaluation(NamedTuple):
    """The content of an `evaluation.json`."""

    identity: EvaluationIdentity
    """What it was made on."""
    facts: Mapping[str, str]
    """What a reader must know to repeat it."""
    rows: Sequence[EvaluationRow]
    """One a student, then those for several layers at once."""


def identify(held_out: HeldOut, model: str, special_positions: str) -> EvaluationIdentity:
    """Return the identity of an evaluation on this text."""
    digest = hashlib.sha256()
    for numbers in (held_out.contexts, held_out.documents):
        digest.update(f"{tuple(numbers.shape)}".encode())
        digest.update(numbers.contiguous().numpy().tobytes())
    return EvaluationIdentity(
        model=model,
        text=digest.hexdigest(),
        tokens=held_out.contexts.numel(),
        context=held_out.contexts.shape[1],
        special_positions=special_positions,
    )


def write_record(path: Path, stored: StoredEvaluation) -> None:
    """Write an evaluation, whole or not at all."""
    rows: list[JSON] = [row.to_json() for row in stored.rows]
    write_json_atomically(path, {"facts": dict(stored.facts), "identity": asdict(stored.identity), "rows": rows})


def read_record(path: Path) -> StoredEvaluation:
    """Return what `write_record` wrote.

    Raises:
        ValueError: If it is damaged, or of a version of mxd that measured otherwise.
    """
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON; it does not ({error}).") from error
    content = cast("Mapping[str, Any]", value if isinstance(value, dict) else {})
    identity, facts, rows = (content.get(name) for name in ("identity", "facts", "rows"))
    # Records that were written before layers could be edited do not have the last one.
    if not isinstance(identity, dict) or set(cast("Mapping[str, Any]", identity)) | {"edits"} != _IDENTITY:
        raise ValueError(f"{path} must say what it was measured on; it is of another version of mxd.")
    if identity["metrics"] != METRICS_VERSION:
        raise ValueError(
            f"{path} must be of version {METRICS_VERSION} of the metrics; it is of version {identity['metrics']}."
        )
    listed = cast("list[object]", rows if isinstance(rows, list) else [None])
    if not isinstance(facts, dict) or not all(isinstance(row, dict) for row in listed):
        raise ValueError(f"{path} must hold facts and rows; it does not.")
    read = [EvaluationRow.from_json(cast("dict[str, JSON]", row)) for row in listed]
    return StoredEvaluation(EvaluationIdentity(**identity), cast("dict[str, str]", facts), read)


def is_json(path: Path) -> bool:
    """Return whether a file is whole, whatever it says."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


_IDENTITY = set(EvaluationIdentity.__dataclass_fields__)
