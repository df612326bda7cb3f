"""What is known of latents, as rows of the database."""

import base64
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt16
from torch import Tensor

from mxd.atomic import JSON
from mxd.evaluation.collect import LatentStatistics
from mxd.evaluation.students import TrainedStudent
from mxd.explorer.code_store import Entries
from mxd.explorer.database import LatentRow, Peak, TokenLatent
from mxd.explorer.directions import LogitMap, Neighbours, Promoted, nearest
from mxd.explorer.profiles import LISTED, Firings, Profiles, Ranked, TextTokens

TOKENS_BEFORE, TOKENS_AFTER = 28, 14
"""Tokens of a context that are shown around the one on which the latent fires most."""

TOP = "top"
"""Group of the strongest contexts; the others are quarters, 0 the lowest."""

MISSING = 65535
"""Stands for no number in `map_data`."""


class Written(NamedTuple):
    """What a latent writes; nothing where it never fires."""

    nearest: list[tuple[int, float]]
    """The latents whose mean atoms point the same way, with the cosines."""
    promoted: list[tuple[int, float]]
    """The tokens whose logits it raises most, and by how much."""
    suppressed: list[tuple[int, float]]
    """The tokens whose logits it lowers most, and by how much."""


class Directions(NamedTuple):
    """What the latents of a layer write. Only those that fire have rows."""

    latents: Int[Tensor, " rows"]
    """The latent of each row, in ascending order."""
    neighbours: Neighbours
    """Which rows write alike."""
    promoted: Promoted
    """Tokens they promote."""
    suppressed: Promoted
    """Tokens they suppress."""

    def of(self, first: int, last: int) -> list[Written]:
        """Return what the latents from `first` to below `last` write."""
        begin, end = torch.searchsorted(self.latents, torch.tensor([first, last])).tolist()
        others = self.latents[self.neighbours.latents[begin:end]]
        columns = zip(
            _pairs(others, self.neighbours.cosines[begin:end]),
            *(_pairs(side.tokens[begin:end], side.effects[begin:end]) for side in (self.promoted, self.suppressed)),
            strict=True,
        )
        found = {
            latent: Written(*lists) for latent, lists in zip(self.latents[begin:end].tolist(), columns, strict=True)
        }
        return [found.get(latent, Written([], [], [])) for latent in range(first, last)]


def directions_of(atoms: Float[Tensor, "num_latents d_out"], logits: LogitMap) -> Directions:
    """Return what latents with these mean atoms write; an atom is 0 where its latent never fires."""
    # On a short text most latents of a wide layer are silent, and each would be compared with each.
    latents = atoms.any(1).nonzero().squeeze(1)
    written = atoms[latents]
    blocks = list(logits.extremes(written, LISTED))
    promoted, suppressed = (
        Promoted(*(torch.cat(column) for column in zip(*side, strict=True))) for side in zip(*blocks, strict=True)
    )
    return Directions(latents, nearest(written, LISTED), promoted, suppressed)


def _pairs(numbers: Int[Tensor, "rows listed"], values: Float[Tensor, "rows listed"]) -> list[list[tuple[int, float]]]:
    rows = zip(numbers.tolist(), values.tolist(), strict=True)
    return [list(zip(row, _shortened(strengths), strict=True)) for row, strengths in rows]


class _Example(NamedTuple):
    owner: int
    place: int
    value: float
    group: str | int


