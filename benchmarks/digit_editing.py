"""Plant a spurious attribute in MNIST, find the expert that carries it, and take it out without training.

    python benchmarks/digit_editing.py --images FOLDER --work DIR

A corner patch is put on 90 % of the training 3s and on nothing else. The wide layer of a classifier that was trained on
clean digits is replaced by a mixture of 8 experts and fine-tuned on the planted digits, with the convolutions before it
fixed or trained too. The expert whose mean coefficient rises most when the patch is put on held-back training images is
the one that is edited. How strongly (factor and threshold) is chosen on the held-back images: the least damage, where
overall accuracy falls by at most half a point and no group below what the worst group had. Groups are (digit, patch or
none), and every image is in two of them; damage is the most that the patch costs a digit. Test images are looked at
once, at the end.
"""

import argparse
import copy
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from digit_experts import trained_base
from digits import CLASSES, Classifier, Digits, fit, load_digits, wide_inputs, wide_layer
from harness import machine, print_table, write_report
from mxd.evaluation.drawing import add_legend, figure
from mxd.multilinear import Mixture
from mxd.multilinear.editing import ExpertEdit

DIGIT, SHARE, NUM_EXPERTS = 3, 0.9, 8
HELD_BACK = 5000
LR, EPOCHS = 1e-3, 1.0
FACTORS, THRESHOLDS = (0.0, 0.25, 0.5, 0.75), (0.0, 0.2, 0.4)
MOST_LOST = 0.005
EDITS = ("none", "switched off", "chosen")


class Groups(NamedTuple):
    """Accuracy of each digit without and with the patch, and of the digits as they were planted."""

    plain: Tensor
    patched: Tensor
    overall: float
    taken_for: float
    """Share of patched images of other digits that are taken for the planted one."""

    @property
    def worst(self) -> float:
        return float(torch.cat([self.plain, self.patched]).min())

    @property
    def damage(self) -> float:
        """The most that the patch costs a digit."""
        return float((self.plain - self.patched).max())

    @property
    def opportunity(self) -> float:
        """How unequally the planted digit is found with and without the patch."""
        return float((self.patched - self.plain)[DIGIT].abs())


