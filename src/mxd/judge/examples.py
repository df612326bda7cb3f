"""Pieces of text in which a latent fires, and in which it does not."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mxd.data.tokenization import Tokenizer, token_pieces
from mxd.evaluation.firings import Firings

WINDOW = 32
"""Tokens of a piece."""
SHOWN, TESTED = 10, 10
"""Pieces that an explanation is made from, and as many of each sort that it is tested on; fewer where there are fewer,
but at least half."""
QUANTILES = 5
"""Both are taken evenly from these shares of a latent's pieces, ordered by its largest value in them: the top alone
would mislead."""
OPEN, CLOSE = "«", "»"


class Piece(NamedTuple):
    """A piece of one context."""

    context: int
    """The context."""
    start: int
    """Its first token there."""
    stop: int
    """The token behind its last."""
    fired: frozenset[int]
    """Positions in the context, within the piece, at which the latent fires."""
    value: float
    """The latent's largest value in the piece; 0 where it does not fire."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """What there is to explain a latent by, and to test the explanation on; no context is in both."""

    shown: Sequence[Piece]
    """Pieces in which it fires."""
    tested: Sequence[Piece]
    """Others in which it fires, from all strengths."""
    silent: Sequence[Piece]
    """Pieces in which it does not fire."""


def choose_examples(firings: Firings, contexts: Int[Tensor, "n context"], *, seed: int) -> Examples | None:
    """Return examples of one latent; None where it fires, or is silent, in too few contexts.

    Args:
        firings: Where this latent fires.
        contexts: The text.
        seed: Of every choice.
    """
    chance = random.Random(seed)
    length = contexts.shape[1]
    pieces = _pieces(firings, length)
    if len(pieces) < SHOWN // 2 + TESTED // 2:
        return None
    chance.shuffle(pieces)
    pieces.sort(key=lambda piece: piece.value)
    shown, rest = _spread(pieces, min(SHOWN, len(pieces) // 2), chance)
    tested, _ = _spread(rest, min(TESTED, len(rest)), chance)
    firing = set(firings.contexts.tolist())
    quiet = [context for context in range(len(contexts)) if context not in firing]
    silent = [_window(n, chance.randrange(length), length) for n in chance.sample(quiet, min(TESTED, len(quiet)))]
    if len(silent) < len(tested):
        # A latent that fires in nearly every context is silent in parts of some.
        parts = _silent_parts(firings, length, {piece.context for piece in (*shown, *tested)})
        chance.shuffle(parts)
        silent += parts
    silent = silent[: len(tested)]
    return Examples(shown=shown, tested=tested, silent=silent) if len(silent) >= TESTED // 2 else None


def marked(piece: Piece, marks: Collection[int], contexts: Int[Tensor, "n context"], tokenizer: Tokenizer) -> str:
    """Return a piece's text, with the tokens at these positions between « and »."""
    ids: list[int] = contexts[piece.context, piece.start : piece.stop].tolist()
    [pieces] = token_pieces(tokenizer, [ids])
    parts: list[tuple[bool, str]] = []
    begins_marked = False
    for position, text in enumerate(pieces, start=piece.start):
        is_marked = begins_marked or position in marks
        # A part of a character has no text of its own: its mark goes to the token that completes it.
        begins_marked = is_marked and not text
        if text:
            parts.append((is_marked, text.replace(OPEN, "‹").replace(CLOSE, "›")))
    runs = ((is_marked, "".join(text for _, text in run)) for is_marked, run in groupby(parts, key=itemgetter(0)))
    return "".join(f"{OPEN}{text}{CLOSE}" if is_marked else text for is_marked, text in runs)


def wrong_marks(piece: Piece, seed: int) -> frozenset[int]:
    """Return as many positions of a piece as the latent fires at, at none of which it does; fewer where it must be."""
    others = [position for position in range(piece.start, piece.stop) if position not in piece.fired]
    count = min(len(piece.fired), len(others))
    return frozenset(random.Random(f"{seed} {piece.context}").sample(others, count))


def _pieces(firings: Firings, context: int) -> list[Piece]:
    """Return a piece around the largest value in each context in which a latent fires."""
    numbers, values = firings.contexts.tolist(), firings.values.tolist()
    positions = firings.positions.tolist()
    best: dict[int, tuple[float, int]] = {}
    places: dict[int, set[int]] = {}
    for number, value, position in zip(numbers, values, positions, strict=True):
        places.setdefault(number, set()).add(position)
        if number not in best or value > best[number][0]:
            best[number] = (value, position)
    pieces: list[Piece] = []
    for number, (value, position) in best.items():
        window = _window(number, position, context)
        fired = frozenset(place for place in places[number] if window.start <= place < window.stop)
        pieces.append(window._replace(fired=fired, value=value))
    return pieces


def _window(number: int, position: int, context: int) -> Piece:
    start = max(0, min(position - WINDOW // 2, context - WINDOW))
    return Piece(number, start, min(start + WINDOW, context), frozenset(), 0.0)


def _silent_parts(firings: Firings, context: int, taken: Collection[int]) -> list[Piece]:
    fired: dict[int, list[int]] = {}
    for number, position in zip(firings.contexts.tolist(), firings.positions.tolist(), strict=True):
        fired.setdefault(number, []).append(position)
    parts: list[Piece] = []
    for number, positions in fired.items():
        ends = [-1, *positions, context]
        gap, start = max((after - before - 1, before + 1) for before, after in pairwise(ends))
        if gap >= WINDOW // 2 and number not in taken:
            parts.append(Piece(number, start, start + min(gap, WINDOW), frozenset(), 0.0))
    return parts


def _spread(pieces: Sequence[Piece], count: int, chance: random.Random) -> tuple[list[Piece], list[Piece]]:
    """Return `count` pieces, the same number from each share of those given in order, and the others in order."""
    groups = [list(part) for part in torch.arange(len(pieces)).tensor_split(min(QUANTILES, count))]
    places = [[int(place) for place in group] for group in groups]
    for group in places:
        chance.shuffle(group)
    order = [group[turn] for turn in range(len(pieces)) for group in places if turn < len(group)]
    chosen = set(order[:count])
    return [pieces[n] for n in sorted(chosen)], [piece for n, piece in enumerate(pieces) if n not in chosen]
