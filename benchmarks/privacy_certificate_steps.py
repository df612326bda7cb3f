"""What each bound says after one, two, … Newton steps on MNIST, against the true distance to the minimiser.

    python benchmarks/privacy_certificate_steps.py --data FOLDER

The model, data and words are those of privacy_certificate.py (`raw`), at one λ and θ. All steps but the last are
damped.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from harness import RESULTS, machine, print_table, write_report
from mxd.atomic import write_bytes_atomically
from mxd.evaluation.drawing import GRID, INK, MUTED, add_legend, figure, png
from mxd.privacy.certificate import Bound
from mxd.privacy.certify import pretrain_logistic
from mxd.privacy.newton import minimise
from privacy_certificate import BLUE, GREEN, NUM_PROTECTED, ORANGE, certify, line, problem_of, read_images

DECAY, THETA, WARM_UPS = 1e-2, 0.75, range(12)
NOT_MET = "–"
BOUNDS = {
    "a priori, ball": ("A priori, ball", MUTED, "--", "x"),
    "a priori, gradient": ("A priori, gradient", "#cc79a7", "--", "v"),
    "step length": ("Step length", "#e69f00", "--", "^"),
    "a posteriori": ("A posteriori", ORANGE, "-", "s"),
    "self-concordant": ("Self-concordant", GREEN, "-", "D"),
    "next step": ("Next step", "#332288", "-", "P"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz")
    parser.add_argument("--dimensions", type=int, default=50, help="principal components")
    parser.add_argument("--images", type=int, default=60_000, help="training images, the protected ones among them")
    parser.add_argument("--name", default="privacy_certificate_steps", help="name of the files in benchmarks/results")
    args = parser.parse_args()
    described = machine()
    images = read_images(args.data, args.dimensions, args.images)
    everything = torch.cat([images.protected, images.retained])
    labels = torch.cat([images.protected_labels, images.retained_labels])
    pretrained = pretrain_logistic(everything, labels, num_classes=10, weight_decay=DECAY)
    last = certify(images, pretrained, theta=THETA, decay=DECAY, warm_up=2 * len(WARM_UPS))
    exact = minimise(problem_of(images, last, THETA, DECAY), last.stepped.flatten())
    rows: list[dict[str, object]] = []
    for warm_up in WARM_UPS:
        step = certify(images, pretrained, theta=THETA, decay=DECAY, warm_up=warm_up)
        found = line(images, step, exact)
        bounds = {name: value_of(step.certificate.bounds[name]) for name in BOUNDS}
        kept = ("distance", "σ", "after step", "released", "± seeds", "cd after step", "cd released")
        rows.append({"steps": warm_up + 1} | bounds | {name: found[name] for name in kept})
        print(rows[-1], flush=True)
    print_table(rows, "bounds after each Newton step")
    details = {
        "data": "MNIST",
        "dimensions": args.dimensions,
        "training_images": args.images,
        "λ": DECAY,
        "θ": THETA,
        "protected": NUM_PROTECTED,
    }
    write_report(args.name, "Bounds on the distance to the exact minimiser, MNIST", rows, described, details)
    draw(rows, args.name, f"{args.images:,} training images ({NUM_PROTECTED} protected), {args.dimensions} components")


def value_of(bound: Bound) -> float | str:
    return NOT_MET if bound.value is None else bound.value


def draw(rows: Sequence[Mapping[str, object]], name: str, data: str) -> None:
    subtitle = f"Logistic regression on MNIST, {data}, λ = {DECAY:g}, θ = {THETA:g}"
    steps = [row["steps"] for row in rows]

    def column(key: str) -> list[float]:
        return [float("nan") if row[key] == NOT_MET else float(str(row[key])) for row in rows]

    with figure(9.6, 3.8, title="What a Newton step is known to reach", subtitle=subtitle, legend=True) as drawing:
        left, right = drawing.subplots(1, 2)
        for key, (label, colour, dashes, marker) in BOUNDS.items():
            left.plot(steps, column(key), color=colour, linestyle=dashes, marker=marker, markersize=4.5, label=label)
        left.plot(steps, column("distance"), color=BLUE, marker="o", markersize=5, label="True distance")
        left.set(yscale="log", ylabel="Distance to the minimiser")
        left.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        right.plot(steps, column("after step"), color=BLUE, marker="o", markersize=5, label="Accuracy without noise")
        right.plot(steps, column("released"), color="#000000", marker="*", markersize=7, label="Accuracy, released")
        right.set(ylabel="Test accuracy", ylim=(0, 1))
        for axes in (left, right):
            axes.set_xlabel("Newton steps, the last one whole")
            axes.grid(axis="y", color=GRID)
            axes.tick_params(labelcolor=INK)
        add_legend(drawing, [left, right])
        content = png(drawing)
    write_bytes_atomically(RESULTS / f"{name}.png", content)


if __name__ == "__main__":
    main()
