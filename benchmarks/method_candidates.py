"""What was tried for a layer that is faithful and specialised at once: every candidate on one MLP, one after the other.

    python benchmarks/method_candidates.py --model DIR --text FILE --layer 2 --tokens 2M [--only wide-.1 transcoder]

DIR is stories260K (a Llama of 260 thousand parameters, MIT licence) in Hugging Face's layout, FILE a sample of
TinyStories; others will do. Candidates have the parameters of a transcoder of expansion 32, see the same batches, and
are judged on held-out text. A shared expert begins as the MLP, as wide, and learns at a quarter of the rate unless
`METHODS` says otherwise (`wide` is what the library trains); a number at the end of a name is the charge. Each result
is kept in a file at once: the same command goes on where it stopped. `shared` is the variance of what no latent carries
over the prediction's, `always-on` counts latents that fire on more than half of the held-out tokens, `dead` is the
share of those that never do, `seconds` those of training. `mxd`, `mxd-skip` and `mxd-h21` begin as in the paper, other
mixtures with the model's encoder. The file also says how many latents are active (`active`), k unless the selection
decides it.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from harness import RESULTS, machine, write_report
from method_layers import (
    BalancedTranscoder,
    BentTranscoder,
    ConfinedTranscoder,
    ConstantMixture,
    ContinuousTranscoder,
    MeanFreeMixture,
    NarrowMixture,
    SharedMixture,
    SkipMixture,
)
from method_training import Method, Task, train
from mxd.atomic import write_bytes_atomically, write_text_atomically
from mxd.cli.numbers import parse_count
from mxd.evaluation.drawing import MUTED, add_legend, figure, kind_style, png
from mxd.evaluation.faithfulness import model_losses, replacement
from mxd.evaluation.specialisation import specialisation
from mxd.layers import LAYERS, MixtureOfDecodersConfig, MlpWeights, SharedTranscoderConfig, SparseLayer
from mxd.layers.dense_encoder import dense_encoder
from mxd.layers.sizing import transcoder_budget
from mxd.metrics import error_sums
from mxd.models import mlp_weights
from mxd.quantities import compact

SMALLEST_DRAWN = 1e-4

SHARED, WIDE = Method(penalty=0.1), Method(penalty=0.15, width=4, shared_rate="full")
DRAWN = {kind: Method(layer=LAYERS[kind].layer, model_start=False) for kind in ("transcoder", "skip-transcoder", "mxd")}
MEAN_FREE = Method(layer=MeanFreeMixture)
METHODS: dict[str, Method] = {
    **DRAWN,
    "mxd-model": replace(DRAWN["mxd"], model_start=True),
    "mxd-h21": replace(DRAWN["mxd"], width=1 / 8),
    "mxd-skip": replace(DRAWN["mxd"], layer=SkipMixture),
    "mxd-skip-warm": Method(layer=SkipMixture),
    **{f"mxd-mean-free-{p}": replace(MEAN_FREE, mean_beside=True, penalty=float(p)) for p in (".15", "1")},
    "mxd-mean-held": replace(MEAN_FREE, mean_size=0.25),  # 1/√k
    **{f"shared-{penalty}": Method(penalty=float(penalty)) for penalty in (".03", ".1", ".3", "1")},
    "full-rate-.1": replace(SHARED, shared_rate="full"),
    "frozen-.1": replace(SHARED, shared_rate="frozen encoder"),
    **{f"width-x{width:g}-.1": replace(SHARED, width=width) for width in (0.25, 0.5)},
    **{f"width-x{width}-.1": replace(SHARED, width=width, shared_rate="full") for width in (2, 6)},
    **{f"wide-{p}": replace(WIDE, penalty=float(p)) for p in (".07", ".1", ".15", ".3")},
    **{f"wide-{rate}-.15": replace(WIDE, shared_rate=rate) for rate in ("quarter", "fourfold")},
    "wide-batch-topk-.15": replace(WIDE, selection="batch-topk"),
    "wide-auxiliary-.15": replace(WIDE, auxiliary=1 / 32),
    "wide-unlike-.15": replace(WIDE, unlike=0.01),  # As much as the error, after 200 thousand tokens of `wide-.15`.
    "wide-balanced-.15": replace(WIDE, layer=BalancedTranscoder),
    "mixture-.1": replace(SHARED, layer=SharedMixture),
    **{f"mixture-common-{p}": Method(layer=SharedMixture, penalty=float(p), common=True) for p in (".1", ".3")},
    **{f"narrow-{p}": Method(layer=NarrowMixture, penalty=float(p), own_width=1 / 8) for p in (".1", ".3")},
    "narrow-wide-.3": replace(WIDE, layer=NarrowMixture, penalty=0.3, own_width=1 / 8),
    **{f"bent-x{w:g}-.15": replace(WIDE, layer=BentTranscoder, own_width=w) for w in (0.05, 1 / 8, 3 / 8, 1)},
    "constant-common-.1": replace(SHARED, layer=ConstantMixture, common=True),
    "released-1": Method(penalty=1.0, released=0.8),
    "continuous-.1": replace(SHARED, layer=ContinuousTranscoder),
    **{f"confined-{number}": Method(layer=ConfinedTranscoder, directions=number) for number in (8, 16)},
    "fisher-.1": replace(SHARED, fisher=True),
    "annealed-k-.1": replace(SHARED, first_k=4),
    "kl-.3": Method(penalty=0.3, kl=1.0),
    **{f"kl-{kind}": replace(DRAWN[kind], kl=1.0) for kind in ("transcoder", "skip-transcoder")},
}


def narrowed(mlp: MlpWeights, config: SharedTranscoderConfig, x: Tensor) -> MlpWeights:
    """Return an MLP of the units that matter most on x, as many as the shared expert has at most."""
    encoder = dense_encoder(config.encoder, config.d_in, len(mlp.W_dec), config.activation, None)
    encoder.begin_from(mlp)
    importance = mlp.W_dec.norm(dim=1) * encoder(x).detach().square().mean(0).sqrt()
    chosen = importance.argsort(descending=True)[: config.d_hidden]
    encoder_weights = cast(Any, [None if weight is None else weight[..., chosen] for weight in mlp[:4]])
    return MlpWeights(*encoder_weights, W_dec=mlp.W_dec[chosen], b_dec=mlp.b_dec)


def build(method: Method, task: Task) -> SparseLayer:
    """Return the layer as it begins, with as many latents as a transcoder's parameters pay for."""
    planned = next(student for student in task.plan.students if student.kind == method.layer.kind)
    make, config, mlp = cast(Any, method.layer), planned.network, mlp_weights(task.site)
    if isinstance(config, SharedTranscoderConfig | MixtureOfDecodersConfig):
        if method.directions:
            principal = torch.linalg.eigh(task.target.T.cov()).eigenvectors[:, -method.directions :]
            make = partial(make, directions=principal.contiguous())
        if method.own_width:
            make = partial(make, units=int(method.own_width * task.site.d_hidden))
        if method.mean_size:
            make = partial(make, size=method.mean_size)
        changes: dict[str, Any] = {"d_hidden": int(method.width * task.site.d_hidden), "selection": method.selection}
        changes |= {"shared_expert": True} if method.mean_beside else {}
        latents = "num_latents" if isinstance(config, SharedTranscoderConfig) else "num_experts"
        few = replace(config, **changes, **{latents: 4 * task.k})
        with torch.device("meta"):
            layers = make(few), make(replace(few, **{latents: few.num_latents + 1}))
        size, larger = (sum(weight.numel() for weight in layer.parameters()) for layer in layers)
        more = round((transcoder_budget(config.d_in, config.d_out) - size) / (larger - size))
        config = replace(few, **{latents: few.num_latents + more})
    if isinstance(config, SharedTranscoderConfig):
        mlp = narrowed(mlp, config, task.x[:20_000])
    layer = cast(SparseLayer, make(config, torch.Generator().manual_seed(planned.seed)))
    if method.model_start:
        layer.begin_from(mlp)
    return layer


