"""Sample level: can the class of a text be told by a few latents' mean values?

The protocol of SAEBench (Karvonen et al., 2025) and of the MxD paper's code, with its flaw mended: there, the latent is
chosen by its score on the test part.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split

from mxd.probing.collecting import Probed, Report, say_nothing
from mxd.probing.examples import LEAST_IN_PART, PART_SHARES, Parts, Skipped, TextSet, least_per_class
from mxd.probing.features import Features, collect_text_features
from mxd.probing.fitting import Scale, fit_probe
from mxd.probing.results import KEPT_LATENTS, KS, ProbeRow, SetResult, chance_row
from mxd.probing.statistics import Verdict, groups_with, judge

CANDIDATES = 100
"""Features of which each is tried by itself."""
SEED = 42
NO_YES: Any = 0.0
"""F1 where nothing is said to be of the class."""


class _Fitted(NamedTuple):
    k: int | None
    latents: Sequence[int]
    verdict: Verdict


def probe_texts(probed: Probed, texts: TextSet, report: Report = say_nothing) -> SetResult:
    """Probe every student and every layer's dense features for the classes of a set of texts, one against the rest.

    Args:
        probed: The model and the layers.
        texts: The texts.
        report: Is told how far it is.

    Raises:
        ValueError: If fewer than two classes are left when texts that are too short are gone and the rest is split.
    """
    collected = collect_text_features(probed, texts, report)
    labels = np.array(collected.labels)
    counts = Counter(collected.labels)
    enough = [label for label in texts.labels if counts[label] >= least_per_class()]
    # With fewer than two there is nothing to split, and nothing is said of what is in no part.
    parts = split(labels, np.flatnonzero(np.isin(labels, enough)), collected.groups) if len(enough) > 1 else None
    classes = [] if parts is None else [label for label in enough if _in_all(labels == label, parts)]
    if parts is None or len(classes) < 2:
        raise ValueError(
            f"Texts to probe with must be of two classes with {least_per_class()} texts of five tokens each, and "
            f"{LEAST_IN_PART} in each part where groups of texts stay together; of {texts.name} there remain "
            f"{classes}. Give more or longer texts."
        )
    parts = Parts(*(part[np.isin(labels[part], classes)] for part in parts))
    judged_together = collected.groups[parts.test]
    rows: list[ProbeRow] = []
    total = len(classes) * len(collected.features)
    for number, label in enumerate(classes):
        for place, features in enumerate(collected.features):
            rows += _probe(features, labels == label, label, parts, judged_together)
            report(f"Probing {texts.name}", number * len(collected.features) + place + 1, total)
        rows.append(chance_row(labels[parts.test] == label, label, judged_together))
    return SetResult(
        data=texts.name,
        examples={label: counts[label] for label in classes},
        total=sum(map(len, parts)),
        parts=[len(part) for part in parts],
        skipped=[
            *texts.skipped,
            *(Skipped(label, counts[label], least_per_class()) for label in texts.labels if label not in classes),
        ],
        left_out={
            "duplicates": texts.duplicates + collected.duplicates,
            "too short": collected.too_short,
            "rows without text": texts.blank,
        },
        rows=rows,
        test_groups={label: groups_with(labels[parts.test] == label, judged_together) for label in classes},
    )


def split(
    labels: np.ndarray,
    kept: Int[np.ndarray, " kept"],
    groups: Int[np.ndarray, " examples"] | None = None,
    seed: int = SEED,
) -> Parts:
    """Return three parts of some examples, 60, 20 and 20 %, in each of which every class has about its share.

    All examples of a group are in one part. Where each is a group by itself the shares are exact.

    Args:
        labels: The class of each example.
        kept: The examples to be parted.
        groups: The group of each example; each by itself where None.
        seed: Seed of the parting.
    """
    if groups is not None and len(np.unique(groups[kept])) < len(kept):
        return _split_groups(labels, kept, groups, seed)
    _, validation, test = PART_SHARES
    train, rest = train_test_split(kept, test_size=validation + test, stratify=labels[kept], random_state=seed)
    second, third = train_test_split(
        rest, test_size=test / (validation + test), stratify=labels[rest], random_state=seed
    )
    return Parts(*map(np.asarray, (train, second, third)))


def _split_groups(
    labels: np.ndarray, kept: Int[np.ndarray, " kept"], groups: Int[np.ndarray, " examples"], seed: int
) -> Parts:
    random = np.random.default_rng(seed)
    _, own_class = np.unique(labels[kept], return_inverse=True)
    _, own_group = np.unique(groups[kept], return_inverse=True)
    counts = np.zeros((own_group.max() + 1, own_class.max() + 1))
    np.add.at(counts, (own_group, own_class), 1)
    # Shares of classes and not texts, so that a rare class weighs as much; large groups first, as they are hard to
    # place.
    shares = counts / counts.sum(axis=0)
    order = random.permutation(len(counts))
    order = order[np.argsort(-counts.sum(axis=1)[order], kind="stable")]
    lacking = np.outer(PART_SHARES, np.ones(counts.shape[1]))
    part_of = np.empty(len(counts), dtype=np.int64)
    for group in order:
        part_of[group] = np.argmax(lacking @ shares[group])
        lacking[part_of[group]] -= shares[group]
    return Parts(*(kept[part_of[own_group] == part] for part in range(len(PART_SHARES))))


def _in_all(positive: Bool[np.ndarray, " examples"], parts: Parts) -> bool:
    return all(positive[part].sum() >= LEAST_IN_PART for part in parts)


def _probe(
    features: Features,
    positive: Bool[np.ndarray, " examples"],
    label: str,
    parts: Parts,
    groups: Int[np.ndarray, " test"],
) -> list[ProbeRow]:
    fitted = list(_fit(features, positive, parts))
    return [
        ProbeRow(
            concept=label,
            features=features.name,
            layer=features.layer,
            kind=features.kind,
            k=probe.k,
            latents=probe.latents[:KEPT_LATENTS],
            quality=quality,
        )
        for probe, quality in zip(fitted, judge([probe.verdict for probe in fitted], groups), strict=True)
    ]


def _fit(features: Features, positive: Bool[np.ndarray, " examples"], parts: Parts) -> Iterator[_Fitted]:
    ranked = ranked_features(features, positive, parts)
    for k in KS if ranked else ():
        yield _fit_on(features, ranked[:k], positive, parts, k)
    if not features.is_code:
        yield _fit_on(features, list(range(features.width)), positive, parts, None)


def ranked_features(features: Features, positive: Bool[np.ndarray, " examples"], parts: Parts) -> list[int]:
    """Return the hundred features whose class means differ most on the training part, the best on validation first.

    Of sparse codes the mean must be larger within the class; for dense features, which have no sign of their own,
    either way counts. A feature's own worth is the F1 on the validation part of a probe that sees it alone.
    """
    difference = features.difference(positive[parts.train], parts.train)
    if not features.is_code:
        difference = np.abs(difference)
    order = np.argsort(-difference, kind="stable")[:CANDIDATES]
    candidates = order[difference[order] > 0]
    columns = features.columns(candidates.tolist())
    scaled = Scale(columns[parts.train])(columns)
    worth: list[float] = []
    for place in range(len(candidates)):
        alone = scaled[:, [place]]
        probe = fit_probe(alone[parts.train], positive[parts.train])
        said = probe.predict(alone[parts.validation])
        worth.append(float(f1_score(positive[parts.validation], said, zero_division=NO_YES)))
    return candidates[np.argsort(-np.array(worth), kind="stable")].tolist()


def _fit_on(
    features: Features, latents: Sequence[int], positive: Bool[np.ndarray, " examples"], parts: Parts, k: int | None
) -> _Fitted:
    columns = features.columns(latents)
    scale = Scale(columns[parts.train])
    probe = fit_probe(scale(columns[parts.train]), positive[parts.train])
    x = scale(columns[parts.test])
    verdict = Verdict(positive[parts.test], np.asarray(probe.predict(x), dtype=bool), probe.decision_function(x))
    return _Fitted(k, list(latents) if k is not None else [], verdict)