class Seen(NamedTuple):
    """What the mixture reads of some images without and with the patch, and its own coefficients."""

    inputs: tuple[Tensor, Tensor]
    coefficients: tuple[Tensor, Tensor]
    labels: Tensor
    has_patch: Tensor
    """Which images have the patch where the digits are as they were planted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of train.npz and test.npz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the classifier that is trained first")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    described = machine()
    args.work.mkdir(parents=True, exist_ok=True)
    train, test = load_digits(args.images)
    base = trained_base(args.work / "base.safetensors", train)
    rows: list[dict[str, object]] = []
    pictures: dict[str, list[Groups]] = {}
    for kind, fixed in (("cp", True), ("tr", True), ("cp", False)):
        found: dict[str, list[Groups]] = {name: [] for name in EDITS}
        for seed in range(args.seeds):
            for name, groups in one_run(base, train, test, kind, fixed, seed).items():
                found[name].append(groups)
            print(kind, fixed, seed, {name: round(runs[-1].worst, 3) for name, runs in found.items()}, flush=True)
        rows += [line(kind, fixed, name, runs, found["none"]) for name, runs in found.items()]
        if (kind, fixed) == ("cp", True):
            pictures = found
    print_table(rows, "editing")
    title = "Taking a planted attribute out of a classifier"
    subtitle = (
        f"accuracy of each digit when the patch of the {DIGIT}s is on it; CP, 8 experts, mean of {args.seeds} seeds"
    )
    with figure(6.4, 3.2, title=title, subtitle=subtitle, legend=True) as drawing:
        panel = drawing.subplots()
        bars = (("without the patch", "none", "plain", "#b8c0cc"), ("patch", "none", "patched", "#d55e00"))
        bars += (("patch, its expert edited", "chosen", "patched", "#0072b2"),)
        for place, (label, edit, which, colour) in enumerate(bars):
            heights = torch.stack([getattr(groups, which) for groups in pictures[edit]]).mean(0)
            at = [digit + 0.27 * (place - 1) for digit in range(CLASSES)]
            panel.bar(at, [100 * height for height in heights.tolist()], width=0.25, color=colour, label=label)
        panel.set_xticks(range(CLASSES))
        panel.set_xlabel("digit")
        panel.set_ylabel("accuracy (%)")
        panel.yaxis.grid(True)
        add_legend(drawing, [panel])
        details = {"digit": DIGIT, "share": SHARE, "experts": NUM_EXPERTS, "held_back": HELD_BACK}
        write_report("editing_mnist", title, rows, described | {"threads": 1}, details, drawing)


def patched(images: Tensor) -> Tensor:
    """Return the images with a white patch of 4 × 4 in the upper left corner."""
    with_patch = images.clone()
    with_patch[:, :, 1:5, 1:5] = images.max()
    return with_patch


def planted(data: Digits, seed: int) -> Digits:
    chosen = (data.labels == DIGIT) & (
        torch.rand(len(data.labels), generator=torch.Generator().manual_seed(seed)) < SHARE
    )
    return Digits(torch.where(chosen[:, None, None, None], patched(data.images), data.images), data.labels)


def one_run(base: Classifier, train: Digits, test: Digits, kind: str, fixed: bool, seed: int) -> dict[str, Groups]:
    model = copy.deepcopy(base)
    model.wide = wide_layer(kind, NUM_EXPERTS, "entmax", seed + 1)
    for parameter in model.trunk.parameters():
        parameter.requires_grad_(not fixed)
    kept = Digits(train.images[HELD_BACK:], train.labels[HELD_BACK:])
    fit(model, planted(kept, 5), epochs=EPOCHS, lr=LR, seed=seed + 1)
    held_back = look(model, Digits(train.images[:HELD_BACK], train.labels[:HELD_BACK]))
    plain, with_patch = held_back.coefficients
    expert = int((with_patch - plain).mean(0).argmax())
    chosen = best_edit(model, held_back, expert)
    seen = look(model, test)
    off = ExpertEdit(expert=expert, renormalize=True)
    print(kind, fixed, seed, chosen, flush=True)
    edits = {"none": None, "switched off": off, "chosen": chosen}
    return {name: groups_of(model, seen, edit) for name, edit in edits.items()}


def best_edit(model: Classifier, held_back: Seen, expert: int) -> ExpertEdit | None:
    """Return the edit that leaves the least damage, among those that cost little and make no group the new worst."""
    before = groups_of(model, held_back, None)
    best, chosen = before.damage, None
    for factor in FACTORS:
        for threshold in THRESHOLDS:
            edit = ExpertEdit(expert=expert, factor=factor, threshold=threshold, renormalize=True)
            groups = groups_of(model, held_back, edit)
            is_cheap = groups.overall >= before.overall - MOST_LOST and groups.worst >= before.worst
            if is_cheap and groups.damage < best:
                best, chosen = groups.damage, edit
    return chosen


@torch.no_grad()
def look(model: Classifier, data: Digits) -> Seen:
    assert isinstance(model.wide, Mixture)
    inputs = wide_inputs(model, data.images), wide_inputs(model, patched(data.images))
    gates = model.wide.gate(inputs[0])[0], model.wide.gate(inputs[1])[0]
    has_patch = planted(data, 6).images.ne(data.images).flatten(1).any(1)
    return Seen(inputs, gates, data.labels, has_patch)


@torch.no_grad()
def groups_of(model: Classifier, seen: Seen, edit: ExpertEdit | None) -> Groups:
    classes: list[Tensor] = []
    for x, coefficients in zip(seen.inputs, seen.coefficients, strict=True):
        used = coefficients if edit is None else edit.apply(coefficients)
        classes.append(model.after(model.wide(x, [used])).argmax(1))
    right = [found.eq(seen.labels) for found in classes]
    by_digit = [torch.stack([part[seen.labels == d].float().mean() for d in range(CLASSES)]) for part in right]
    overall = torch.where(seen.has_patch, right[1], right[0]).float().mean()
    others = classes[1][seen.labels != DIGIT]
    return Groups(by_digit[0], by_digit[1], float(overall), float(others.eq(DIGIT).float().mean()))


def line(kind: str, fixed: bool, name: str, runs: list[Groups], before: list[Groups]) -> dict[str, object]:
    fallen = fmean(1 - run.damage / old.damage for run, old in zip(runs, before, strict=True))
    return {
        "experts": kind,
        "convolutions": "fixed" if fixed else "trained too",
        "its expert": name,
        "seeds": len(runs),
        "overall %": f"{100 * fmean(run.overall for run in runs):.2f}",
        "worst group %": f"{100 * fmean(run.worst for run in runs):.1f}",
        "worst seed's worst group %": f"{100 * min(run.worst for run in runs):.1f}",
        "damage, points": f"{100 * fmean(run.damage for run in runs):.1f}",
        "damage fallen by %": "" if name == "none" else f"{100 * fallen:.0f}",
        "patched others taken for it %": f"{100 * fmean(run.taken_for for run in runs):.1f}",
        "unequal opportunity, points": f"{100 * fmean(run.opportunity for run in runs):.1f}",
    }


if __name__ == "__main__":
    main()
