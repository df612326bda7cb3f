"""A certified Newton step on MNIST by logistic regression, and the privacy-utility bound against what is measured.

    python benchmarks/privacy_certificate.py --data FOLDER

The features are the first principal components of the retained training images' pixels in [0, 1] (mean taken off,
nothing whitened): `raw` as they are, `unit` scaled to length 1 image by image. 100 training images, drawn with seed
42, are protected. The pretrained model is the exact minimiser of cross-entropy with the same λ over all training images
(--images of them), the protected ones among them. ε = 1, δ = 1e-5; all in float64. `accuracy` is on the 10,000 test
images, `cd` the mean confidence distance on the protected ones; where noise is drawn, three seeds. `distance` is the
true one to the minimiser, which the certificate does not know.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness import RESULTS, machine, print_table, write_report
from mxd.atomic import write_bytes_atomically
from mxd.evaluation.drawing import GRID, INK, MUTED, add_legend, figure, png
from mxd.privacy.certify import CertifiedStep, CertifyConfig, certify_logistic, pretrain_logistic
from mxd.privacy.gaussian import add_noise
from mxd.privacy.logistic import LogisticObjective, with_constant
from mxd.privacy.measures import confidence_distances
from mxd.privacy.newton import minimise
from mxd.privacy.objective import accuracy_loss, uniformity_loss
from mxd.privacy.utility_bound import largest_confidence_distance

EPSILON, DELTA, NUM_PROTECTED, SEED, NOISE_SEEDS = 1.0, 1e-5, 100, 42, (0, 1, 2)
CURVE_THETAS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
TABLE_THETAS = (0.05, 0.25, 0.5, 0.75, 0.95)
CURVE_DECAY, SHOWN_THETA = 1e-2, 0.75
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"


class Images(NamedTuple):
    """Features of three sets."""

    protected: Tensor
    protected_labels: Tensor
    retained: Tensor
    retained_labels: Tensor
    test: Tensor
    test_labels: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz")
    parser.add_argument("--dimensions", type=int, default=50, help="principal components")
    parser.add_argument("--images", type=int, default=60_000, help="training images, the protected ones among them")
    parser.add_argument("--name", default="privacy_certificate", help="name of the files in benchmarks/results")
    args = parser.parse_args()
    described = machine()
    raw = read_images(args.data, args.dimensions, args.images)
    rows: list[dict[str, object]] = []
    certificates: list[object] = []
    curve: list[dict[str, float]] = []
    for features, decays in (("raw", (CURVE_DECAY, 1e-3)), ("unit", (1e-1, 1e-2))):
        images = raw if features == "raw" else unit_length(raw)
        for decay in decays:
            everything = torch.cat([images.protected, images.retained])
            labels = torch.cat([images.protected_labels, images.retained_labels])
            pretrained = pretrain_logistic(everything, labels, num_classes=10, weight_decay=decay)
            drawn = features == "raw" and decay == CURVE_DECAY
            for theta in CURVE_THETAS if drawn else TABLE_THETAS:
                exact: Tensor | None = None
                for warm_up in (20, 0):
                    step = certify(images, pretrained, theta=theta, decay=decay, warm_up=warm_up)
                    problem = problem_of(images, step, theta, decay)
                    exact = minimise(problem, step.stepped.flatten()) if exact is None else exact
                    if theta in TABLE_THETAS:
                        about = {"features": features, "λ": decay, "θ": theta, "warm-up": warm_up}
                        rows.append(about | line(images, step, exact))
                        if drawn and theta == SHOWN_THETA:
                            certificates.append(about | {"certificate": step.certificate.to_json()})
                        print(rows[-1], flush=True)
                    if drawn and warm_up:
                        curve.append(point(images, problem, step, exact, theta))
    print_table(rows, "certified Newton step")
    details = {
        "data": "MNIST",
        "dimensions": args.dimensions,
        "training_images": args.images,
        "epsilon": EPSILON,
        "delta": DELTA,
        "protected": NUM_PROTECTED,
        "seed": SEED,
        "noise_seeds": NOISE_SEEDS,
        "bound_against_measurement": curve,
        "certificates": certificates,
    }
    write_report(args.name, "Certified Newton step: logistic regression on MNIST", rows, described, details)
    draw(curve, args.name, f"{args.images:,} training images ({NUM_PROTECTED} protected), {args.dimensions} components")


def read_images(folder: Path, dimensions: int, count: int) -> Images:
    pixels: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    for split in ("train", "test"):
        with np.load(folder / f"{split}.npz", allow_pickle=False) as arrays:
            pixels[split] = torch.from_numpy(arrays["images"]).flatten(1).double() / 255
            labels[split] = torch.from_numpy(arrays["labels"]).long()
    order = torch.randperm(len(pixels["train"]), generator=torch.Generator().manual_seed(SEED))
    protected, retained = order[:NUM_PROTECTED], order[NUM_PROTECTED:count]
    mean = pixels["train"][retained].mean(0)
    centred = pixels["train"][retained] - mean
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -dimensions:]
    train, test = (pixels["train"] - mean) @ axes, (pixels["test"] - mean) @ axes
    known = labels["train"]
    return Images(train[protected], known[protected], train[retained], known[retained], test, labels["test"])


def unit_length(images: Images) -> Images:
    scaled = {
        name: rows / rows.norm(dim=1, keepdim=True)
        for name, rows in images._asdict().items()
        if not name.endswith("labels")
    }
    return images._replace(**scaled)


def certify(images: Images, pretrained: Tensor, *, theta: float, decay: float, warm_up: int) -> CertifiedStep:
    config = CertifyConfig(theta=theta, weight_decay=decay, epsilon=EPSILON, delta=DELTA, warm_up=warm_up)
    return certify_logistic(
        images.protected, images.retained, images.retained_labels, config, num_classes=10, pretrained=pretrained
    )


def problem_of(images: Images, step: CertifiedStep, theta: float, decay: float) -> LogisticObjective:
    return LogisticObjective(
        protected=with_constant(images.protected),
        retained=with_constant(images.retained),
        labels=images.retained_labels,
        num_classes=step.stepped.shape[1],
        config=CertifyConfig(theta=theta, weight_decay=decay).objective,
    )


def line(images: Images, step: CertifiedStep, exact: Tensor) -> dict[str, object]:
    certificate = step.certificate
    assert certificate.sigma is not None, certificate.statement()
    noisy = [add_noise(step.stepped, certificate.sigma, seed=seed) for seed in NOISE_SEEDS]
    accuracies, distances = [accuracy(images, W) for W in noisy], [given_away(images, W) for W in noisy]
    return {
        "a priori Δ": certificate.bounds["a priori, ball"].value,
        "Δ": certificate.sensitivity,
        "distance": float((step.stepped.flatten() - exact).norm()),
        "σ": certificate.sigma,
        "accuracy before": accuracy(images, step.pretrained),
        "after step": accuracy(images, step.stepped),
        "released": fmean(accuracies),
        "± seeds": stdev(accuracies),
        "cd before": given_away(images, step.pretrained),
        "cd after step": given_away(images, step.stepped),
        "cd released": fmean(distances),
        "cd ± seeds": stdev(distances),
    }


def point(
    images: Images, problem: LogisticObjective, step: CertifiedStep, exact: Tensor, theta: float
) -> dict[str, float]:
    W = problem.matrix(exact)
    loss = float(accuracy_loss(problem.retained @ W, problem.labels))
    uniform = float(uniformity_loss(problem.protected @ W, "kl-u-p"))
    return {
        "theta": theta,
        "rise": loss - step.utility.reference,
        "stability": step.utility.stability,
        "scaling": step.utility.scaling,
        "lower": step.utility.lower,
        "upper": step.utility.upper,
        "confidence_distance": given_away(images, W),
        "confidence_distance_before": given_away(images, step.pretrained),
        "confidence_distance_bound": step.utility.confidence_distance,
        "confidence_distance_from_theta": largest_confidence_distance((1 - theta) / theta * math.log(10), "kl-u-p", 10),
        "uniformity": uniform,
        "uniformity_bound": step.utility.uniformity,
    }


def accuracy(images: Images, W: Tensor) -> float:
    return float(((with_constant(images.test) @ W).argmax(1) == images.test_labels).double().mean())


def given_away(images: Images, W: Tensor) -> float:
    return float(confidence_distances(with_constant(images.protected) @ W).mean())


def draw(curve: Sequence[Mapping[str, float]], name: str, data: str) -> None:
    def column(key: str) -> list[float]:
        return [found[key] for found in curve]

    thetas = column("theta")
    subtitle = f"Logistic regression on MNIST, {data}, λ = {CURVE_DECAY:g}"
    with figure(9.6, 3.6, title="What is proved, and what is measured", subtitle=subtitle, legend=True) as drawing:
        left, right = drawing.subplots(1, 2)
        left.plot(thetas, column("upper"), color=ORANGE, marker="s", markersize=4.5, label="Proved: at most")
        left.plot(thetas, column("rise"), color=BLUE, marker="o", markersize=4.5, label="Measured")
        left.set(ylabel="Rise of retained cross-entropy (nats)", ylim=(0, None))
        right.plot(thetas, column("confidence_distance_bound"), color=ORANGE, marker="s", markersize=4.5)
        right.plot(
            thetas,
            column("confidence_distance_from_theta"),
            color=GREEN,
            linestyle="--",
            label="Proved from θ alone, any model",
        )
        right.plot(thetas, column("confidence_distance"), color=BLUE, marker="o", markersize=4.5)
        right.axhline(curve[0]["confidence_distance_before"], color=MUTED, linestyle=":", label="Pretrained")
        right.set(ylabel="Confidence distance, protected", ylim=(0, 0.95))
        for axes in (left, right):
            axes.set_xlabel("θ")
            axes.grid(axis="y", color=GRID)
            axes.tick_params(labelcolor=INK)
        add_legend(drawing, [left, right])
        content = png(drawing)
    write_bytes_atomically(RESULTS / f"{name}.png", content)


if __name__ == "__main__":
    main()
