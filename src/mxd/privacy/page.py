"""One page: protected instances with what a model says of them before and after, and what it cost."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from jinja2 import Environment, StrictUndefined
from torch import Tensor, nn

from mxd.atomic import write_text_atomically
from mxd.evaluation.report import VISIBLE
from mxd.privacy.attacks import AttackReport
from mxd.privacy.examples import Examples, predict_all
from mxd.privacy.measures import PrivacyMeasures, SetMeasures
from mxd.privacy.pareto_front import Front, front_svg

CASES = 12
"""Protected instances that a page shows."""
_BARS = 10
"""Classes that a distribution shows; of more, those that are likeliest before."""
_TEXT = 280


class Bar(NamedTuple):
    """A class in a distribution."""

    name: str
    before: float
    after: float
    is_label: bool


class Case(NamedTuple):
    """A protected instance."""

    picture: str
    """A data URI; empty where the instance is no image."""
    text: str
    """What the instance says; empty for an image."""
    bars: list[Bar]
    """Likeliest classes."""
    other_before: float
    """Probability of all classes that have no bar."""
    other_after: float
    uniform: float
    """1/Y."""


class Section(NamedTuple):
    """One model on a page, before and after."""

    heading: str
    """What the model is."""
    before: PrivacyMeasures
    """As given."""
    after: PrivacyMeasures
    """With uncertainty."""
    cases: Sequence[Case]
    """Some protected instances."""
    note: str = ""
    """What a reader must know of it."""
    attacks_before: AttackReport | None = None
    """What an adversary wins back of the model as given."""
    attacks_after: AttackReport | None = None
    """What one wins back of the model with uncertainty."""
    facts: Mapping[str, str] = {}
    """More to know, by name: the constants of a certificate."""
    facts_heading: str = ""
    """Above them."""


class _Line(NamedTuple):
    name: str
    meaning: str
    before: str
    after: str


def make_cases(
    before: nn.Module,
    after: nn.Module,
    protected: Examples,
    *,
    class_names: Sequence[str] = (),
    texts: Sequence[str] = (),
    count: int = CASES,
) -> list[Case]:
    """The first protected instances with their predicted distributions.

    Where positions have labels, an instance's distribution is that at its first label that counts.

    Args:
        before: The model as given.
        after: The model with uncertainty.
        protected: The protected examples.
        class_names: Names of the classes; numbers unless given.
        texts: What the rows of text say.
        count: Instances, at most.
    """
    cases: list[Case] = []
    for row in range(min(count, len(protected))):
        # One at a time: with a vocabulary for classes, a row's predictions are large.
        told = [predict_all(model, protected.take(slice(row, row + 1))) for model in (before, after)]
        p_before, p_after = (found.logits[0].softmax(-1) for found in told)
        cases.append(_case(p_before, p_after, protected, row, int(told[0].labels[0]), class_names, texts))
    return cases


def _case(
    before: Float[Tensor, " classes"],
    after: Float[Tensor, " classes"],
    examples: Examples,
    row: int,
    label: int,
    class_names: Sequence[str],
    texts: Sequence[str],
) -> Case:
    number = len(before)
    shown = range(number) if number <= _BARS else sorted(before.topk(_BARS).indices.tolist())
    bars = [
        Bar(
            (class_names[c] if c < len(class_names) else str(c)).translate(VISIBLE),
            float(before[c]),
            float(after[c]),
            c == label,
        )
        for c in shown
    ]
    picture = text = ""
    if isinstance(examples.inputs, Tensor):
        value = examples.inputs[row]
        if value.dim() == 3 and value.shape[0] in (1, 3):
            picture = _picture(value)
        else:
            text = ", ".join(f"{x:.3g}" for x in value.flatten()[:12].tolist()) + (" …" if value.numel() > 12 else "")
    else:
        whole = texts[row] if row < len(texts) else f"row {row}"
        text = (whole if len(whole) <= _TEXT else whole[: _TEXT - 1] + "…").translate(VISIBLE)
    rest_before, rest_after = (
        max(0.0, 1 - sum(values)) for values in ([bar.before for bar in bars], [bar.after for bar in bars])
    )
    return Case(picture, text, bars, rest_before, rest_after, 1 / number)


def _picture(pixels: Float[Tensor, "channels height width"]) -> str:
    from PIL import Image

    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).squeeze(-1).cpu().numpy()
    target = io.BytesIO()
    Image.fromarray(values).save(target, format="PNG")
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()


def write_page(
    path: Path,
    *,
    title: str,
    lede: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    front: Front | None = None,
    footer: str = "",
) -> None:
    """Write the page as one HTML file that needs no other, no script and no network, whole or not at all.

    Args:
        path: The file; its folder must exist.
        title: Heading of the page.
        lede: What the page shows, in a sentence.
        facts: What a reader must know to repeat it, by name.
        sections: One a model.
        front: A sweep over θ.
        footer: The page's last line, such as the command.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(files("mxd").joinpath("privacy/page.html.jinja").read_text("utf-8"))
    page = template.render(
        title=title,
        lede=lede,
        facts=facts,
        sections=[(section, _measure_lines(section), _attack_lines(section)) for section in sections],
        front="" if front is None else front_svg(front),
        front_on="" if front is None else front.measured_on,
        footer=footer,
        percent=_percent,
    )
    write_text_atomically(path, page)


