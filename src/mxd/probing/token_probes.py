"""Token level: which latent names a concept, and how well a few of them tell it.

A single latent says yes where it fires above a threshold. Its threshold is chosen on the training part; which latent
names a concept (and which concept a latent names) by F1 on the validation part; and how well it does so is measured on
the test part, whose documents were never looked at before.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mxd.evaluation.drawing import kind_of
from mxd.probing.collecting import Probed, Report, say_nothing
from mxd.probing.dense_units import best_units
from mxd.probing.examples import LEAST_IN_PART, Parts, SpanSet
from mxd.probing.fitting import Scale, fit_probe
from mxd.probing.results import KEPT_LATENTS, KS, NamedLatent, ProbeRow, SetResult, chance_row
from mxd.probing.statistics import Verdict, groups_with, judge
from mxd.probing.thresholds import SortedEntries, average_precisions, best_thresholds, count
from mxd.probing.token_codes import (
    TOKEN_IDENTITY,
    DenseTokens,
    LabelledTokens,
    TokenCodes,
    collect_tokens,
    have_enough,
)

LEAST_FIRINGS = 10
"""Training tokens on which a latent must fire to name anything."""
LEAST_SKILL = 0.05
"""Skill on the validation part below which a latent names nothing: it does little better than always to say yes."""
MOST_FITTED = 8_192
"""Training tokens that a logistic regression is fitted on: all of a concept, at most half of them, and others."""
SEED = 42


class TokenResult(NamedTuple):
    """What was found on one set of documents."""

    result: SetResult
    """How well concepts are told."""
    named: Mapping[str, list[NamedLatent]]
    """For each student, its latents that name a concept, in the order of their numbers."""


class _Choice(NamedTuple):
    """A probe of one concept, ready to be judged."""

    features: str
    k: int | None
    latents: Sequence[int]
    tokens: Int[np.ndarray, " test"]
    verdict: Verdict


def probe_tokens(probed: Probed, data: SpanSet, num_tokens: int, report: Report = say_nothing) -> TokenResult:
    """Find the latents that name the concepts of labelled documents, and how well they and dense layers tell them.

    Args:
        probed: The model and the layers.
        data: The documents.
        num_tokens: Tokens at most.
        report: Is told how far it is.

    Raises:
        ValueError: If there are too few documents, or no concept has enough tokens.
    """
    tokens = collect_tokens(probed, data, num_tokens, report)
    if not tokens.concepts:
        raise ValueError(
            f"A concept to probe for must have {LEAST_IN_PART} tokens in each of the parts for training, validation "
            f"and test; of {data.name} none has. Give more documents, or ask for more --tokens."
        )
    numbers = range(len(tokens.concepts))
    found: list[list[ProbeRow]] = [[] for _ in numbers]
    named: dict[str, list[NamedLatent]] = {}
    total = len(tokens.codes) + len(tokens.dense)
    for place, codes in enumerate(tokens.codes):
        best = _Best(codes, tokens)
        for number in numbers:
            worth = best.look(number)
            found[number] += _judged(tokens, number, list(_choose_among_latents(codes, tokens, number, worth)))
        if codes.name != TOKEN_IDENTITY:
            named[codes.name] = _named_latents(codes, tokens, best, data.name)
        report(f"Probing {data.name}", place + 1, total)
    for place, dense in enumerate(tokens.dense):
        for number, choice in _choose_among_units(dense, tokens):
            found[number] += _judged(tokens, number, choice)
        report(f"Probing {data.name}", len(tokens.codes) + place + 1, total)
    counts = tokens.labels.sum(axis=0)
    test = tokens.parts.test
    result = SetResult(
        data=data.name,
        examples={concept: int(count) for concept, count in zip(tokens.concepts, counts, strict=True)},
        total=len(tokens.labels),
        parts=[len(part) for part in tokens.parts],
        skipped=tokens.skipped,
        left_out={"duplicates": tokens.duplicates, "documents that could not be labelled": tokens.unlabelled},
        rows=[row for number in numbers for row in (*found[number], _chance(tokens, number))],
        documents=int(tokens.documents[-1]) + 1,
        test_groups={
            concept: groups_with(tokens.labels[test, number], tokens.groups[test])
            for number, concept in enumerate(tokens.concepts)
        },
    )
    return TokenResult(result, named)


class _Worth(NamedTuple):
    """How well every latent tells one concept."""

    thresholds: Float[np.ndarray, " num_latents"]
    """Chosen on the training part."""
    f1: Float[np.ndarray, " num_latents"]
    """On the validation part; 0 for a latent that fires too rarely to name anything."""


class _Best:
    """Which concept each latent tells best, of those looked at one after the other: nothing is kept for each pair."""

    def __init__(self, codes: TokenCodes, tokens: LabelledTokens) -> None:
        self._tokens = tokens
        self._train, self._validation = codes.entries(tokens.parts.train), codes.entries(tokens.parts.validation)
        self._fires = np.bincount(self._train.latents, minlength=codes.num_latents) >= LEAST_FIRINGS
        self.concepts = np.zeros(codes.num_latents, dtype=np.int64)
        self.skill = np.full(codes.num_latents, -np.inf)
        self.f1 = np.zeros(codes.num_latents, dtype=np.float32)
        self.thresholds = np.full(codes.num_latents, np.inf, dtype=np.float32)

    def look(self, number: int) -> _Worth:
        """Look at a concept, and return how well each latent tells it."""
        train, validation = self._tokens.parts[:2]
        labels = self._tokens.labels[validation]
        thresholds = best_thresholds(self._train, self._tokens.labels[train, number]).values.astype(np.float32)
        concept = np.full(len(thresholds), number)
        f1 = np.where(self._fires, count(self._validation, labels, concept, thresholds).f1, 0).astype(np.float32)
        # A frequent concept is told well by saying yes to everything, which names nothing.
        share = labels[:, number].mean()
        always = 2 * share / (1 + share)
        skill = (f1 - always) / (1 - always)
        better = skill > self.skill
        for kept, new in ((self.skill, skill), (self.f1, f1), (self.thresholds, thresholds), (self.concepts, concept)):
            kept[better] = new[better]
        return _Worth(thresholds, f1)


def _choose_among_latents(codes: TokenCodes, tokens: LabelledTokens, number: int, worth: _Worth) -> Iterator[_Choice]:
    order = np.argsort(-worth.f1, kind="stable")[: max(KS)]
    ranked = order[worth.f1[order] > 0]
    if not len(ranked):
        return
    test = tokens.parts.test
    scores = np.asarray(codes.values[:, [ranked[0]]].toarray()).ravel()[test]
    verdict = Verdict(tokens.labels[test, number], scores >= worth.thresholds[ranked[0]], scores)
    yield _Choice(codes.name, 1, [int(ranked[0])], test, verdict)
    columns = np.asarray(codes.values[:, ranked].toarray(), dtype=np.float64)
    for k in KS[1:]:
        verdict = _regress(columns[:, :k], tokens.parts, tokens.labels[:, number])
        yield _Choice(codes.name, k, ranked[:k].tolist(), test, verdict)


def _choose_among_units(dense: DenseTokens, tokens: LabelledTokens) -> Iterator[tuple[int, list[_Choice]]]:
    # The kept tokens are numbered anew, in each part.
    parts = Parts(*(np.flatnonzero(np.isin(dense.tokens, part, assume_unique=True)) for part in tokens.parts))
    labels = tokens.labels[dense.tokens]
    # Where not all tokens are kept, too few of a concept may be.
    numbers = np.flatnonzero(have_enough(labels, parts))
    test = dense.tokens[parts.test]
    for number, unit in zip(numbers.tolist(), best_units(dense.values, labels[:, numbers], parts), strict=True):
        positive = labels[:, number]
        scores = unit.sign * dense.values[parts.test, unit.number]
        verdict = Verdict(positive[parts.test], scores >= unit.threshold, scores)
        yield (
            number,
            [
                _Choice(dense.name, 1, [unit.number], test, verdict),
                _Choice(dense.name, None, [], test, _regress(dense.values, parts, positive)),
            ],
        )


def _regress(
    columns: Float[np.ndarray, "tokens width"],
    parts: Parts,
    positive: Bool[np.ndarray, " tokens"],
) -> Verdict:
    """Return what a balanced logistic regression says, with a threshold that is best for F1 on the validation part.

    Its own threshold makes both errors equally dear, which for a rare concept drowns what is found in false alarms.
    """
    train, validation, test = parts
    sample = _sample(train, positive[train])
    scale = Scale(columns[sample])
    probe = fit_probe(scale(columns[sample]), positive[sample])
    scores = probe.decision_function(scale(columns[validation]))
    # A single latent that fires everywhere, as thresholds are for values above 0. Its values are the scores' ranks: a
    # score that is shifted and shifted back is another number, and tokens that share it would change sides together.
    levels, ranks = np.unique(scores, return_inverse=True)
    everywhere = SortedEntries.of(
        np.zeros(len(scores), dtype=np.int64), ranks + 1.0, np.arange(len(scores)), len(scores), 1
    )
    threshold = levels[int(best_thresholds(everywhere, positive[validation]).values[0]) - 1]
    scores = probe.decision_function(scale(columns[test]))
    return Verdict(positive[test], scores >= threshold, scores)


def _sample(train: Int[np.ndarray, " part"], positive: Bool[np.ndarray, " part"]) -> Int[np.ndarray, " sample"]:
    random = np.random.default_rng(SEED)
    some = random.permutation(train[positive])[: MOST_FITTED // 2]
    others = random.permutation(train[~positive])[: MOST_FITTED - len(some)]
    return np.sort(np.concatenate([some, others]))


def _named_latents(codes: TokenCodes, tokens: LabelledTokens, best: _Best, data: str) -> list[NamedLatent]:
    test = codes.entries(tokens.parts.test)
    labels = tokens.labels[tokens.parts.test]
    counts = count(test, labels, best.concepts, best.thresholds)
    precisions = average_precisions(test, labels, best.concepts)
    rates = np.bincount(codes.values.indices, minlength=codes.num_latents) / len(tokens.labels)
    return [
        NamedLatent(
            latent=int(latent),
            data=data,
            concept=tokens.concepts[best.concepts[latent]],
            threshold=float(best.thresholds[latent]),
            f1_validation=float(best.f1[latent]),
            skill_validation=float(best.skill[latent]),
            f1=float(counts.f1[latent]),
            precision=float(counts.hits[latent] / max(counts.said[latent], 1)),
            recall=float(counts.hits[latent] / max(counts.positives[latent], 1)),
            average_precision=float(precisions[latent]),
            firing_rate=float(rates[latent]),
        )
        for latent in np.flatnonzero(best.skill >= LEAST_SKILL)
    ]


def _judged(tokens: LabelledTokens, number: int, choices: Sequence[_Choice]) -> list[ProbeRow]:
    """Return how good probes of one concept by the same features are; all calls draw the same documents."""
    if not choices:
        return []
    layer, _, name = choices[0].features.rpartition("/")
    together = tokens.groups[choices[0].tokens]
    return [
        ProbeRow(
            concept=tokens.concepts[number],
            features=choice.features,
            layer=int(layer) if layer else None,
            kind=kind_of(name),
            k=choice.k,
            latents=list(choice.latents)[:KEPT_LATENTS],
            quality=quality,
        )
        for choice, quality in zip(choices, judge([choice.verdict for choice in choices], together), strict=True)
    ]


def _chance(tokens: LabelledTokens, number: int) -> ProbeRow:
    test = tokens.parts.test
    return chance_row(tokens.labels[test, number], tokens.concepts[number], tokens.groups[test])
