"""`mxd privacy`: weights that are uncertain on protected instances, and what that is worth."""

import functools
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mxd.cli.output import go_on_with_resume, notes, print_json
from mxd.privacy.attacks import AttackConfig, AttackReport, attack
from mxd.privacy.certify import CertifyConfig
from mxd.privacy.certifying import certify_into
from mxd.privacy.data_files import ColumnNames
from mxd.privacy.demo import privacy_demo
from mxd.privacy.measures import PrivacyMeasures, SetMeasures
from mxd.privacy.pareto_front import pareto_optimal
from mxd.privacy.recipes import PRIVACY_RECIPES, find_privacy_recipe
from mxd.privacy.tuning import InduceConfig
from mxd.privacy.workflow import (
    MEASURED_AT_ONCE,
    PrivacyFiles,
    PrivacyRequest,
    induce_into,
    measure_request,
    read_request,
    sweep_into,
)
from mxd.runs.faults import TrainingInterrupted

Flat = tyro.conf.arg(name="")
COLUMNS, INDUCE, ATTACK, CERTIFY = ColumnNames(), InduceConfig(), AttackConfig(), CertifyConfig()


def induce(
    files: Annotated[PrivacyFiles, Flat],
    out: Path,
    config: Annotated[InduceConfig, Flat] = INDUCE,
    columns: ColumnNames = COLUMNS,
    recipe: str | None = None,
    resume: bool = False,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Fine-tune a saved model until it is uniform on protected examples and as accurate as before on the others.

    Writes OUT/model, OUT/privacy.json and OUT/report.html, which shows protected instances before and after.

    Args:
        files: The model and its examples.
        out: Folder of the run.
        config: How.
        columns: Names of the columns of tables.
        recipe: Take the settings of a paper's run, such as cifar10-resnet50 (`list` shows them); what is given beside
            it replaces its own.
        resume: Continue the run in --out; bit for bit what it would have been uninterrupted.
        json_: Print what privacy.json holds.
    """
    request = read_request(files, columns)
    try:
        outcome = induce_into(out, request, config, resume=resume, footer=_command())
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        raise go_on_with_resume(error) from error
    _say_where(request)
    if json_:
        print_json(outcome.to_json())
        return
    _show_measures({"before": outcome.before, "after": outcome.after})
    _say(f"Chosen at step {outcome.induced.chosen.step:,}. Wrote {out}/model, privacy.json and report.html.")


def sweep(
    files: Annotated[PrivacyFiles, Flat],
    out: Path,
    thetas: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95),
    config: Annotated[InduceConfig, Flat] = INDUCE,
    columns: ColumnNames = COLUMNS,
    recipe: str | None = None,
    resume: bool = False,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Do what induce does at several θ, and draw what uncertainty costs.

    Writes OUT/theta-<θ> for each, OUT/front.json, OUT/front.png and OUT/report.html.

    Args:
        files: The model and its examples.
        out: Folder of the sweep.
        thetas: Weights of uniformity, each strictly between 0 and 1; --theta itself is not used.
        config: How.
        columns: Names of the columns of tables.
        recipe: Take the settings of a paper's run; `list` shows them.
        resume: Continue the sweep in --out.
        json_: Print what front.json holds.
    """
    request = read_request(files, columns)
    try:
        front = sweep_into(out, request, config, thetas, resume=resume, footer=_command())
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        raise go_on_with_resume(error) from error
    _say_where(request)
    optimal = pareto_optimal(front.points)
    if json_:
        print((out / "front.json").read_text("utf-8"), end="")
        return
    table = Table("θ", "confidence distance", f"{front.measured_on} accuracy", "Pareto-optimal")
    for point, best in zip(front.points, optimal, strict=True):
        theta = "as given" if point.theta is None else f"{point.theta:g}"
        table.add_row(theta, f"{point.confidence_distance:.4f}", f"{point.accuracy:.4f}", "yes" if best else "")
    Console().print(table)
    _say(f"Wrote front.json, front.png, report.html and a folder for each theta to {out}.")


def certify(
    files: Annotated[PrivacyFiles, Flat],
    out: Path,
    config: Annotated[CertifyConfig, Flat] = CERTIFY,
    columns: ColumnNames = COLUMNS,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Make a saved logistic regression uncertain by a Newton step, with noise and an (epsilon, delta) certificate.

    Writes OUT/model and OUT/certificate.json, which may be released, OUT/privacy.json, OUT/report.html, which shows
    protected instances, and OUT/owner-only.json with what depends on the weights without noise.
    What does not certify is refused, and nothing is written.

    Args:
        files: The model and its examples.
        out: A new folder.
        config: The objective and what is promised.
        columns: Names of the columns of tables.
        json_: Print what privacy.json holds, the certificate first.
    """
    request = read_request(files, columns)
    outcome = certify_into(out, request, config, footer=_command())
    _say_where(request)
    if json_:
        print_json(outcome.to_json())
        return
    _show_measures({"before": outcome.before, "without noise": outcome.without_noise, "after": outcome.after})
    _say(outcome.step.certificate.statement())
    _say(f"Wrote {out}/model, certificate.json, privacy.json, report.html and owner-only.json.")


def evaluate(
    files: Annotated[PrivacyFiles, Flat],
    columns: ColumnNames = COLUMNS,
    micro_batch: int = MEASURED_AT_ONCE,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Measure what a saved model gives away on protected examples, and what it is worth on the others.

    Args:
        files: The model and its examples.
        columns: Names of the columns of tables.
        micro_batch: Examples in memory at a time, fewer where classes are a whole vocabulary.
        json_: Print the measures as JSON.
    """
    if micro_batch < 1:
        raise ValueError(f"micro-batch must be at least 1; got {micro_batch}.")
    request = read_request(files, columns)
    measures = measure_request(request, request.saved.model, micro_batch)
    _say_where(request)
    if json_:
        print_json(measures.to_json())
        return
    _show_measures({"": measures})


def attack_model(
    files: Annotated[PrivacyFiles, Flat],
    config: Annotated[AttackConfig, Flat] = ATTACK,
    columns: ColumnNames = COLUMNS,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Try to win back, with the weights of a saved model, what it says of protected examples.

    An adversary's public examples are the retained ones, or where --validation is given, those.

    Args:
        files: The model and its examples.
        config: How hard to try. Where inputs are no pixels, set --low and --high to None.
        columns: Names of the columns of tables.
        json_: Print the report as JSON.
    """
    request = read_request(files, columns)
    public = request.optional("validation") or request.retained
    report = attack(request.saved.model, request.protected, public, config)
    _say_where(request)
    if json_:
        print_json(report.to_json())
        return
    table = Table("attack", "confidence distance", "accuracy")
    for name in AttackReport.__slots__:
        found: SetMeasures | None = getattr(report, name)
        cells = ("–", "–") if found is None else (f"{found.confidence_distance:.4f}", f"{found.accuracy:.4f}")
        table.add_row(name, *cells)
    Console().print(table)


def demo(out: Path = Path("privacy-demo")) -> None:
    """Protect 20 of scikit-learn's digits in a logistic regression, with a certificate, and in a small network.

    Needs neither data nor network, and takes less than a minute.

    Args:
        out: Folder of the models and the page; an earlier demo there is replaced.
    """
    summary = privacy_demo(out, say=_say)
    _show_measures(summary.measures)
    _say(summary.statement)
    _say(f"Look at {out}/report.html: protected digits, before and after.")


def privacy_commands(recipe: str | None) -> dict[str, Callable[..., None]]:
    """Return the commands by name, with the values of a recipe as defaults if there is one.

    Raises:
        ValueError: If there is no recipe of this name.
    """
    commands: dict[str, Callable[..., None]] = {
        "induce": induce,
        "sweep": sweep,
        "certify": certify,
        "evaluate": evaluate,
        "attack": attack_model,
        "demo": demo,
    }
    if recipe is not None:
        config = find_privacy_recipe(recipe).config
        commands |= {name: functools.partial(commands[name], config=config) for name in ("induce", "sweep")}
    return commands


def show_privacy_recipes() -> None:
    """Print a table of all recipes."""
    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "model", "data", "protected", "theta", "steps"):
        table.add_column(heading, no_wrap=True)
    for name, recipe in PRIVACY_RECIPES.items():
        config = recipe.config
        sizes = (f"{recipe.protected:,}", f"{config.objective.theta:g}", f"{config.steps:,}")
        table.add_row(name, recipe.architecture, recipe.dataset, *sizes)
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print("Every option given beside --recipe replaces the recipe's value; add --help to see them all.")


def _say_where(request: PrivacyRequest) -> None:
    # At the end: what is refused is one sentence and nothing else.
    _say(f"Computed on {request.device}.")


def _show_measures(found: Mapping[str, PrivacyMeasures]) -> None:
    table = Table("model", "set", "labels", "accuracy", "confidence\ndistance", "calibration\nerror", box=None)
    for name, measures in found.items():
        for part in ("protected", "retained", "test", "neighbours"):
            one: SetMeasures | None = getattr(measures, part)
            if one is not None:
                table.add_row(
                    name if part == "protected" else "",
                    part,
                    f"{one.examples:,}",
                    f"{one.accuracy:.4f}",
                    f"{one.confidence_distance:.4f}",
                    f"{one.calibration_error:.4f}",
                )
    Console().print(table)


def _say(text: str) -> None:
    notes().print(text)


def _command() -> str:
    return shlex.join(["mxd", *sys.argv[1:]])