class BlockRows:
    """The rows of a block of neighbouring latents."""

    def __init__(
        self,
        student: int,
        entries: Entries,
        profiles: Profiles,
        statistics: LatentStatistics,
        directions: Directions,
        text: TextTokens,
    ) -> None:
        self._student, self._entries, self._profiles = student, entries, profiles
        self._statistics, self._text = statistics, text
        self._size = len(entries.starts) - 1
        self._written = directions.of(entries.first, entries.first + self._size)
        self._examples = list(self._chosen_examples())
        self._windows = [self._window(example.place) for example in self._examples]
        self._cells = self._values_around()
        self._values = _shortened([example.value for example in self._examples])

    def latents(self) -> Iterator[LatentRow]:
        """Yield a row for each latent."""
        profiles, statistics = self._profiles, self._statistics
        examples = _grouped(self._size, [example.owner for example in self._examples])
        fires_on, company = (_lists(self._size, ranked) for ranked in (profiles.tokens, profiles.company))
        counts = self._entries.counts.tolist()
        here = slice(self._entries.first, self._entries.first + self._size)
        means = _shortened((statistics.sums[here] / statistics.firings[here].clamp_min(1)).tolist())
        maxima = _shortened(statistics.maxima[here].tolist())
        quantiles = list(map(_shortened, profiles.quantiles.tolist()))
        for owner in range(self._size):
            latent = self._entries.first + owner
            firings, written = counts[owner], self._written[owner]
            yield LatentRow(
                student=self._student,
                latent=latent,
                firings=firings,
                rate=firings / max(statistics.num_tokens, 1),
                mean=means[owner],
                maximum=maxima[owner],
                p99=quantiles[owner][-1],
                specialisation=_number(float(profiles.specialisation[owner])),
                distinctness=_short(1 - written.nearest[0][1]) if written.nearest else None,
                quantiles=quantiles[owner],
                histogram=profiles.histograms[owner].tolist(),
                positions=profiles.positions[owner].tolist(),
                examples=[self._shown(place) for place in examples[owner]],
                fires_on=fires_on[owner],
                promoted=written.promoted,
                suppressed=written.suppressed,
                nearest=written.nearest,
                company=company[owner],
            )

    def peaks(self) -> Iterator[Peak]:
        """Yield the strongest activations of each latent."""
        for example in self._examples:
            if example.group == TOP:
                context, position = divmod(example.place, self._text.context)
                yield Peak(self._student, context, self._entries.first + example.owner, position, example.value)

    def tokens(self) -> Iterator[TokenLatent]:
        """Yield the tokens by which each latent is found."""
        ranked = self._profiles.tokens
        shares = _shortened((ranked.counts / np.maximum(self._entries.counts, 1)[ranked.owners]).tolist())
        latents = (ranked.owners + self._entries.first).tolist()
        for token, latent, share in zip(ranked.items.tolist(), latents, shares, strict=True):
            yield TokenLatent(self._student, token, "fires on", latent, share)
        for latent, written in enumerate(self._written, start=self._entries.first):
            for token, effect in written.promoted:
                yield TokenLatent(self._student, token, "promotes", latent, effect)

    def _chosen_examples(self) -> Iterator[_Example]:
        quarters = _grouped(self._size, self._profiles.quarters.owners.tolist())
        firings = self._profiles.quarters
        for owner in range(self._size):
            top = self._statistics.top_contexts(self._entries.first + owner)
            for value, context, position in top:
                yield _Example(owner=owner, place=context * self._text.context + position, value=value, group=TOP)
            seen = {context for _, context, _ in top}
            yield from self._quarter_examples(firings, quarters[owner], seen)

    def _quarter_examples(self, firings: Firings, chosen: Sequence[int], seen: set[int]) -> Iterator[_Example]:
        for number in chosen:
            place = int(firings.places[number])
            if place // self._text.context not in seen:
                yield _Example(
                    owner=int(firings.owners[number]),
                    place=place,
                    value=float(firings.values[number]),
                    group=int(firings.quarters[number]),
                )

    def _values_around(self) -> list[list[tuple[int, float]]]:
        """Return, for each example, where in its window the latent fires and how strongly."""
        size = len(self._text.ids)
        keys = self._entries.owners * size + self._entries.places
        owners = np.array([example.owner for example in self._examples], dtype=np.int64) * size
        first, last = (
            np.searchsorted(keys, owners + np.array(ends, dtype=np.int64)) for ends in _columns(self._windows)
        )
        places, values = self._entries.places, self._entries.values
        return [
            list(zip((places[low:high] - start).tolist(), _shortened(values[low:high].tolist()), strict=True))
            for (start, _), low, high in zip(self._windows, first.tolist(), last.tolist(), strict=True)
        ]

    def _window(self, place: int) -> tuple[int, int]:
        begin = place - place % self._text.context
        return max(place - TOKENS_BEFORE, begin), min(place + TOKENS_AFTER + 1, begin + self._text.context)

    def _shown(self, number: int) -> JSON:
        example = self._examples[number]
        start, stop = self._windows[number]
        context, first = divmod(start, self._text.context)
        return {
            "group": example.group,
            "context": context,
            "first": first,
            "length": stop - start,
            "peak": example.place - start,
            "value": self._values[number],
            "cells": self._cells[number],
        }


