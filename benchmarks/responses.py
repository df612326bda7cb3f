"""Draw what the experts of pre-trained models respond to: a Mixer's images, a language model's tokens.

    python benchmarks/responses.py --runs DIR --images FOLDER

It reads the runs mnist-cp-seed0 and stdlib-cp-seed0 of pretraining.py. Everything shown is held-out: test images, and
tokens of modules of the standard library that were not trained on.
"""

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from harness import RESULTS, machine, print_table, write_report
from mxd.evaluation.drawing import figure, png
from mxd.multilinear.specialisation import STRONG
from mxd.pretraining.artifact import load_model
from mxd.pretraining.config import LanguageConfig
from mxd.pretraining.images import read_images, standardization_of
from mxd.pretraining.recipes import find_recipe
from mxd.pretraining.responses import gate_coefficients, token_use
from mxd.pretraining.tasks import read_language

IMAGES, SHOWN, EXPERTS = 2000, 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs of pretraining.py")
    parser.add_argument("--images", type=Path, required=True, help="folder of train.npz and test.npz")
    args = parser.parse_args()
    torch.set_num_threads(1)
    described = machine() | {"threads": 1}
    mixer = load_model(args.runs / "mnist-cp-seed0" / "model")
    images = read_images(args.images / "test.npz").images
    # A file may have them by class.
    test = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:IMAGES]]
    standardise = standardization_of(read_images(args.images / "train.npz"))
    found = gate_coefficients(mixer, (standardise(part) for part in test.split(250)))
    (RESULTS / "responses_mnist.png").write_bytes(draw_patches(found, test))
    tokens(args.runs / "stdlib-cp-seed0", described)


def draw_patches(found: dict[str, Tensor], test: Tensor) -> bytes:
    """For each layer, the experts whose use differs most from image to image, and random images that use them most."""
    layers = list(found)
    generator = torch.Generator().manual_seed(0)
    title = "What the experts of each layer of a Mixer respond to (MNIST, 16 CP experts)"
    subtitle = "test images of the top hundredth by mean coefficient; patches with a ≥ 0.5 in orange (across channels)"
    with figure(9.0, 0.62 * len(layers) * 2, title=title, subtitle=subtitle) as drawing:
        panels = drawing.subplots(len(layers) * 2, SHOWN * 2, squeeze=False, gridspec_kw={"hspace": 0.25})
        for place, layer in enumerate(layers):
            use = found[layer].mean(1)
            for number, expert in enumerate(use.std(0).topk(EXPERTS).indices.tolist()):
                best = use[:, expert].topk(max(SHOWN, len(use) // 100)).indices
                picked = best[torch.randperm(len(best), generator=generator)[:SHOWN]].tolist()
                row = panels[2 * place + number // 2]
                cells = row[SHOWN * (number % 2) :][:SHOWN]
                for cell, image in zip(cells, picked, strict=True):
                    strong = found[layer][image, :, expert] >= STRONG if "channels" in layer else None
                    draw_image(cell, test[image, 0], strong)
                # A title would make its column as wide as itself.
                label, place_of = f"{named(layer)}, expert {expert}", cells[0].transAxes
                cells[0].text(0, 1.06, label, transform=place_of, size=7).set_in_layout(False)
        return png(drawing)


def named(layer: str) -> str:
    """Return where a Mixer's layer is, in words."""
    _, block, module = layer.split(".")
    return f"block {block}, {'across patches' if module == 'mlp_tokens' else 'across channels'}"


def draw_image(cell: Any, image: Tensor, strong: Tensor | None) -> None:
    cell.imshow(image, cmap="gray_r")
    if strong is not None:
        side = int(strong.numel() ** 0.5)
        mask = strong.view(side, side).float().numpy()
        size = image.shape[0]
        cell.imshow(
            mask, cmap="Oranges", alpha=0.55 * mask, extent=(-0.5, size - 0.5, size - 0.5, -0.5), vmin=0, vmax=1.4
        )
    cell.set_xticks([])
    cell.set_yticks([])
    for spine in cell.spines.values():
        spine.set_visible(False)


def tokens(run: Path, described: dict[str, object]) -> None:
    model = load_model(run / "model")
    config = find_recipe("stdlib-cp")
    assert isinstance(config, LanguageConfig)
    data = read_language(config)
    contexts = data.held_out.contexts
    found = gate_coefficients(model, contexts.split(32))
    rows: list[dict[str, object]] = []
    for path, coefficients in found.items():
        uses = token_use(coefficients, contexts)
        busy = [use for use in uses if use.tokens]
        for use in busy[1 : 1 + EXPERTS]:
            words = [repr(cast(Any, data.tokenizer).decode([token])) for token, _ in use.most_frequent]
            rows.append(
                {
                    "layer": path.removeprefix("transformer.h.").removesuffix(".mlp"),
                    "experts with tokens": len(busy),
                    "expert": use.expert,
                    "tokens with a ≥ 0.5": use.tokens,
                    "share of tokens": use.tokens / contexts.numel(),
                    "most frequent": " ".join(word.replace("|", "\\|") for word in words),
                }
            )
    print_table(rows, "tokens")
    write_report("responses_stdlib", "Tokens that the experts of a GPT-2 respond to", rows, described, {})


if __name__ == "__main__":
    main()