@torch.no_grad()
def judge(layer: SparseLayer, task: Task) -> dict[str, float | int]:
    """Return what the table says of a layer, on held-out text."""
    x, target = task.held_out
    code, base, dense = layer.encode(x), layer.base(x), layer.dense_branch(x)
    prediction, dense = layer.decode(x, code), torch.ones_like(base) if dense is None else dense
    varying, whole = ((rows - rows.mean(0)).double().square().sum().item() for rows in (base, prediction))
    fired = torch.bincount(code.indices[code.values > 0], minlength=layer.config.num_latents) / len(x)
    losses = model_losses(task.model, {"replaced": replacement(task.model, {task.layer: layer}, task.text)}, task.text)
    return {
        "fvu": error_sums(prediction, target).fvu,
        "ce_increase": losses["replaced"].ce - losses[""].ce,
        "specialisation": specialisation(prediction, dense, base).scalar_gain,
        "shared": varying / whole,
        "always-on": int((fired > 0.5).sum()),
        "dead": (fired == 0).double().mean().item(),
    }


def try_out(name: str, task: Task) -> dict[str, Any]:
    layer = build(METHODS[name], task)
    _ = METHODS[name].fisher and task.fisher_root  # Made before the clock starts.
    start = time.perf_counter()
    train(METHODS[name], layer, task)
    seconds = time.perf_counter() - start
    row = {"candidate": name, **judge(layer.eval(), task), "seconds": seconds}
    with torch.no_grad():
        active = (layer.encode(task.held_out[0]).values > 0).sum(-1).double().mean().item()
    parameters = sum(weight.numel() for weight in layer.parameters())
    return {"latents": layer.config.num_latents, "parameters": parameters, "active": active, "row": row}