def student_facts(student: TrainedStudent, statistics: LatentStatistics) -> JSON:
    """Return what the pages say of a student."""
    network = student.candidate.network
    return {
        "id": student.id,
        "layer": student.candidate.layer,
        "kind": network.kind,
        "k": network.config.k,
        "num_latents": network.config.num_latents,
        "parameters": network.config.num_parameters,
        "num_tokens": statistics.num_tokens,
        "l0": _short(statistics.l0),
        "dead_fraction": _short(statistics.dead_fraction),
    }


def map_data(connection: sqlite3.Connection, student: int) -> JSON:
    """Return what the map needs of all latents of a student.

    Numbers are little-endian and in base64: `rate` as float32; `specialisation` and `distinctness` as uint16, 65,534
    for 1 and more and 65,535 for none; `token`, the one each latent fires on most, as int32, −1 for none.
    """
    found: list[tuple[Any, ...]] = connection.execute(
        "SELECT rate, specialisation, distinctness, json_extract(fires_on, '$[0][0]') FROM latents WHERE student = ? "
        "ORDER BY latent",
        (student,),
    ).fetchall()
    rates, specialisations, distinctness, tokens = ([row[column] for row in found] for column in range(4))
    names = sorted({token for token in tokens if token is not None})
    texts = dict(connection.execute("SELECT id, text FROM tokens").fetchall())
    return {
        "rate": _base64(np.array(rates, dtype="<f4")),
        "specialisation": _base64(_sixteen_bits(specialisations)),
        "distinctness": _base64(_sixteen_bits(distinctness)),
        "token": _base64(np.array([-1 if token is None else token for token in tokens], dtype="<i4")),
        "texts": {str(token): texts[token] for token in names},
    }


def _sixteen_bits(values: Sequence[float | None]) -> UInt16[np.ndarray, " n"]:
    return np.array(
        [MISSING if v is None else round(min(max(v, 0.0), 1.0) * (MISSING - 1)) for v in values], dtype="<u2"
    )


def _base64(array: Shaped[np.ndarray, " n"]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _columns(pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [first for first, _ in pairs], [last for _, last in pairs]


def _grouped(size: int, owners: Sequence[int]) -> list[list[int]]:
    """Return which elements belong to each owner, in their order."""
    groups: list[list[int]] = [[] for _ in range(size)]
    for number, owner in enumerate(owners):
        groups[owner].append(number)
    return groups


def _lists(size: int, ranked: Ranked) -> list[list[tuple[int, float, float]]]:
    """Return the things of each owner, with how often and what they are ranked by."""
    counts, scores = (_shortened(column.tolist()) for column in (ranked.counts, ranked.scores))
    lists: list[list[tuple[int, float, float]]] = [[] for _ in range(size)]
    for owner, item, count, score in zip(ranked.owners.tolist(), ranked.items.tolist(), counts, scores, strict=True):
        lists[owner].append((item, count, score))
    return lists


def _shortened(values: Sequence[float]) -> list[float]:
    """Return numbers to four digits: more would be noise, and fill the database."""
    return [float(f"{value:.4g}") for value in values]


def _short(value: float) -> float:
    return _shortened((value,))[0]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else _short(value)
