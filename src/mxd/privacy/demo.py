"""`mxd privacy demo`: protected digits in a logistic regression with a certificate, and in a small network."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from mxd.atomic import write_json_atomically
from mxd.privacy.attacks import AttackConfig, attack
from mxd.privacy.certify import CertifyConfig, pretrain_logistic
from mxd.privacy.certifying import CERTIFICATE_FILE, certificate_facts, certify_model, with_weights
from mxd.privacy.classifiers import LogisticRegressionConfig, SlimResNetConfig, save_classifier
from mxd.privacy.examples import Examples, join
from mxd.privacy.fitting import FitConfig, fit_classifier
from mxd.privacy.inducing import induce_uncertainty
from mxd.privacy.measures import PrivacyMeasures, measure_privacy
from mxd.privacy.objective import ObjectiveConfig
from mxd.privacy.page import Section, make_cases, write_page
from mxd.privacy.tuning import InduceConfig
from mxd.privacy.workflow import PAGE_FILE

MARK = "privacy-demo.json"
PROTECTED = 20
CERTIFY = CertifyConfig(theta=0.5, weight_decay=1e-3, epsilon=1.0, delta=1e-5)
INDUCE = InduceConfig(
    objective=ObjectiveConfig(theta=0.5, weight_decay=0.0, uniformity="kl-p-u"),
    steps=400,
    retained_batch=128,
    optimizer="adam",
    lr=2e-3,
    schedule="cosine",
    check_every=25,
    # One of the 180 validation images is 0.6 points.
    max_accuracy_drop=0.01,
)
FIT = FitConfig(epochs=10, batch=64, lr=5e-3)
NETWORK = SlimResNetConfig(widths=(16, 32, 64), stem_stride=1, mean=(0.305,), std=(0.376,))


class DemoData(NamedTuple):
    """The digits, told apart."""

    protected: Examples
    retained: Examples
    validation: Examples
    test: Examples


class DemoSummary(NamedTuple):
    """What the demo found."""

    measures: Mapping[str, PrivacyMeasures]
    """By model, before and after."""
    statement: str
    """What the certificate promises."""


def read_digits() -> DemoData:
    """The 1,797 digits that come with scikit-learn, 8×8 pixels: 360 for the test, 180 to choose by, 20 protected."""
    from sklearn.datasets import load_digits

    digits: Any = cast(Any, load_digits)()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    whole = Examples(inputs=images, labels=torch.from_numpy(digits.target).long())
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(42))
    sizes = [360, 180, PROTECTED, len(whole) - 540 - PROTECTED]
    test, validation, protected, retained = (whole.take(rows) for rows in order.split(sizes))
    return DemoData(protected, retained, validation, test)


def privacy_demo(out: Path, *, say: Callable[[str], None]) -> DemoSummary:
    """Protect 20 digits in two models, and write models, certificate and page.

    Args:
        out: Folder of everything; an earlier demo there is replaced.
        say: Called with a sentence at the start of each part.

    Raises:
        ValueError: If the folder holds something else than an earlier demo.
    """
    _require_place(out)
    data = read_digits()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    write_json_atomically(out / MARK, {"what": "mxd privacy demo", "protected": PROTECTED})
    say(f"Logistic regression: a Newton step that makes {PROTECTED} digits uncertain, with a certificate …")
    certified, statement = _certified(out, data)
    say("Residual network of 78,000 weights: Pareto fine-tuning until the same digits are uncertain …")
    tuned = _tuned(out, data)
    facts = {
        "Data": "scikit-learn's digits, 1,797 images of 8×8 pixels",
        "Protected": f"{PROTECTED} training images, drawn at random",
        "Retained, validation, test": f"{len(data.retained):,}, {len(data.validation)}, {len(data.test)} images",
    }
    write_page(
        out / PAGE_FILE,
        title="Digits that two models must not recognise",
        lede="What two classifiers say of protected digits before and after their weights were made uncertain on them, "
        "what an adversary with the weights wins back, and what it costs on all other digits.",
        facts=facts,
        sections=[certified, tuned],
        footer="mxd privacy demo",
    )
    measures = {
        f"{name}, {when}": found
        for name, section in (("logistic regression", certified), ("residual network", tuned))
        for when, found in (("before", section.before), ("after", section.after))
    }
    return DemoSummary(measures, statement)


def _certified(out: Path, data: DemoData) -> tuple[Section, str]:
    config = LogisticRegressionConfig(d_in=64, num_classes=10)
    known = join(data.protected, data.retained)
    assert isinstance(known.inputs, torch.Tensor)
    weights = pretrain_logistic(
        known.inputs.flatten(1), known.labels, num_classes=10, weight_decay=CERTIFY.weight_decay
    )
    before = with_weights(config.build(), weights).eval()
    step = certify_model(before, data.protected, data.retained, CERTIFY)
    assert step.released is not None
    after = with_weights(before, step.released)
    folder = out / "logistic-regression"
    save_classifier(folder, config, after)
    write_json_atomically(folder / CERTIFICATE_FILE, step.certificate.public_json())
    note = step.certificate.statement()
    return _section("Logistic regression, certified Newton step", before, after, data, note)._replace(
        facts=certificate_facts(step.certificate), facts_heading="What the certificate rests on"
    ), note


def _tuned(out: Path, data: DemoData) -> Section:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = NETWORK.build()
    fit_classifier(before, join(data.protected, data.retained), FIT)
    run = out / "network"
    found = induce_uncertainty(before, data.protected, data.retained, INDUCE, validation=data.validation, run=run)
    save_classifier(run / "model", NETWORK, found.model)
    note = (
        f"Chosen at step {found.chosen.step} of {INDUCE.steps}: the lowest confidence distance among checks with a "
        f"validation accuracy of at least {found.least_accuracy:.3f}. There is no certificate for a network."
    )
    return _section("Residual network, Pareto fine-tuning", before, found.model, data, note)


def _section(heading: str, before: nn.Module, after: nn.Module, data: DemoData, note: str) -> Section:
    measures = [
        measure_privacy(model, protected=data.protected, retained=data.retained, test=data.test)
        for model in (before, after)
    ]
    attacks = [attack(model, data.protected, data.validation, AttackConfig()) for model in (before, after)]
    return Section(
        heading=heading,
        before=measures[0],
        after=measures[1],
        cases=make_cases(before, after, data.protected, count=6),
        note=note,
        attacks_before=attacks[0],
        attacks_after=attacks[1],
    )


def _require_place(out: Path) -> None:
    if out.exists() and not (out.is_dir() and ((out / MARK).is_file() or not any(out.iterdir()))):
        raise ValueError(f"{out} must be a new folder or an earlier demo; it is something else; name another --out.")
