"""From a finished run and a text to the explorer's database."""

import itertools
import shutil
import sqlite3
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from mxd.atomic import JSON
from mxd.data.tokenization import token_pieces
from mxd.data.tokens import HeldOut, content_positions, held_out_contexts, packed_contexts, special_tokens
from mxd.evaluation.collect import LatentStatistics
from mxd.evaluation.curves import read_curves
from mxd.evaluation.grid import frontier_points
from mxd.evaluation.interactive import frontier_data
from mxd.evaluation.opening import is_own_text, load_run_model, open_run_text, read_finished_run
from mxd.evaluation.record import EVALUATION_FILE, read_record
from mxd.evaluation.students import TrainedStudent, load_students
from mxd.explorer.code_store import BYTES_AN_ENTRY, CodeStore
from mxd.explorer.database import (
    ContextRow,
    identify_run,
    new_database,
    write_contexts,
    write_facts,
    write_latents,
    write_student,
)
from mxd.explorer.directions import INPUTS_KEPT, LogitMap, TopInputs, logit_map
from mxd.explorer.profiles import TextTokens, latents_at_once, profile
from mxd.explorer.rows import BlockRows, directions_of, map_data, student_facts
from mxd.layers import SparseCode
from mxd.models import LanguageModel, device_of, mlp_pairs, vocabulary_size
from mxd.quantities import gib
from mxd.runs.metrics_log import read_metrics
from mxd.runs.progress import TrainingProgress
from mxd.runs.run import METRICS_FILE

CONTEXTS_KEPT = 8
"""Strongest contexts of each latent."""

TOKENS_AT_ONCE = 4096
_NORM_TOKENS = 1024
"""Tokens at which the final norm is linearised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectConfig:
    """What is collected."""

    text: tuple[str, ...] = ()
    """Text to read, the documents that training read too; the run's own held-out documents where it is empty, or the
    text that the run was trained on, wherever that is now."""
    tokens: int | None = None
    """Tokens at most; as many as `mxd evaluate` reads where None."""
    student: tuple[str, ...] = ()
    """Ids such as mxd-k32 or 8/mxd-k32; all where empty."""
    device: str | None = None
    """Where to run; where the run was trained if None."""
    model: str | None = None
    """Where the language model is now (a folder or hub id), if it is not where the run found it."""


def collect(run: Path, database: Path, config: CollectConfig, console: Console | None = None) -> None:
    """Run a text through a finished run's model and layers, and write what their latents do to a database.

    The model runs once. Codes go to files beside the database (16 bytes for each latent that fires on a token), which
    are removed at the end; in memory is what grows with the number of latents, and a batch.

    Args:
        run: The run's folder.
        database: The file; one of the same run is replaced, and its labels are kept.
        config: What to collect.
        console: Where progress is shown; stderr unless given.

    Raises:
        ValueError: If the run is not finished or has no such student, the text cannot be used, the database there is
            another run's or being collected elsewhere, or the disk is too small.
    """
    console = console if console is not None else Console(stderr=True)
    description = read_finished_run(run)
    # Before the layers are read: edits made in between then make the database one of other edits.
    identity = identify_run(run)
    students = load_students(run, description["students"], config.student)
    began = time.monotonic()
    with new_database(database, identity) as connection:
        language_model = load_run_model(run, description, config.device, config.model)
        held_out, name = _text(run, description, language_model, config)
        with _scratch(database) as folder:
            collection = _Collection(language_model, description, students, held_out, folder)
            collection.read(console)
            collection.write(connection, console)
        facts = _facts(run, language_model, students, held_out, name)
        facts["collected"] = {"text": list(config.text), "tokens": config.tokens, "student": list(config.student)}
        facts["seconds"] = round(time.monotonic() - began, 1)
        write_facts(connection, facts)


@contextmanager
def _scratch(database: Path) -> Generator[Path, None, None]:
    """Make a folder beside the database, and remove it at the end, and one that a killed process left at the start."""
    folder = database.with_name(f".{database.name}.codes")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Gatherer:
    """Gathers one student's codes."""

    def __init__(self, student: TrainedStudent, number: int, folder: Path, num_places: int) -> None:
        self.student, self.number = student, number
        self.network = student.candidate.network
        config = self.network.config
        self.statistics = LatentStatistics(config.num_latents, contexts_kept=CONTEXTS_KEPT)
        self.store = CodeStore(folder, f"{number}", num_places=num_places, num_latents=config.num_latents)
        self.inputs = TopInputs(folder / f"{number}.inputs", config.num_latents, config.d_in)

    def observe(self, x: Float[Tensor, "contexts context d_in"], content: Tensor, first_context: int) -> None:
        code = self.network.encode(x.flatten(0, 1)[content.flatten()].to(self.network.scorer.weight))
        contexts, positions = content.cpu().nonzero(as_tuple=True)
        code = SparseCode(code.values.float().cpu(), code.indices.cpu())
        self.statistics.update(code, contexts + first_context, positions)
        self.store.add(code, content.flatten(), first_context * content.shape[1])
        self.inputs.follow(self.statistics.top, x, first_context)


