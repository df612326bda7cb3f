"""From models and files to models and pages: what `mxd privacy` does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, cast

from torch import nn

from mxd.atomic import JSON, write_json_atomically
from mxd.privacy.data_files import ColumnNames, FileSets, read_sets
from mxd.privacy.examples import Examples, device_of, require_logits, require_sets, require_usable
from mxd.privacy.inducing import induce_uncertainty
from mxd.privacy.measures import PrivacyMeasures, measure_privacy
from mxd.privacy.page import Case, Section, make_cases, write_page
from mxd.privacy.pareto_front import Front, FrontPoint, write_front
from mxd.privacy.saved_models import SavedModel, load_model
from mxd.privacy.tuning import InduceConfig, Induced
from mxd.runs.determinism import reserve_workspace

MEASURED_AT_ONCE = 64
"""Examples in memory at a time when a model is measured, unless fewer are asked for."""
RESULT_FILE, PAGE_FILE, MODEL_FOLDER = "privacy.json", "report.html", "model"
LEDE = (
    "What a model says of protected instances before and after its weights were made uncertain on them, "
    "and what that costs on all others."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyFiles:
    """A saved model and the files of its examples."""

    model: str
    """Folder of a model: a classifier of ours, or a transformers model for sequences, tokens, images or generation."""
    protected: Path
    """Protected examples: a folder with a folder of images for each class, .npz, .csv or .parquet."""
    retained: Path
    """Retained examples, in the same form."""
    test: Path | None = None
    """Examples that neither training nor the choice of a model sees, for the report."""
    validation: Path | None = None
    """Examples to choose the model by; a part of the retained ones unless given."""
    device: str = "auto"
    """`auto` (an accelerator if there is one), `cpu`, `cuda`, `mps` …"""
    max_tokens: int = 512
    """Longest text; what is longer is cut."""


class PrivacyRequest(NamedTuple):
    """A model and its examples, read."""

    files: PrivacyFiles
    saved: SavedModel
    data: FileSets

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(device_of(self.saved.model))

    @property
    def protected(self) -> Examples:
        """The protected examples."""
        return self.data.sets["protected"]

    @property
    def retained(self) -> Examples:
        """The retained examples."""
        return self.data.sets["retained"]

    def optional(self, name: str) -> Examples | None:
        """The test or validation examples, where there are any."""
        return self.data.sets.get(name)


class InduceOutcome(NamedTuple):
    """What was induced, and what it is worth."""

    induced: Induced
    """The model, and how it was chosen."""
    before: PrivacyMeasures
    """Of the model as given."""
    after: PrivacyMeasures
    """Of the chosen one."""

    def to_json(self) -> dict[str, JSON]:
        """All but the model, for a file."""
        return {
            "chosen": cast(JSON, self.induced.chosen._asdict()),
            "least_accuracy": self.induced.least_accuracy,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "checks": [check._asdict() for check in self.induced.checks],
        }


def read_request(files: PrivacyFiles, columns: ColumnNames | None = None) -> PrivacyRequest:
    """Load a model and read its examples, and check that they belong together.

    Raises:
        FileNotFoundError: If the model or a file does not exist.
        ValueError: If one cannot be read, sets are empty or overlap, or labels or shapes do not fit the model.
    """
    reserve_workspace()
    saved = load_model(files.model, device=files.device, max_tokens=files.max_tokens)
    named = {
        "protected": files.protected,
        "retained": files.retained,
        "test": files.test,
        "validation": files.validation,
    }
    paths = {name: path for name, path in named.items() if path is not None}
    data = read_sets(paths, columns=columns, reader=saved.reader, class_names=saved.class_names)
    request = PrivacyRequest(files, saved, data)
    for name, examples in data.sets.items():
        require_usable(name, examples)
    for first, second in combinations(data.sets, 2):
        require_sets(data.sets[first], data.sets[second], (first, second))
    for name, examples in data.sets.items():
        num_classes = require_fit(saved.model, examples, name)
        if data.class_names and not saved.class_names and len(data.class_names) != num_classes:
            raise ValueError(
                f"the model must know the order of its {num_classes} classes where labels are names; it was saved "
                f"without names, and the files have {len(data.class_names)} ({', '.join(data.class_names[:5])}); "
                "number the labels."
            )
    return request


def require_fit(model: nn.Module, examples: Examples, name: str) -> int:
    """Check that a model takes these examples and has their classes, and return the number of its classes.

    Raises:
        ValueError: If not.
    """
    try:
        return require_logits(model, examples, name)
    except (RuntimeError, IndexError) as error:
        shapes = {key: tuple(tensor.shape[1:]) for key, tensor in examples.tensors().items()}
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"the model must take the {name} examples, each of shape {shapes}; it fails ({first}); give "
            "examples of the shape that it was trained on."
        ) from error


def measure_request(request: PrivacyRequest, model: nn.Module, micro_batch: int = MEASURED_AT_ONCE) -> PrivacyMeasures:
    """Measure a model on the request's sets, so many examples in memory at a time."""
    return measure_privacy(
        model,
        protected=request.protected,
        retained=request.retained,
        test=request.optional("test"),
        batch_size=micro_batch,
    )


