"""From a saved logistic regression to one that may be released, with its certificate."""

import copy
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mxd.atomic import JSON, is_new_or_empty, write_json_atomically
from mxd.privacy.certificate import Certificate, rounded_up
from mxd.privacy.certify import CertifiedStep, CertifyConfig, certify_logistic
from mxd.privacy.examples import Examples
from mxd.privacy.measures import PrivacyMeasures
from mxd.privacy.page import Section, write_page
from mxd.privacy.workflow import (
    LEDE,
    MODEL_FOLDER,
    PAGE_FILE,
    RESULT_FILE,
    PrivacyRequest,
    cases_of,
    measure_request,
)

CERTIFICATE_FILE = "certificate.json"
OWNER_FILE = "owner-only.json"


class CertifyOutcome(NamedTuple):
    """A logistic regression that may be released, and what is promised about it."""

    model: nn.Module
    """With the noise of the certificate."""
    step: CertifiedStep
    """How it was made."""
    before: PrivacyMeasures
    """Of the model as given."""
    without_noise: PrivacyMeasures
    """After the Newton steps; these weights are not to be released."""
    after: PrivacyMeasures
    """Of the model that may be released."""

    def to_json(self) -> dict[str, JSON]:
        """What may be published with the released weights: nothing in it tells of the weights without noise."""
        return {
            "certificate": self.step.certificate.public_json(),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }

    def owner_json(self) -> dict[str, JSON]:
        """The whole certificate and the measures without noise: (ε, δ) does not cover them, so they stay here."""
        return {
            "certificate": self.step.certificate.to_json(),
            "without_noise": self.without_noise.to_json(),
        }


def linear_weights(model: nn.Module) -> Float[Tensor, "d_in classes"]:
    """The weights of a saved logistic regression, as W with the bias in its last row, in float64.

    Raises:
        ValueError: If the model is something else.
    """
    layers = list(model.children())
    if not isinstance(model, nn.Sequential) or len(layers) != 2 or not isinstance(layers[1], nn.Linear):
        raise ValueError(
            "a certificate needs a logistic regression (flatten, then one linear layer): its constants are derived for "
            f"nothing else; got {type(model).__name__} of {len(layers)} parts; use mxd privacy induce, without one."
        )
    linear = layers[1]
    return torch.cat([linear.weight.detach().T, linear.bias.detach()[None]]).cpu().double()


def with_weights(model: nn.Module, weights: Float[Tensor, "d_in classes"]) -> nn.Module:
    """A copy of a logistic regression with other weights, rounded to its own type."""
    changed = copy.deepcopy(model)
    linear = cast(nn.Linear, list(changed.children())[1])
    with torch.no_grad():
        # Rounded before it goes to a device that may have no float64.
        rounded = weights.to(linear.weight.dtype)
        linear.weight.copy_(rounded[:-1].T)
        linear.bias.copy_(rounded[-1])
    return changed


def certify_model(model: nn.Module, protected: Examples, retained: Examples, config: CertifyConfig) -> CertifiedStep:
    """Run the certified Newton step on a logistic regression.

    Raises:
        ValueError: If the model is no logistic regression, the request does not certify (the sentence says what is
            unmet), or the examples are no numbers with one label each.
    """
    weights = linear_weights(model)
    if not isinstance(protected.inputs, Tensor) or not isinstance(retained.inputs, Tensor):
        raise ValueError("a certificate needs examples of numbers with one label each; got text.")
    step = certify_logistic(
        protected.inputs.flatten(1),
        retained.inputs.flatten(1),
        retained.labels,
        config,
        num_classes=weights.shape[1],
        pretrained=weights,
    )
    if step.released is None:
        raise ValueError(f"the weights may not be released: {step.certificate.statement()}")
    return step


def certify_into(out: Path, request: PrivacyRequest, config: CertifyConfig, *, footer: str = "") -> CertifyOutcome:
    """Certify a logistic regression, and write the model, `certificate.json`, `privacy.json` and `report.html`.

    Model and certificate may be published, and the numbers of `privacy.json`. The page shows protected instances, and
    `owner-only.json` has what depends on the weights without noise: both stay with the owner.

    Raises:
        ValueError: If the folder is not new or empty, or as `certify_model` does; nothing is written then.
    """
    if not is_new_or_empty(out):
        raise ValueError(f"{out} must be a new or an empty folder; it is not; name another --out.")
    model = request.saved.model
    step = certify_model(model, request.protected, request.retained, config)
    assert step.released is not None
    released = with_weights(model, step.released)
    outcome = CertifyOutcome(
        released,
        step,
        measure_request(request, model),
        measure_request(request, with_weights(model, step.stepped)),
        measure_request(request, released),
    )
    out.mkdir(parents=True, exist_ok=True)
    request.saved.write(out / MODEL_FOLDER, released)
    write_json_atomically(out / CERTIFICATE_FILE, step.certificate.public_json())
    write_json_atomically(out / RESULT_FILE, outcome.to_json())
    write_json_atomically(out / OWNER_FILE, outcome.owner_json())
    section = Section(
        heading="Before and after",
        before=outcome.before,
        after=outcome.after,
        cases=cases_of(request, released),
        note=step.certificate.statement(),
        facts=certificate_facts(step.certificate),
        facts_heading="What the certificate rests on",
    )
    facts = {
        "Model": request.files.model,
        "Objective": f"θ = {config.theta:g}, λ = {config.weight_decay:g}, {config.uniformity}",
        "Protected examples": f"{len(request.protected):,}",
        "Retained examples": f"{len(request.retained):,}",
    }
    title = "Certified uncertainty on protected instances"
    write_page(out / PAGE_FILE, title=title, lede=LEDE, facts=facts, sections=[section], footer=footer)
    return outcome


def certificate_facts(certificate: Certificate) -> dict[str, str]:
    """What a page says of a certificate, which may be published: noise, distance, and constants with their origins."""
    public = certificate.public()
    assert public.sigma is not None
    assert public.sensitivity is not None
    found = {"σ": rounded_up(public.sigma), "Δ": f"{rounded_up(public.sensitivity)} (the smallest bound)"}
    for name, constant in public.constants.items():
        found[f"{name}, {constant.origin}"] = f"{constant.value:.4g} ({constant.meaning})"
    return found