def draw(rows: list[dict[str, Any]], subtitle: str) -> bytes:
    """Return the picture, where down is faithful and right is specialised; names keep clear of what is there."""
    with figure(11, 8, title="Faithful and specialised", subtitle=subtitle, legend=True) as drawing:
        axes = drawing.subplots()
        points = {row["candidate"]: (row["specialisation"], max(row["ce_increase"], SMALLEST_DRAWN)) for row in rows}
        for name, point in points.items():
            style = kind_style(METHODS[name].layer.kind)
            axes.plot(*point, linestyle="none", color=style.colour, marker=style.marker, label=style.name)
        axes.set(yscale="log", xlabel="Specialisation", ylabel="Cross-entropy increase (nats/token)")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid()
        axes.margins(x=0.12, y=0.06)
        add_legend(drawing, [axes])
        drawing.draw_without_rendering()
        centres = {name: axes.transData.transform(point) * 72 / drawing.dpi for name, point in points.items()}
        taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in centres.values()]
        for name, (x, y) in centres.items():
            width, line = 4.8 * len(name), {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5}
            spots = [(dx, dy) for dy in (-3, 6, -12, *range(15, 90, 9), *range(-93, -12, 9)) for dx in (6, -6 - width)]
            boxes = [(x + dx, y + dy, x + dx + width, y + dy + 8) for dx, dy in spots]
            hits = [sum(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken) for a in boxes]
            taken.append(boxes[best := hits.index(min(hits))])
            axes.annotate(name, points[name], spots[best], textcoords="offset points", size=8, arrowprops=line)
        return png(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    for name, count in {"layer": None, "tokens": 4_000_000, "batch-tokens": 4096, "k": 16, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=parse_count, default=count, required=count is None)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the report goes")
    parser.add_argument("--name", default="method_candidates", help="name of its files")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("only", "folder", "name")}
    settings |= {"model": Path(args.model).name, "text": [Path(name).name for name in args.text]}
    computer, kept, task = machine(), cast(Path, args.folder / f"{args.name}.jsonl"), None
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    results = {line["row"]["candidate"]: line for line in lines if line["settings"] == settings}
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if name not in results:
            task = task or Task(args, list(dict.fromkeys(method.layer.kind for method in METHODS.values())))
            results[name] = {"settings": settings, **try_out(name, task)}
            lines.append(results[name])
            write_text_atomically(kept, "".join(json.dumps(line) + "\n" for line in lines))
        print(json.dumps(results[name]["row"]), flush=True)
    rows = [results[name]["row"] for name in METHODS if name in results]
    subtitle = f"{Path(args.model).name}, layer {args.layer} · K = {args.k} · trained on {compact(args.tokens)} tokens"
    details = {"settings": settings, "candidates": list(results.values())}
    write_report(args.name, f"Faithful and specialised: {subtitle}", rows, computer, details, folder=args.folder)
    write_bytes_atomically(args.folder / f"{args.name}.png", draw(rows, subtitle))


if __name__ == "__main__":
    main()