def induce_into(
    out: Path, request: PrivacyRequest, config: InduceConfig, *, resume: bool = False, footer: str = ""
) -> InduceOutcome:
    """Induce uncertainty, and write the model, `privacy.json` and `report.html` into the run's folder.

    Args:
        out: Folder of the run; see `induce_uncertainty`.
        request: The model and its examples.
        config: How.
        resume: Continue what is in the folder.
        footer: The page's last line.
    """
    saved = request.saved
    induced = induce_uncertainty(
        saved.model,
        request.protected,
        request.retained,
        config,
        validation=request.optional("validation"),
        run=out,
        resume=resume,
    )
    size = min(MEASURED_AT_ONCE, config.micro_batch)
    before, after = (measure_request(request, model, size) for model in (saved.model, induced.model))
    outcome = InduceOutcome(induced, before, after)
    saved.write(out / MODEL_FOLDER, induced.model)
    write_json_atomically(out / RESULT_FILE, outcome.to_json())
    section = Section(
        heading="Before and after",
        before=outcome.before,
        after=outcome.after,
        cases=cases_of(request, induced.model),
        note=_choice(induced),
    )
    facts = {
        "Model": request.files.model,
        "Objective": f"θ = {config.objective.theta:g}, λ = {config.objective.weight_decay:g}, "
        f"{config.objective.uniformity}",
        "Protected examples": f"{len(request.protected):,}",
        "Retained examples": f"{len(request.retained):,}",
        "Steps": f"{induced.chosen.step:,} of {config.steps:,}",
        "Seed": str(config.seed),
    }
    write_page(
        out / PAGE_FILE,
        title="Uncertainty on protected instances",
        lede=LEDE,
        facts=facts,
        sections=[section],
        footer=footer,
    )
    return outcome


def cases_of(request: PrivacyRequest, after: nn.Module) -> list[Case]:
    """The protected instances that a page shows."""
    return make_cases(
        request.saved.model,
        after,
        request.protected,
        class_names=request.data.class_names or request.saved.class_names,
        texts=request.data.shown["protected"],
    )


def _choice(induced: Induced) -> str:
    if induced.chosen.step == 0:
        return (
            f"No check kept a validation accuracy of {induced.least_accuracy:.4f} with less confidence: the model is "
            "as it was given."
        )
    step, _, accuracy = induced.chosen
    return (
        f"Chosen at step {step:,}, with a validation accuracy of {accuracy:.4f} (at least {induced.least_accuracy:.4f} "
        f"was asked for, {induced.checks[0].validation_accuracy:.4f} was given)."
    )


def sweep_into(
    out: Path,
    request: PrivacyRequest,
    config: InduceConfig,
    thetas: Sequence[float],
    *,
    resume: bool = False,
    footer: str = "",
) -> Front:
    """Induce uncertainty at several θ, each a run in `theta-<θ>`, and draw the front that they make.

    Writes `front.json`, `front.png` and a page with the front and the most uncertain accurate model.
    """
    if not thetas or len(set(thetas)) < len(thetas):
        raise ValueError(f"thetas must name at least one, each only once; got {' '.join(map(str, thetas)) or 'none'}.")
    configs = [replace(config, objective=replace(config.objective, theta=theta)) for theta in thetas]
    outcomes = [
        induce_into(out / f"theta-{one.objective.theta:g}", request, one, resume=resume, footer=footer)
        for one in configs
    ]
    front = _front_of(thetas, outcomes)
    write_front(front, out)
    best = min(outcomes, key=lambda outcome: outcome.induced.chosen.confidence_distance)
    section = Section(
        heading=f"The most uncertain of these: θ = {thetas[outcomes.index(best)]:g}",
        before=best.before,
        after=best.after,
        cases=cases_of(request, best.induced.model),
        note=_choice(best.induced),
    )
    facts = {
        "Model": request.files.model,
        "θ": ", ".join(f"{theta:g}" for theta in thetas),
        "Protected examples": f"{len(request.protected):,}",
        "Retained examples": f"{len(request.retained):,}",
        "Steps": f"{config.steps:,} at each θ",
        "Seed": str(config.seed),
    }
    write_page(
        out / PAGE_FILE,
        title="What uncertainty costs, over θ",
        lede=LEDE,
        facts=facts,
        sections=[section],
        front=front,
        footer=footer,
    )
    return front


def _front_of(thetas: Sequence[float], outcomes: Sequence[InduceOutcome]) -> Front:
    def accuracy(measures: PrivacyMeasures, validation: float) -> float:
        return validation if measures.test is None else measures.test.accuracy

    first = outcomes[0]
    given = FrontPoint(
        None,
        first.before.protected.confidence_distance,
        accuracy(first.before, first.induced.checks[0].validation_accuracy),
    )
    points = [
        FrontPoint(
            theta,
            outcome.after.protected.confidence_distance,
            accuracy(outcome.after, outcome.induced.chosen.validation_accuracy),
        )
        for theta, outcome in zip(thetas, outcomes, strict=True)
    ]
    return Front((given, *points), "validation" if first.before.test is None else "test")
