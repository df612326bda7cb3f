"""The run's model, for what the pages compute while one looks at them: experts on a text, and steered continuations."""

import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.atomic import JSON
from mxd.checkpoint import edits_digest
from mxd.data.tokenization import begun_context, bos_token, eos_token, token_pieces
from mxd.data.tokens import special_tokens
from mxd.edits import CodeEditor, Edit
from mxd.evaluation.faithfulness import Variant
from mxd.evaluation.opening import load_run_model, read_finished_run
from mxd.evaluation.students import TrainedStudent, load_students
from mxd.layers import SparseCode, SparseLayer
from mxd.metrics import widest_dtype
from mxd.models import LanguageModel, device_of, mlp_pairs, most_positions
from mxd.steering import steer
from mxd.steering.sampling import NEUTRAL

MOST_NEW_TOKENS = 256
MOST_TOKENS = 8192
"""Tokens of a text and what is written on it, where the model could take more."""
MOST_PARTS = 2**20
"""Experts active on a text, counted on each token; a layer may have thousands on a token."""

_ROWS_AT_ONCE = 64
"""Tokens whose codes are in memory at a time."""
_NUMBERS_AT_ONCE = 2**23
"""Numbers of atoms in memory at a time."""

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """What one expert adds to the output on one token."""

    latent: int
    """The expert."""
    value: float
    """Its value."""
    share: float
    """Share of the output that it accounts for."""


class SteeringRequest(NamedTuple):
    """What to write, and how to steer it."""

    student: str
    """Which layer stands in for its MLP, as `<layer>/<id>`."""
    prompt: str
    """What the model writes on."""
    edits: Sequence[Edit]
    """What happens to the code."""
    beside: Literal["original", "replaced"]
    """What the steered model is compared with: the original model, or the replaced one without edits."""
    new_tokens: int
    """Tokens to write."""
    temperature: float
    """0 takes the likeliest token each time."""
    seed: int
    """Of the sampling, the same for both."""


@torch.no_grad()
def shares(layer: SparseLayer, x: Float[Tensor, "tokens d_in"]) -> tuple[list[list[Part]], list[float]]:
    r"""Return for each token what each active expert accounts for of the layer's output, and what the base does.

    The output is affine in the code, so it is a sum, $y = \mathrm{base} + \sum_j v_j a_j$, and each term has a share:

    $$\frac{\langle \mathrm{base}, y\rangle}{\|y\|^2} + \sum_j \frac{\langle v_j a_j, y\rangle}{\|y\|^2} = 1$$

    A share is negative where a term points away from the sum. However wide the code is, as many atoms are in memory at
    a time as `_NUMBERS_AT_ONCE` says.

    Returns:
        The experts of each token, the largest share first, and the share of the base of each token.

    Raises:
        ValueError: If more than `MOST_PARTS` experts are active, counted on each token.
    """
    parts: list[list[Part]] = []
    bases: list[float] = []
    active = 0
    for rows in x.split(_ROWS_AT_ONCE):
        code = layer.encode(rows)
        active += int((code.values != 0).sum())
        if active > MOST_PARTS:
            raise ValueError(
                f"The experts active on a text must be {MOST_PARTS} at most, counted on each token; they are more. "
                "Shorten the text."
            )
        widest = widest_dtype(rows.device)
        y, base = layer.decode(rows, code).to(widest), layer.base(rows).to(widest)
        energy = y.square().sum(-1).clamp_min(torch.finfo(widest).tiny)
        each = _towards(layer, rows, code, y) / energy[:, None]
        bases += ((base * y).sum(-1) / energy).tolist()
        for row in zip(code.indices.tolist(), code.values.tolist(), each.tolist(), strict=True):
            found = [Part(*part) for part in zip(*row, strict=True) if part[1] != 0]
            parts.append(sorted(found, key=lambda part: -part.share))
    return parts, bases


