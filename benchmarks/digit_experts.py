"""Fine-tune a digit classifier whose wide layer is a mixture of experts, and see what the experts do.

    python benchmarks/digit_experts.py --images FOLDER --work DIR

A convolutional classifier is trained for two epochs. Then its layer 1024 → 1024 is replaced by a fresh one of as many
parameters (linear, CP or tensor ring; entmax or softmax gates; 4 … 512 experts) and the whole model is fine-tuned for
one epoch, always alike. Finished settings are kept in --work, so that it goes on where it was stopped.
"""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file

from digits import CLASSES, Classifier, Digits, accuracy, fit, load_digits, wide_inputs, wide_layer
from harness import machine, plain_log_ticks, print_table, write_report
from mxd.evaluation.drawing import add_legend, figure, png
from mxd.multilinear import GateName, Mixture
from mxd.multilinear.specialisation import STRONG, counterfactual_specialisation, expert_load

NUM_EXPERTS = (4, 8, 16, 32, 64, 128, 256, 512)
SOFTMAX_EXPERTS = (16, 64, 256)
BASE_EPOCHS, EPOCHS, LR = 2.0, 1.0, 1e-3
COUNTERFACTUAL_IMAGES = 4000
PICTURED = ("cp", 64, "entmax")
STYLES = {
    ("cp", "entmax"): ("CP, entmax", "#0072b2", "o"),
    ("tr", "entmax"): ("Tensor ring, entmax", "#d55e00", "s"),
    ("cp", "softmax"): ("CP, softmax", "#009e73", "^"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of train.npz and test.npz")
    parser.add_argument("--work", type=Path, required=True, help="folder of what is finished")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    described = machine()
    args.work.mkdir(parents=True, exist_ok=True)
    train, test = load_digits(args.images)
    base = trained_base(args.work / "base.safetensors", train)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for kind, num_experts, gate in settings():
            file = args.work / f"{kind}-{num_experts}-{gate}-seed{seed}.json"
            if not file.exists():
                picture = (
                    args.work / "inputs.safetensors" if seed == 0 and (kind, num_experts, gate) == PICTURED else None
                )
                found = measure(base, train, test, kind, num_experts, gate, seed, picture)
                file.write_text(json.dumps(found))
                print(found, flush=True)
            rows.append(json.loads(file.read_text()))
    base_accuracy = accuracy(base, test)
    report(rows, described | {"threads": 1}, base_accuracy, args.work / "inputs.safetensors", test)


def settings() -> list[tuple[str, int, GateName]]:
    entmax: list[tuple[str, int, GateName]] = [(kind, n, "entmax") for n in NUM_EXPERTS for kind in ("cp", "tr")]
    return [("linear", 1, "entmax"), *entmax, *(("cp", n, cast(GateName, "softmax")) for n in SOFTMAX_EXPERTS)]


def trained_base(file: Path, train: Digits) -> Classifier:
    torch.manual_seed(0)
    base = Classifier()
    if file.exists():
        base.load_state_dict(load_file(file))
    else:
        fit(base, train, epochs=BASE_EPOCHS, lr=LR, seed=0)
        save_file(base.state_dict(), file)
    return base


def measure(
    base: Classifier,
    train: Digits,
    test: Digits,
    kind: str,
    num_experts: int,
    gate: GateName,
    seed: int,
    picture: Path | None,
) -> dict[str, Any]:
    model = copy.deepcopy(base)
    model.wide = wide_layer(kind, num_experts, gate, seed + 1)
    parameters = sum(parameter.numel() for parameter in model.wide.parameters())
    fit(model, train, epochs=EPOCHS, lr=LR, seed=seed + 1)
    found: dict[str, Any] = {"kind": kind, "num_experts": num_experts, "gate": gate, "seed": seed}
    found |= {"parameters": parameters, "accuracy": accuracy(model, test)}
    if not isinstance(model.wide, Mixture):
        return found
    layer = model.wide
    x = wide_inputs(model, test.images)
    with torch.no_grad():
        coefficients = layer.gate(x)[0]
    load = expert_load(coefficients)
    few, labels = x[:COUNTERFACTUAL_IMAGES], test.labels[:COUNTERFACTUAL_IMAGES]
    effect = counterfactual_specialisation(
        lambda rows, given: model.after(layer(rows, [given])),
        few,
        coefficients[:COUNTERFACTUAL_IMAGES],
        labels,
        CLASSES,
    )
    if picture is not None:
        save_file({"coefficients": coefficients}, picture)
    return found | {
        "load": load.tolist(),
        "active": float((coefficients > 0).sum(1).float().mean()),
        "strong_inputs": float((coefficients.amax(1) >= STRONG).float().mean()),
        "polysemanticity": effect.probability.mean,
        "polysemanticity_accuracy": effect.accuracy.mean if bool(effect.accuracy.matters.any()) else None,
        "experts_that_matter": int(effect.probability.matters.sum()),
        "experts_that_decide": int(effect.accuracy.matters.sum()),
        "largest_accuracy_drop": float(effect.accuracy.drops.max()),
    }


def report(
    rows: Sequence[Mapping[str, Any]], described: Mapping[str, object], base: float, inputs: Path, test: Digits
) -> None:
    linear = fmean(row["accuracy"] for row in rows if row["kind"] == "linear")
    table: list[dict[str, object]] = []
    for kind, num_experts, gate in settings():
        same = [row for row in rows if (row["kind"], row["num_experts"], row["gate"]) == (kind, num_experts, gate)]
        mean = fmean(row["accuracy"] for row in same)
        line: dict[str, object] = {"layer": kind, "gate": "" if kind == "linear" else gate, "experts": num_experts}
        line |= {"parameters": same[0]["parameters"], "seeds": len(same), "accuracy %": f"{100 * mean:.2f}"}
        line |= {"against linear, points": f"{100 * (mean - linear):+.2f}"}
        for name, key in (
            ("polysemanticity", "polysemanticity"),
            ("experts that change a decision", "experts_that_decide"),
            ("active per image", "active"),
            ("images with a ≥ 0.5", "strong_inputs"),
        ):
            line[name] = "" if kind == "linear" else f"{fmean(row[key] for row in same):.3g}"
        line["experts used (a ≥ 0.5)"] = (
            "" if kind == "linear" else f"{fmean(sum(count > 0 for count in row['load']) for row in same):.3g}"
        )
        table.append(line)
    print_table(table, "experts")
    title = "Experts in the wide layer of a digit classifier"
    with figure(
        8.6, 3.2, title=title, subtitle="equal parameters; mean of seeds and each seed", legend=True
    ) as drawing:
        panels = drawing.subplots(1, 3)
        for (kind, gate), (name, colour, marker) in STYLES.items():
            chosen = [row for row in rows if (row["kind"], row["gate"]) == (kind, gate)]
            for panel, key, scale in ((panels[0], "accuracy", 100), (panels[1], "polysemanticity", 1)):
                draw(panel, chosen, key, scale, name, colour, marker)
        panels[0].axhline(100 * linear, color="#667080", linewidth=1, linestyle="--", label="Linear layer")
        panels[0].set_ylabel("test accuracy (%)")
        panels[1].set_ylabel("mean polysemanticity (probability)")
        for panel in panels[:2]:
            plain_log_ticks(panel, NUM_EXPERTS[::2])
            panel.set_xlabel("experts")
            panel.yaxis.grid(True)
        draw_load(panels[2], rows)
        add_legend(drawing, list(panels[:1]))
        details = {"base_accuracy": base, "counterfactual_images": COUNTERFACTUAL_IMAGES, "runs": list(rows)}
        write_report("experts_mnist", title, table, described, details, drawing)
    if inputs.exists():
        tensors = load_file(inputs)
        picture = draw_inputs(tensors["coefficients"], test)
        (Path(__file__).parent / "results" / "experts_mnist_inputs.png").write_bytes(picture)


def draw(
    panel: Any, rows: Sequence[Mapping[str, Any]], key: str, scale: float, name: str, colour: str, marker: str
) -> None:
    counts = sorted({row["num_experts"] for row in rows})
    means = [scale * fmean(row[key] for row in rows if row["num_experts"] == count) for count in counts]
    panel.plot(counts, means, color=colour, marker=marker, markersize=4, label=name)
    panel.scatter(
        [row["num_experts"] for row in rows], [scale * row[key] for row in rows], color=colour, s=7, alpha=0.5
    )


def draw_load(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """How many test images each expert of the pictured setting has for its own, the busiest first."""
    for (kind, gate), (_, colour, _) in STYLES.items():
        found = [row for row in rows if (row["kind"], row["gate"], row["num_experts"]) == (kind, gate, PICTURED[1])]
        if found:
            load = sorted(found[0]["load"], reverse=True)
            panel.step(range(1, len(load) + 1), load, color=colour, where="mid")
    panel.set_yscale("symlog", linthresh=1)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel(f"expert, by load ({PICTURED[1]} experts)")
    panel.set_ylabel("test images with a ≥ 0.5")


def draw_inputs(coefficients: torch.Tensor, test: Digits, experts: int = 12, shown: int = 10) -> bytes:
    """Random test images on which an expert has a coefficient of at least 0.5, for experts spread over the loads."""
    load = expert_load(coefficients)
    order = [n for n in load.argsort(descending=True).tolist() if load[n] >= shown]
    chosen = [
        order[place] for place in torch.linspace(0, len(order) - 1, min(experts, len(order))).round().int().tolist()
    ]
    generator = torch.Generator().manual_seed(0)
    title = f"What {PICTURED[1]} CP experts respond to"
    subtitle = "random test images with a ≥ 0.5; a row is an expert (and its number of such images), the busiest first"
    with figure(7.2, 0.52 * len(chosen), title=title, subtitle=subtitle) as drawing:
        panels = drawing.subplots(len(chosen), shown, squeeze=False)
        for row, expert in zip(panels, chosen, strict=True):
            own = (coefficients[:, expert] >= STRONG).nonzero()[:, 0]
            picked = own[torch.randperm(len(own), generator=generator)[:shown]]
            for panel, number in zip(row, picked.tolist(), strict=True):
                panel.imshow(test.images[number, 0], cmap="gray_r")
                panel.set_xticks([])
                panel.set_yticks([])
                for spine in panel.spines.values():
                    spine.set_visible(False)
            row[0].set_ylabel(f"{expert} ({len(own)})", rotation=0, ha="right", va="center")
        return png(drawing)


if __name__ == "__main__":
    main()
