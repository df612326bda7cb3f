"""Test-time privacy on MNIST: 100 protected images, a slim residual network, three seeds, attacks and baselines.

    python benchmarks/privacy_mnist.py --data FOLDER --work FOLDER

FOLDER of the data holds train.npz and test.npz with arrays `images` and `labels`. Everything that was computed is kept
in the work folder, so that the script can be stopped and called again. Settings were tried on seed 0, mainly by
validation accuracy, with its test accuracy seen too; seeds 1 and 2 had no part in the choice.

Of the 60,000 training images 2,000 are set aside before pretraining: they choose the model and are what an adversary
has; 100 of the others are protected. "Retained" is measured on 5,000 of the rest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from matplotlib.figure import Figure
from torch import nn

from harness import machine, print_table, write_report
from mxd.atomic import write_json_atomically
from mxd.evaluation.drawing import INK, KIND_STYLES, figure
from mxd.privacy.attacks import AttackConfig, attack
from mxd.privacy.baselines import BaselineConfig, gaussian_uniform, label_private, random_labels_around, retrain
from mxd.privacy.classifiers import (
    ClassifierConfig,
    LogisticRegressionConfig,
    MlpConfig,
    SlimResNetConfig,
    load_classifier,
    save_classifier,
)
from mxd.privacy.examples import Examples, join
from mxd.privacy.fitting import FitConfig, fit_classifier
from mxd.privacy.inducing import induce_uncertainty
from mxd.privacy.measures import measure_privacy
from mxd.privacy.objective import ObjectiveConfig
from mxd.privacy.pareto_front import Front, FrontPoint, draw_front
from mxd.privacy.tuning import InduceConfig

MODELS: dict[str, ClassifierConfig] = {
    "slim-resnet": SlimResNetConfig(),
    "mlp": MlpConfig(d_in=784, num_classes=10),
    "logistic-regression": LogisticRegressionConfig(d_in=784, num_classes=10),
}
PROTECTED, VALIDATION, MEASURED = 100, 2000, 5000
BASELINES = ("retrained", "random-labels", "gaussian-uniform", "label-dp")
SWEEP = (0.05, 0.25, 0.5, 0.75, 0.95)
FIT = FitConfig(epochs=2)


class Data(NamedTuple):
    """One seed's sets."""

    everything: Examples
    protected: Examples
    retained: Examples
    validation: Examples
    test: Examples


def induce_config(theta: float, steps: int, seed: int) -> InduceConfig:
    return InduceConfig(
        objective=ObjectiveConfig(theta=theta, weight_decay=0.0, uniformity="kl-p-u"),
        steps=steps,
        retained_batch=128,
        optimizer="adam",
        lr=2e-3,
        schedule="cosine",
        check_every=100,
        seed=seed,
    )


def sweep_config(theta: float, steps: int) -> InduceConfig:
    """One point of the front: the model after the last step, however accurate."""
    return replace(induce_config(theta, steps, 0), check_every=steps, min_accuracy=0.0)


def read(folder: Path, name: str) -> Examples:
    with numpy.load(folder / f"{name}.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    pixels = torch.from_numpy(images).float().div(255).unsqueeze(1)
    return Examples(inputs=pixels, labels=torch.from_numpy(labels).long())


def split(train: Examples, test: Examples, seed: int) -> Data:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(42 + seed))
    validation, rest = order[:VALIDATION], order[VALIDATION:]
    protected, retained = train.take(rest[:PROTECTED]), train.take(rest[PROTECTED:])
    return Data(train.take(rest), protected, retained, train.take(validation), test)


