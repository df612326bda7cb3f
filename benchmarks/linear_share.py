"""How much of an MLP is a linear map of its input: why a skip transcoder does well where it does.

    python benchmarks/linear_share.py --model stories260K --text tinystories_2MB_cased.txt --tokens 500K \
        --beside all_layers_stories260K --name linear_share_stories260K

For each layer, the best linear map with a constant (least squares over the training text) from what the MLP reads to
what it writes, and its fvu on held-out text. Beside it stand the fvu of kinds of layer, from a table of
`all_layers.py`, and the ratio of the mixture of decoders' to the skip transcoder's.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness import RESULTS, machine, print_table, write_report
from mxd.bundled import held_out_modules
from mxd.cli.numbers import parse_count
from mxd.data.text import open_text
from mxd.data.tokens import content_positions, held_out_contexts, special_tokens
from mxd.evaluation.drawing import GRID, MUTED, add_legend, figure, kind_style
from mxd.models import mlp_pairs, vocabulary_size
from mxd.training.config import TrainConfig
from mxd.training.decompose import make_plan
from mxd.training.plan import Plan
from mxd.training.streams import FORWARD_TOKENS

KINDS = ("mxd", "skip-transcoder", "transcoder")


class Moments:
    """Sums from which the best linear map and its error follow."""

    def __init__(self, d_in: int, d_out: int) -> None:
        self.xx = torch.zeros(d_in + 1, d_in + 1, dtype=torch.float64)
        self.xy = torch.zeros(d_in + 1, d_out, dtype=torch.float64)
        self.y = torch.zeros(d_out, dtype=torch.float64)
        self.yy = 0.0
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = torch.cat([x, x.new_ones(len(x), 1)], 1).double(), y.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.y += y.sum(0)
        self.yy += float(y.square().sum())
        self.count += len(y)

    def best_map(self) -> Tensor:
        return torch.linalg.lstsq(self.xx, self.xy, driver="gelsd").solution

    def fvu(self, weights: Tensor) -> float:
        error = self.yy - 2 * float((weights * self.xy).sum()) + float((weights * (self.xx @ weights)).sum())
        return error / (self.yy - float(self.y.square().sum()) / self.count)


class Share(NamedTuple):
    """One layer."""

    layer: int
    linear: float
    """The fvu of the best linear map."""
    kinds: dict[tuple[str, int], float]
    """The fvu of other students, by kind and K."""


def moments(plan: Plan, contexts: Tensor) -> dict[int, Moments]:
    model, special = plan.language_model.model, special_tokens(plan.language_model.tokenizer)
    found = {layer: Moments(site.d_in, site.d_out) for layer, site in plan.sites.items()}
    for ids in contexts.split(FORWARD_TOKENS // plan.config.context):
        content = content_positions(ids, special)
        with torch.no_grad():
            for layer, pair in mlp_pairs(model, ids, list(found)).items():
                found[layer].add(pair.x[content], pair.target[content])
    return found


def shares(plan: Plan, beside: Sequence[dict[str, object]]) -> list[Share]:
    config, language = plan.config, plan.language_model
    source = open_text(config.text, held_out_modules=held_out_modules())
    held_out = held_out_contexts(
        source,
        language.tokenizer,
        context=config.context,
        num_tokens=config.eval_tokens,
        vocab_size=vocabulary_size(language.model),
    )
    learnt = moments(plan, plan.tokens.take(config.tokens // config.context))
    tested = moments(plan, held_out.contexts)
    return [
        Share(
            layer,
            tested[layer].fvu(learnt[layer].best_map()),
            {(str(s["kind"]), int(str(s["k"]))): float(str(s["fvu"])) for s in beside if s["layer"] == layer},
        )
        for layer in learnt
    ]


def draw(found: Sequence[Share], subtitle: str) -> Figure:
    with figure(6.4, 3.6, title="How much of an MLP is linear", subtitle=subtitle, legend=True) as drawing:
        axes = drawing.subplots()
        places = range(len(found))
        axes.bar(places, [share.linear for share in found], width=0.7, color=GRID, label="best linear map")
        for kind in KINDS:
            style = kind_style(kind)
            points = [
                (place, k, fvu)
                for place, share in enumerate(found)
                for (name, k), fvu in share.kinds.items()
                if name == kind
            ]
            ks = sorted({k for _, k, _ in points})
            for index, k in enumerate(ks):
                own = [(place, fvu) for place, its_k, fvu in points if its_k == k]
                offset = 0.5 * (index - (len(ks) - 1) / 2) / len(ks)
                axes.plot(
                    [place + offset for place, _ in own],
                    [fvu for _, fvu in own],
                    style.marker,
                    color=style.colour,
                    ms=4,
                    label=style.name if index == 0 else None,
                )
        axes.set_xticks(list(places), [str(share.layer) for share in found])
        axes.set_xlabel("layer (points from left to right: K rising)", color=MUTED)
        axes.set_ylabel("fvu on held-out text", color=MUTED)
        axes.set_ylim(0, 1)
        axes.grid(axis="y", color=GRID)
        add_legend(drawing, [axes])
        return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", type=parse_count, default=500_000)
    parser.add_argument("--eval-tokens", type=parse_count, default=65_536)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--beside", required=True, help="name of all_layers.py's files in benchmarks/results")
    parser.add_argument("--name", required=True, help="name of the files in benchmarks/results")
    args = parser.parse_args()
    described = machine()
    beside = json.loads((RESULTS / f"{args.beside}.json").read_text())["students"]
    layers = tuple(sorted({int(student["layer"]) for student in beside if student["layer"] is not None}))
    config = TrainConfig(
        model=args.model,
        text=tuple(args.text),
        layer=layers,
        tokens=args.tokens,
        eval_tokens=args.eval_tokens,
        model_dtype="float32",
        threads=args.threads,
    )
    found = shares(make_plan(config), beside)
    rows: list[dict[str, object]] = []
    for share in found:
        for k in sorted({k for _, k in share.kinds}):
            row: dict[str, object] = {"layer": share.layer, "K": k, "best linear map": share.linear}
            row |= {kind_style(kind).name: share.kinds[kind, k] for kind in KINDS}
            row["MxD / skip transcoder"] = share.kinds["mxd", k] / share.kinds["skip-transcoder", k]
            rows.append(row)
    model = Path(args.model).name
    print_table(rows, args.name)
    title = f"The best linear map beside sparse layers, fvu: {model}, {args.tokens:,} tokens"
    write_report(
        args.name, title, rows, described, {"beside": args.beside}, draw(found, f"{model}; fvu, means of seeds")
    )


if __name__ == "__main__":
    main()
