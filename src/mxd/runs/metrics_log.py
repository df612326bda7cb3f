"""The numbers of a run as it goes: `metrics.jsonl`, and optional mirrors of it in other tools."""

import importlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Protocol, cast, runtime_checkable

from mxd.atomic import JSON, write_text_atomically

logger = logging.getLogger(__name__)


@runtime_checkable
class MetricsSink(Protocol):
    """Something that takes one record a logging step: `MetricsLog` and its mirrors."""

    def log(self, record: Mapping[str, JSON]) -> None:
        """Take a record; `record["step"]` is the step it belongs to."""
        ...

    def close(self) -> None:
        """Write out what is pending; nothing is logged afterwards."""
        ...


class MetricsLog:
    """An append-only file of JSON objects, one a line, each on disk's way as soon as it is logged.

    Opening it drops the records from `first_step` on, and a line that a killed process left
    unfinished, so that a resumed run logs every step once.

    Args:
        path: The file; its folder must exist.
        first_step: The first step that will be logged (again); 0 empties the log.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        kept = [record for record in read_metrics(path) if _step(record) < first_step] if path.exists() else []
        seconds = kept[-1].get("seconds") if kept else None
        self._seconds_before = float(seconds) if isinstance(seconds, int | float) else 0.0
        self._opened = time.monotonic()
        write_text_atomically(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Mapping[str, JSON]) -> None:
        """Append a record; NaN and infinity, which JSON does not have, become null.

        Raises:
            ValueError: If the record has no whole number under "step".
            OSError: If it cannot be written, for instance because the disk is full.
        """
        _step(record)
        self._file.write(_line(record))
        self._file.flush()

    def seconds(self) -> float:
        """Return how long has been worked on the run: up to the last record that was kept, and since this was opened.

        To the millisecond, for the records' own `seconds`, which so grow over all resumptions.
        """
        return round(self._seconds_before + time.monotonic() - self._opened, 3)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, JSON]]:
    """The records of a metrics log, also of one that is being written.

    An unfinished last line is left out; any other line that is no record is left out with a logged warning.
    """
    records: list[dict[str, JSON]] = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record: object = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and type(cast("dict[str, JSON]", record).get("step")) is int:
            records.append(cast("dict[str, JSON]", record))
        elif line.endswith(b"\n"):
            logger.warning("Line %d of %s is no record with a step and is left out.", number, path)
    return records


class Mirror:
    """A sink that training can do without: when it fails, that is logged as a warning, and it gets nothing more.

    Args:
        sink: What is mirrored to.
    """

    def __init__(self, sink: MetricsSink) -> None:
        self._sink = sink
        self._has_failed = False

    def log(self, record: Mapping[str, JSON]) -> None:
        """Pass a record on."""
        if not self._has_failed:
            self._try(lambda: self._sink.log(record))

    def close(self) -> None:
        """Close the sink, also one that has failed."""
        self._try(self._sink.close)

    def _try(self, action: Callable[[], None]) -> None:
        # Whatever another tool's network or files may raise.
        try:
            action()
        except Exception as error:
            if not self._has_failed:
                name = type(self._sink).__name__
                logger.warning("%s failed and gets no more records; metrics.jsonl has them all: %s", name, error)
            self._has_failed = True


class TensorBoardSink:
    """Mirrors the records to TensorBoard's event files.

    Args:
        folder: Where the event files go.
        first_step: Earlier events from this step on are hidden, as `MetricsLog` drops its records.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        module = _optional("torch.utils.tensorboard", "SummaryWriter", extra="tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=first_step)

    def log(self, record: Mapping[str, JSON]) -> None:
        """Add each number of the record under its flattened name."""
        for name, value in flatten_record(record).items():
            self._writer.add_scalar(name, value, _step(record))

    def close(self) -> None:
        """Write pending events and close the files."""
        self._writer.close()


class WandbSink:
    """Mirrors the records to Weights & Biases.

    Args:
        project: The project's name there.
        folder: Where its local files go.
        configuration: Shown there beside the run.
        name: The run's name there.
        identity: Tells this run from all others there; the same one continues the same run after a resume.
    """

    def __init__(
        self, *, project: str, folder: Path, configuration: Mapping[str, JSON], name: str, identity: str
    ) -> None:
        module = _optional("wandb", "init", extra="wandb")
        self._run = module.init(
            project=project, dir=str(folder), config=dict(configuration), name=name, id=identity, resume="allow"
        )

    def log(self, record: Mapping[str, JSON]) -> None:
        """Send the numbers of the record under their flattened names."""
        self._run.log(flatten_record(record), step=_step(record))

    def close(self) -> None:
        """Wait until everything is sent, and end the run there."""
        self._run.finish()


def flatten_record(record: Mapping[str, JSON]) -> dict[str, int | float]:
    """The finite numbers of a nested record, named by their path, without the step.

    Example:
        >>> flatten_record({"step": 3, "students": {"mxd-k16": {"fvu": 0.25}}})
        {'students/mxd-k16/fvu': 0.25}
    """
    return {name: value for name, value in _numbers("", record) if name != "step"}


def _numbers(prefix: str, value: object) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, Mapping):
        for key, child in cast("Mapping[str, object]", value).items():
            yield from _numbers(f"{prefix}/{key}" if prefix else key, child)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield prefix, value


def _step(record: Mapping[str, JSON]) -> int:
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"A record must have a whole number under 'step'; got {step!r}.")
    return step


def _line(record: Mapping[str, JSON]) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """The value with null for each number that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(child) for key, child in cast("Mapping[str, object]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(child) for child in cast("Sequence[object]", value)]
    return value


def _optional(module: str, attribute: str, *, extra: str) -> ModuleType:
    """Import a module of an optional package."""
    missing = f"The {extra} log needs the package {extra}, which is not installed; run pip install 'mxd[{extra}]'."
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(missing) from error
    # A folder that happens to have the package's name (wandb makes one) imports as an empty module.
    if not hasattr(found, attribute):
        raise ValueError(missing)
    return found