def _measure_lines(section: Section) -> list[_Line]:
    before, after = section.before, section.after

    def line(name: str, meaning: str, of: str, field: str, *, share: bool = True) -> list[_Line]:
        pair: list[SetMeasures | None] = [getattr(measures, of) for measures in (before, after)]
        if pair[0] is None or pair[1] is None:
            return []
        values = [float(getattr(found, field)) for found in pair]
        return [_Line(name, meaning, *(_percent(value) if share else f"{value:.4f}" for value in values))]

    distance = "Mean of how far the largest probability lies above 1/Y; 0 is uniform"
    return [
        *line("Protected: confidence distance", distance, "protected", "confidence_distance", share=False),
        *line(
            "Protected: largest of these",
            "The instance that gives away most",
            "protected",
            "largest_confidence_distance",
            share=False,
        ),
        *line("Protected: accuracy", f"Guessing gives {_percent(1 / before.num_classes)}", "protected", "accuracy"),
        *line("Retained: accuracy", "On examples that should not change", "retained", "accuracy"),
        *line("Test: accuracy", "On examples that no training has seen", "test", "accuracy"),
        *line("Neighbours: accuracy", "On the test example nearest to each protected one", "neighbours", "accuracy"),
        *line("Neighbours: confidence distance", distance, "neighbours", "confidence_distance", share=False),
        *line(
            "Retained: calibration error",
            "Expected calibration error, 15 bins",
            "retained",
            "calibration_error",
            share=False,
        ),
    ]


def _attack_lines(section: Section) -> list[_Line]:
    before, after = section.attacks_before, section.attacks_after
    if before is None or after is None:
        return []
    names = {
        "clean": ("None", "The protected examples as they are"),
        "gaussian": ("Gaussian noise", "Of standard deviation epsilon"),
        "fgsm": ("FGSM", "One step along the gradient's sign"),
        "pgd": ("PGD on logsumexp", "The paper's attack"),
        "pgd_confidence": ("PGD on confidence", "The same on the largest log-probability"),
        "relearned": ("Fine-tuning", "On a few public samples"),
        "probe": ("Linear probe", "A logistic regression on the penultimate layer"),
    }
    lines: list[_Line] = []
    for field, (name, meaning) in names.items():
        pair: list[SetMeasures | None] = [getattr(report, field) for report in (before, after)]
        if pair[0] is not None and pair[1] is not None:
            cells = (f"{found.confidence_distance:.4f} / {_percent(found.accuracy)}" for found in pair if found)
            lines.append(_Line(name, meaning, *cells))
    return lines


def _percent(share: float) -> str:
    """A share in per cent: 94.7%, 0.35%, <0.01%."""
    value = 100 * share
    if 0 < value < 0.01:
        return "<0.01%"
    return f"{value:.1f}%" if value >= 1 or value == 0 else f"{value:.2f}%"