def _towards(
    layer: SparseLayer, x: Float[Tensor, "tokens d_in"], code: SparseCode, y: Float[Tensor, "tokens d_out"]
) -> Float[Tensor, "tokens width"]:
    """Return the inner product of each term of the output with the output."""
    width, d_out = code.indices.shape[1], y.shape[1]
    rows_at_once = min(max(_NUMBERS_AT_ONCE // max(width * d_out, 1), 1), len(x))
    columns_at_once = max(_NUMBERS_AT_ONCE // (rows_at_once * d_out), 1)
    found = torch.empty(code.values.shape, dtype=y.dtype, device=y.device)
    for first in range(0, len(x), rows_at_once):
        rows = slice(first, first + rows_at_once)
        for start in range(0, width, columns_at_once):
            columns = slice(start, start + columns_at_once)
            atoms = layer.atoms(x[rows], code.indices[rows, columns])
            along = torch.einsum("nkd,nd->nk", atoms.to(y.dtype), y[rows])
            found[rows, columns] = along * code.values[rows, columns].to(y.dtype)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    language_model: LanguageModel
    students: Mapping[str, TrainedStudent]
    module_path: str | None
    passthrough: bool


class LiveModel:
    """A run's model, loaded when it is first needed, for one request at a time.

    Args:
        run: The run's folder.
        students: Which of its students to load, as `<layer>/<id>`.
        device: Where to run; where the run was trained if None.
        model: Where the language model is now; where the run found it if None.
    """

    def __init__(self, run: Path, students: Sequence[str], device: str | None = None, model: str | None = None) -> None:
        self._run, self._students, self._device, self._model = run, tuple(students), device, model
        self._edits = edits_digest(run)
        self._loaded: _Loaded | None = None
        self._lock = threading.Lock()

    def attribute(self, student: str, text: str) -> dict[str, JSON]:
        """Return token by token which experts fire on a text and how much of the output each accounts for.

        Raises:
            ValueError: If the text is empty or too long, there is no such student, or the run's layers have been
                edited since this was made.
        """
        with self._lock:
            loaded = self._load()
            ids = self._encode(loaded, text)
            chosen = _chosen(loaded, student)
            layer = chosen.candidate.layer
            model = loaded.language_model.module
            contexts = torch.tensor([ids], device=device_of(model))
            pair = mlp_pairs(model, contexts, [layer], module_path=loaded.module_path)[layer]
            network = chosen.candidate.network
            x = network.given(*pair)
            parts, bases = shares(network, x[0].to(network.scorer.weight))
        tokenizer = loaded.language_model.tokenizer
        special = special_tokens(tokenizer)
        [pieces] = token_pieces(tokenizer, [ids])
        return {
            "student": student,
            "tokens": [
                {
                    "text": piece,
                    "special": token in special,
                    "base": round(base, 4),
                    "experts": [[part.latent, round(part.value, 4), round(part.share, 4)] for part in row],
                }
                for token, piece, base, row in zip(ids, pieces, bases, parts, strict=True)
            ],
        }

    def continuations(self, request: SteeringRequest, stop: threading.Event) -> Iterator[dict[str, JSON]]:
        """Return the pieces of the two continuations as they are written, the one beside first.

        Args:
            request: What to write.
            stop: Ends the writing when it is set; set it too when nobody reads on.

        Raises:
            ValueError: As `attribute`; if an edit does not fit the layer. It is raised before anything is written.
        """
        with self._lock:
            loaded = self._load()
            ids = self._encode(loaded, request.prompt, request.new_tokens)
            chosen = _chosen(loaded, request.student)
            CodeEditor(request.edits, chosen.candidate.network.config.num_latents)
            beside: Variant = nullcontext if request.beside == "original" else self._steered(loaded, chosen, ())
            sides: dict[str, Variant] = {"beside": beside, "steered": self._steered(loaded, chosen, request.edits)}
        written: queue.SimpleQueue[dict[str, JSON] | None] = queue.SimpleQueue()
        # A thread of its own, so that the lock is given back whatever becomes of the reader.
        worker = threading.Thread(target=self._write, args=(loaded, ids, sides, request, stop, written), daemon=True)
        worker.start()
        return iter(written.get, None)

    def _write(
        self,
        loaded: _Loaded,
        ids: list[int],
        sides: Mapping[str, Variant],
        request: SteeringRequest,
        stop: threading.Event,
        written: "queue.SimpleQueue[dict[str, JSON] | None]",
    ) -> None:
        try:
            with self._lock:
                for side, variant in sides.items():
                    written.put({"side": side, "begins": True})
                    with variant():
                        pieces = _Pieces(loaded, side, stop, written)
                        pieces.follow(ids, request.prompt)
                        _generate(loaded.language_model, ids, request, pieces)
                    written.put({"side": side, "ends": True})
        except _StoppedError:
            pass
        # Whatever it is, the reader must learn that what it has is not the whole.
        except Exception as error:
            logger.exception("A continuation broke off.")
            written.put({"error": " ".join(str(error).split()) or f"The writing broke off ({type(error).__name__})."})
        finally:
            written.put(None)

    def _steered(self, loaded: _Loaded, chosen: TrainedStudent, edits: Sequence[Edit]) -> "Variant":
        model, candidate = loaded.language_model.module, chosen.candidate
        kept = special_tokens(loaded.language_model.tokenizer) if loaded.passthrough else ()
        return lambda: steer(
            model,
            {candidate.layer: candidate.network},
            {candidate.layer: list(edits)},
            passthrough=kept,
            module_path=loaded.module_path,
        )

    def _load(self) -> _Loaded:
        if self._loaded is None:
            if edits_digest(self._run) != self._edits:
                raise ValueError(
                    f"The layers of {self._run} must be as they were collected; they have been edited since. Stop the "
                    "server and start it with --recollect."
                )
            description = read_finished_run(self._run)
            language_model = load_run_model(self._run, description, self._device, self._model)
            device = language_model.device
            students = load_students(self._run, description["students"], self._students)
            for student in students:
                student.candidate.network.to(device)
            self._loaded = _Loaded(
                language_model=language_model,
                students={student.candidate.name: student for student in students},
                module_path=description["config"]["module"],
                passthrough=description["config"]["special_positions"] == "passthrough",
            )
        return self._loaded

    def _encode(self, loaded: _Loaded, text: str, new_tokens: int = 0) -> list[int]:
        tokenizer = loaded.language_model.tokenizer
        ids = begun_context(tokenizer, text)
        if len(ids) == int(bos_token(tokenizer) is not None):
            raise ValueError("The text must have at least one token; it has none. Type something.")
        own = most_positions(loaded.language_model.model)
        longest = MOST_TOKENS if own is None else min(own, MOST_TOKENS)
        if len(ids) + new_tokens > longest:
            more = f" and {new_tokens} to be written" if new_tokens else ""
            limit = "the model's context of" if longest == own else "in"
            raise ValueError(f"The text must fit {limit} {longest} tokens; it has {len(ids)}{more}. Shorten it.")
        return ids


class _StoppedError(Exception):
    """Ends a generation that nobody waits for."""


class _Pieces:
    """Takes tokens from `generate` and passes on the text that they add, whole characters only."""

    def __init__(
        self, loaded: _Loaded, side: str, stop: threading.Event, written: "queue.SimpleQueue[dict[str, JSON] | None]"
    ) -> None:
        self._tokenizer, self._side, self._stop, self._written = loaded.language_model.tokenizer, side, stop, written
        self._ids: list[int] = []
        self._prompt_is_past = False

    def follow(self, ids: Sequence[int], prompt: str) -> None:
        """Pass on the space behind a prompt, where its last token has one that was not typed."""
        [[piece]] = token_pieces(self._tokenizer, [ids[-1:]])
        if piece.endswith(" ") and not prompt[-1:].isspace():
            self._written.put({"side": self._side, "text": " "})

    def put(self, value: Tensor) -> None:
        """Take tokens; the first ones are the prompt."""
        if self._stop.is_set():
            raise _StoppedError
        if not self._prompt_is_past:
            self._prompt_is_past = True
            return
        self._ids += value.flatten().tolist()
        self._pass_on(whole=False)

    def end(self) -> None:
        """Pass on what is left."""
        self._pass_on(whole=True)

    def _pass_on(self, *, whole: bool) -> None:
        [pieces] = token_pieces(self._tokenizer, [self._ids])
        text = "".join(pieces)
        # A character whose bytes are not all there yet decodes to the replacement character.
        if text and (whole or not text.endswith("\ufffd")):
            self._written.put({"side": self._side, "text": text})
            self._ids = []


def _generate(language_model: LanguageModel, ids: list[int], request: SteeringRequest, pieces: _Pieces) -> None:
    model = cast("Any", language_model.model)
    prompt = torch.tensor([ids], device=device_of(model))
    sampling: dict[str, Any] = {**NEUTRAL, "do_sample": request.temperature > 0}
    if request.temperature > 0:
        sampling["temperature"] = request.temperature
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(request.seed)
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.new_tokens,
            pad_token_id=eos_token(language_model.tokenizer),
            streamer=pieces,
            **sampling,
        )


def _chosen(loaded: _Loaded, student: str) -> TrainedStudent:
    if student not in loaded.students:
        raise ValueError(f"The run has no student {student}; its students are {', '.join(loaded.students)}.")
    return loaded.students[student]