def model_at(folder: Path, config: ClassifierConfig, make: Callable[[], nn.Module]) -> nn.Module:
    """The model in the folder; made and put there first if need be."""
    if not (folder / "config.json").exists():
        save_classifier(folder, config, make())
    return load_classifier(folder).model


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON of a file; made and put there first if need be."""
    if not path.exists():
        started = time.monotonic()
        found = make()
        write_json_atomically(path, found | {"seconds": round(time.monotonic() - started, 1)})
        print(path.stem, found.get("line", ""), flush=True)
    return json.loads(path.read_text())


def measured(model: nn.Module, data: Data, *, attacked: bool = False) -> dict[str, Any]:
    retained = data.retained.take(slice(0, MEASURED))
    found = measure_privacy(model, protected=data.protected, retained=retained, test=data.test)
    report: dict[str, Any] = {"measures": found.to_json()}
    if attacked:
        report["attacks"] = attack(model, data.protected, data.validation, AttackConfig()).to_json()
    assert found.test is not None
    report["line"] = f"distance {found.protected.confidence_distance:.4f} test accuracy {found.test.accuracy:.4f}"
    return report


def fresh(config: ClassifierConfig, seed: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(seed)
        return config.build()

    return build


def one_seed(work: Path, config: ClassifierConfig, data: Data, seed: int, steps: int) -> dict[str, Any]:
    def pretrain() -> nn.Module:
        model = fresh(config, seed)()
        fit_classifier(model, data.everything, FitConfig(epochs=FIT.epochs, seed=seed))
        return model

    pretrained = model_at(work / f"pretrained-{seed}", config, pretrain)
    rows = {"pretrained": kept(work / f"pretrained-{seed}.json", lambda: measured(pretrained, data, attacked=True))}

    def induce(theta: float, steps: int) -> dict[str, Any]:
        found = induce_uncertainty(
            pretrained, data.protected, data.retained, induce_config(theta, steps, seed), validation=data.validation
        )
        chosen = {"chosen": found.chosen._asdict(), "checks": [check._asdict() for check in found.checks]}
        save_classifier(work / f"induced-{theta}-{steps}-{seed}", config, found.model)
        return measured(found.model, data, attacked=True) | chosen

    rows["induced"] = kept(work / f"induced-{seed}.json", lambda: induce(0.5, steps))
    return rows


def sweep(work: Path, config: ClassifierConfig, data: Data, steps: int) -> dict[str, Any]:
    pretrained = load_classifier(work / "pretrained-0").model

    def at(theta: float) -> dict[str, Any]:
        found = induce_uncertainty(
            pretrained, data.protected, data.retained, sweep_config(theta, steps), validation=data.validation
        )
        chosen = {"chosen": found.chosen._asdict(), "checks": [check._asdict() for check in found.checks]}
        return measured(found.model, data) | chosen

    return {str(theta): kept(work / f"sweep-{theta}.json", lambda theta=theta: at(theta)) for theta in SWEEP}


def baselines(work: Path, config: ClassifierConfig, data: Data, names: Sequence[str]) -> dict[str, Any]:
    settings = BaselineConfig(fit=FIT, num_classes=10)
    build = fresh(config, 0)
    makers: dict[str, Callable[[], nn.Module]] = {
        "retrained": lambda: retrain(build, data.retained, settings),
        "random-labels": lambda: random_labels_around(build, data.protected, data.retained, settings),
        "gaussian-uniform": lambda: gaussian_uniform(build, data.protected, data.retained, settings),
        "label-dp": lambda: label_private(build, join(data.protected, data.retained), settings),
    }
    return {
        name: kept(work / f"{name}.json", lambda name=name: measured(makers[name](), data, attacked=True))
        for name in names
    }


def row(method: str, seed: str, found: Sequence[dict[str, Any]]) -> dict[str, object]:
    """A line of the table: the mean over one or several seeds."""

    def mean(*path: str) -> float:
        values: list[float] = []
        for one in found:
            value: Any = one
            for name in path:
                value = value[name]
            values.append(float(value))
        return statistics.mean(values)

    def share(*path: str) -> str:
        return f"{100 * mean(*path):.2f}%"

    def distance(*path: str) -> str:
        return f"{mean(*path, 'confidence_distance'):.4f}"

    return {
        "method": method,
        "seed": seed,
        "distance": distance("measures", "protected"),
        "protected acc.": share("measures", "protected", "accuracy"),
        "test acc.": share("measures", "test", "accuracy"),
        "neighbours acc.": share("measures", "neighbours", "accuracy"),
        "retained ECE": f"{mean('measures', 'retained', 'calibration_error'):.4f}",
        "Gaussian": distance("attacks", "gaussian"),
        "FGSM": distance("attacks", "fgsm"),
        "PGD": distance("attacks", "pgd"),
        "PGD on confidence": distance("attacks", "pgd_confidence"),
        "fine-tuned": distance("attacks", "relearned"),
        "fine-tuned acc.": share("attacks", "relearned", "accuracy"),
        "probe acc.": share("attacks", "probe", "accuracy"),
    }


ATTACKS = {
    "clean": "none",
    "gaussian": "Gaussian",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "pgd_confidence": "PGD on\nconfidence",
    "relearned": "fine-\ntuning",
    "probe": "linear\nprobe",
}


def draw(seeds: Sequence[dict[str, Any]], front: Front, config: str) -> Figure:
    subtitle = f"MNIST, {config}, {PROTECTED} protected images, {len(seeds)} seeds; a dot is a seed"
    with figure(
        10.4, 3.9, title="Uncertainty on protected images, and what an adversary wins back", subtitle=subtitle
    ) as drawing:
        left, right = drawing.subplots(1, 2, width_ratios=(1.35, 1))
        for place, (name, style) in enumerate((("pretrained", "transcoder"), ("induced", "mxd"))):
            values = [
                [float(seed[name]["attacks"][attack]["confidence_distance"]) for seed in seeds] for attack in ATTACKS
            ]
            at = [x + 0.4 * (place - 0.5) for x in range(len(ATTACKS))]
            colour = KIND_STYLES[style].colour
            left.bar(at, [statistics.mean(one) for one in values], width=0.36, color=colour, label=name)
            for x, one in zip(at, values, strict=True):
                left.plot([x] * len(one), one, "o", color=INK, markersize=2.6)
        left.set_xticks(range(len(ATTACKS)), list(ATTACKS.values()), fontsize=8.5)
        left.set_title("Mean confidence distance on protected images")
        left.set_ylim(0, 1.12)
        left.grid(axis="y")
        left.legend(loc="upper center", ncols=2, borderaxespad=0.2)
        draw_front(right, front)
        return drawing


def require_settings(work: Path, settings: dict[str, Any]) -> None:
    """Keep what the work folder was computed with, and refuse to mix it with anything else."""
    work.mkdir(parents=True, exist_ok=True)
    asked = json.loads(json.dumps(settings))
    path = work / "settings.json"
    if not path.exists():
        write_json_atomically(path, asked)
    elif json.loads(path.read_text()) != asked:
        raise SystemExit(f"{path} was computed with other settings; name another --work.")


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=list(MODELS), default="slim-resnet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--sweep-steps", type=int, default=300)
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    torch.set_num_threads(1)
    described, config = machine(), MODELS[arguments.model]
    train, test = read(arguments.data, "train"), read(arguments.data, "test")
    settings = {
        "model": arguments.model,
        "architecture": asdict(config),
        "protected": PROTECTED,
        "validation": VALIDATION,
        "retained_measured": MEASURED,
        "fit": asdict(FIT),
        "attack": asdict(AttackConfig()),
        "induce": asdict(induce_config(0.5, arguments.steps, 0)),
        "sweep_steps": arguments.sweep_steps,
    }
    require_settings(arguments.work, settings)
    seeds = [
        one_seed(arguments.work, config, split(train, test, seed), seed, arguments.steps)
        for seed in range(arguments.seeds)
    ]
    first = split(train, test, 0)
    swept = sweep(arguments.work, config, first, arguments.sweep_steps)
    others = baselines(arguments.work, config, first, arguments.baselines)
    names = ("pretrained", "induced")
    rows = [row(name, "mean", [seed[name] for seed in seeds]) for name in names]
    rows += [row(name, str(place), [seed[name]]) for name in names for place, seed in enumerate(seeds)]
    rows += [row(name, "0", [found]) for name, found in others.items()]
    given = seeds[0]["pretrained"]["measures"]
    points = [(None, given), *((float(theta), found["measures"]) for theta, found in swept.items())]
    front = Front(
        tuple(
            FrontPoint(theta, found["protected"]["confidence_distance"], found["test"]["accuracy"])
            for theta, found in points
        ),
        "test",
    )
    parameters = sum(parameter.numel() for parameter in config.build().parameters())
    title = f"Test-time privacy on MNIST: {arguments.model}, {parameters:,} weights, {PROTECTED} protected images"
    details = {
        "settings": settings,
        "front": [point._asdict() for point in front.points],
        "seeds": seeds,
        "baselines": others,
    }
    write_report(
        f"privacy_mnist_{arguments.model.replace('-', '_')}",
        title,
        rows,
        described,
        details,
        draw(seeds, front, arguments.model),
    )
    wanted = ("method", "seed", "distance", "test acc.", "PGD", "PGD on confidence", "fine-tuned", "probe acc.")
    print_table([{name: one[name] for name in wanted} for one in rows], title)


if __name__ == "__main__":
    main()
