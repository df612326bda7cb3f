"""From a finished run and some labelled data to what its latents tell of them."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import sklearn

from mxd.atomic import JSON
from mxd.checkpoint import CONFIG_FILE, edits_digest, layer_folder
from mxd.evaluation.opening import load_run_model, read_finished_run
from mxd.evaluation.students import TrainedStudent, load_students
from mxd.models import LanguageModel, device_of
from mxd.probing.collecting import Probed, Report, say_nothing
from mxd.probing.examples import (
    PART_SHARES,
    TEXTS,
    TOKEN_SHARES,
    TOKENS,
    ProbingSet,
    TextSet,
    check_texts,
    check_tokens,
)
from mxd.probing.hub_sets import HUB_SETS
from mxd.probing.results import NamedLatent, Probing, SetResult
from mxd.probing.sources import default_data, open_data, parse_data
from mxd.probing.text_probes import SEED, probe_texts
from mxd.probing.token_probes import probe_tokens


def probe_run(
    run: Path,
    *,
    data: Sequence[str] = (),
    texts: int = TEXTS,
    tokens: int = TOKENS,
    students: Collection[str] = (),
    device: str | None = None,
    model: str | None = None,
    report: Report = say_nothing,
) -> Probing:
    """Probe a run's students, and the dense layers that they stand in for, with labelled data.

    Args:
        run: Folder of a finished run.
        data: What to probe with, as `--data` takes it; Python source where empty, for a run that was trained on it.
        texts: Texts of each set to use, at most.
        tokens: Tokens of labelled documents to look at, at most.
        students: Ids, or `<layer>/<id>`; all where empty.
        device: Where to run; the run's own where None.
        model: Where the model is now; where the run found it if None.
        report: Is told how far it is.

    Raises:
        ValueError: If the run has not finished or has no layers, or the data cannot be used, or two sets have one name.
        FileNotFoundError: If data that is named is not there.
    """
    check_texts(texts)
    check_tokens(tokens)
    description = read_finished_run(run)
    names = parse_data(data or default_data(description["config"]["text"]))
    _check_names([name.name for name in names if name.name in HUB_SETS])
    # Before the layers are read: what is edited meanwhile is then found to be of other edits.
    edits = edits_digest(run)
    # All that can be refused is refused before the model runs.
    chosen = load_students(run, description["students"], students)
    sets = [open_data(name, texts) for name in names]
    _check_names([data.name for data in sets])
    language_model = load_run_model(run, description, device, model)
    return probe(
        _probed(language_model, description, chosen),
        sets,
        tokens=tokens,
        facts=_facts(language_model, chosen),
        identity=_identity(run, description, chosen) | {"edits": edits},
        report=report,
    )


def probe(
    probed: Probed,
    sets: Sequence[ProbingSet],
    *,
    tokens: int = TOKENS,
    facts: Mapping[str, str],
    identity: Mapping[str, JSON],
    report: Report = say_nothing,
) -> Probing:
    """Probe layers with labelled data, texts and documents as they come.

    Args:
        probed: The model and the layers.
        sets: The data.
        tokens: Tokens of labelled documents to look at, at most.
        facts: What a reader must know to repeat it.
        identity: Whose latents they are.
        report: Is told how far it is.

    Raises:
        ValueError: If a set has too few examples.
    """
    texts: list[SetResult] = []
    documents: list[SetResult] = []
    named: dict[str, dict[int, NamedLatent]] = {student.name: {} for student in probed.students}
    for data in sets:
        if isinstance(data, TextSet):
            texts.append(probe_texts(probed, data, report))
            continue
        found = probe_tokens(probed, data, tokens, report)
        documents.append(found.result)
        for student, latents in found.named.items():
            for latent in latents:
                other = named[student].get(latent.latent)
                if other is None or latent.skill_validation > other.skill_validation:
                    named[student][latent.latent] = latent
    ordered = {student: [latents[number] for number in sorted(latents)] for student, latents in named.items()}
    return Probing(facts=facts, identity=identity, texts=texts, tokens=documents, named=ordered if documents else {})


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Each set of data must have a name of its own, by which results call it; {', '.join(twice)} would be of "
            "two. Name each once, or rename a file."
        )


def _probed(
    language_model: LanguageModel, description: Mapping[str, Any], students: Sequence[TrainedStudent]
) -> Probed:
    model = language_model.module
    device = device_of(model)
    for student in students:
        student.candidate.network.to(device).eval()
    config = description["config"]
    candidates = [student.candidate for student in students]
    return Probed(model, language_model.tokenizer, candidates, config["context"], config["module"])


def _facts(language_model: LanguageModel, students: Sequence[TrainedStudent]) -> dict[str, str]:
    trained = {student.provenance.tokens_trained for student in students}
    return {
        "model": language_model.id,
        "tokens trained": ", ".join("unknown" if count is None else f"{count:,}" for count in sorted(trained, key=str)),
        "parts": f"{PART_SHARES} of texts, {TOKEN_SHARES} of tokens for training, validation and test",
        "seed": str(SEED),
        "scikit-learn": sklearn.__version__,
    }


def _identity(run: Path, description: Mapping[str, Any], students: Sequence[TrainedStudent]) -> dict[str, JSON]:
    weights: dict[str, JSON] = {}
    for student in students:
        stored = json.loads((layer_folder(run, student.candidate.name) / CONFIG_FILE).read_text(encoding="utf-8"))
        weights[student.candidate.name] = stored["weights_sha256"]
    return {"model": description["model"]["fingerprint"], "weights_sha256": weights}