class _Collection:
    """One pass over a text, and what becomes of it."""

    def __init__(
        self,
        language_model: LanguageModel,
        description: dict[str, Any],
        students: Sequence[TrainedStudent],
        held_out: HeldOut,
        folder: Path,
    ) -> None:
        self._model = language_model.module
        self._tokenizer = language_model.tokenizer
        self._module_path: str | None = description["config"]["module"]
        self._contexts = held_out.contexts
        self._special = special_tokens(language_model.tokenizer)
        _require_room(folder, students, held_out.contexts.numel())
        self._gatherers = [
            _Gatherer(student, number, folder, held_out.contexts.numel()) for number, student in enumerate(students)
        ]
        for gatherer in self._gatherers:
            gatherer.network.to(device_of(self._model))

    @torch.no_grad()
    def read(self, console: Console) -> None:
        """Run the model over the text."""
        size = max(1, TOKENS_AT_ONCE // self._contexts.shape[1])
        layers = sorted({gatherer.student.candidate.layer for gatherer in self._gatherers})
        names = [gatherer.student.candidate.name for gatherer in self._gatherers]
        with TrainingProgress(self._contexts.numel(), names, "reading", console=console) as progress:
            for first in range(0, len(self._contexts), size):
                contexts = self._contexts[first : first + size].to(device_of(self._model))
                pairs = mlp_pairs(self._model, contexts, layers, module_path=self._module_path)
                content = content_positions(contexts, self._special)
                for gatherer in self._gatherers:
                    pair = pairs[gatherer.student.candidate.layer]
                    gatherer.observe(gatherer.network.given(*pair), content, first)
                done = (first + len(contexts)) * contexts.shape[1]
                progress.update(
                    done,
                    {
                        gatherer.student.candidate.name: {
                            "l0": gatherer.statistics.l0,
                            "dead_fraction": gatherer.statistics.dead_fraction,
                        }
                        for gatherer in self._gatherers
                    },
                )

    def write(self, connection: sqlite3.Connection, console: Console) -> None:
        """Write what was read."""
        text = self._tokens()
        self._write_text(connection, text)
        sample = self._contexts[: max(1, _NORM_TOKENS // self._contexts.shape[1])]
        logits = logit_map(self._model, sample.to(device_of(self._model)))
        for gatherer in self._gatherers:
            self._write_student(connection, gatherer, text, logits, console)

    def _tokens(self) -> TextTokens:
        content = content_positions(self._contexts, self._special)
        occurrences = torch.bincount(self._contexts[content], minlength=max(vocabulary_size(self._model), 1))
        return TextTokens(self._contexts.flatten().numpy(), self._contexts.shape[1], occurrences.numpy())

    def _write_text(self, connection: sqlite3.Connection, text: TextTokens) -> None:
        size = len(text.occurrences)
        spelt = token_pieces(
            self._tokenizer, itertools.chain(([token] for token in range(size)), _rows(self._contexts))
        )
        alone = [piece for [piece] in itertools.islice(spelt, size)]
        rows = zip(range(size), alone, text.occurrences.tolist(), strict=True)
        connection.executemany("INSERT INTO tokens VALUES (?, ?, ?)", rows)
        contexts = zip(_rows(self._contexts), spelt, strict=True)
        write_contexts(connection, (ContextRow.of(n, ids, pieces, alone) for n, (ids, pieces) in enumerate(contexts)))

    def _write_student(
        self, connection: sqlite3.Connection, gatherer: _Gatherer, text: TextTokens, logits: LogitMap, console: Console
    ) -> None:
        gatherer.store.finish()
        atoms = gatherer.inputs.mean_atoms(gatherer.network)
        directions = directions_of(atoms, logits)
        name = gatherer.student.candidate.name
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"writing {name}", total=len(atoms))
            for entries in gatherer.store.by_latent(latents_at_once(gatherer.network.config.k)):
                found = profile(entries, gatherer.store, text)
                rows = BlockRows(gatherer.number, entries, found, gatherer.statistics, directions, text)
                write_latents(connection, rows.latents(), rows.peaks(), rows.tokens())
                progress.advance(task, len(entries.starts) - 1)
        facts = student_facts(gatherer.student, gatherer.statistics)
        write_student(connection, gatherer.number, name, facts, map_data(connection, gatherer.number))


def _text(
    run: Path, description: dict[str, Any], language_model: LanguageModel, config: CollectConfig
) -> tuple[HeldOut, str]:
    """Return the text as contexts, and what to call it."""
    settings = description["config"]
    source = open_run_text(run, description, config.text)
    num_tokens = settings["eval_tokens"] if config.tokens is None else config.tokens
    sizes: dict[str, int] = {"context": settings["context"], "num_tokens": num_tokens}
    sizes["vocab_size"] = vocabulary_size(language_model.module)
    if is_own_text(description, source):
        return held_out_contexts(source, language_model.tokenizer, **sizes), f"{source.name}, held-out documents"
    documents = itertools.chain(source.documents(held_out=True), source.documents(held_out=False))
    return packed_contexts(documents, source.name, language_model.tokenizer, **sizes), f"{source.name}, all documents"


def _require_room(folder: Path, students: Sequence[TrainedStudent], tokens: int) -> None:
    configs = [student.candidate.network.config for student in students]
    needed = sum(BYTES_AN_ENTRY * tokens * config.k for config in configs)
    needed += sum(4 * INPUTS_KEPT * config.num_latents * config.d_in for config in configs)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"Collecting needs about {gib(needed)} beside the database for a while; {folder.parent} has "
            f"{gib(free)}. Ask for fewer --tokens or for some --student, or name a --database elsewhere."
        )


def _facts(
    run: Path, language_model: LanguageModel, students: Sequence[TrainedStudent], held_out: HeldOut, name: str
) -> dict[str, JSON]:
    evaluation = run / EVALUATION_FILE
    metrics = run / METRICS_FILE
    curves = read_curves(read_metrics(metrics)) if metrics.is_file() else []
    rows = read_record(evaluation).rows if evaluation.is_file() else []
    return {
        "model": language_model.id,
        "text": name,
        "num_tokens": held_out.contexts.numel(),
        "context": held_out.contexts.shape[1],
        "num_contexts": len(held_out.contexts),
        "tokens_trained": students[0].provenance.tokens_trained,
        "date": datetime.now(UTC).date().isoformat(),
        "version": version("mxd"),
        "frontier": frontier_data(frontier_points(rows)) if rows else None,
        "curves": [curve._asdict() for curve in curves],
    }


def _rows(contexts: Int[Tensor, "n context"]) -> Iterator[list[int]]:
    for part in contexts.split(1024):
        yield from part.tolist()
