"""What was tried for a layer that is faithful and specialised at once: every candidate on one MLP, one after the other.

    python benchmarks/method_candidates.py --model DIR --text FILE --layer 2 --tokens 2M [--only wide-.1 transcoder]

DIR is stories260K (a Llama of 260 thousand parameters, MIT licence) in Hugging Face's layout, FILE a sample of
TinyStories; others will do. Candidates have the parameters of a transcoder of expansion 32, see the same batches, and
are judged on held-out text. A shared expert begins as the MLP, as wide, and learns at a quarter of the rate unless
`METHODS` says otherwise (`wide` is what the library trains); a number at the end of a name is the charge. Each result
is kept in a file at once: the same command goes on where it stopped. `shared` is the variance of what no latent carries
over the prediction's, `always-on` counts latents that fire on more than half of the held-out tokens, `dead` is the
share of those that never do, `seconds` those of training. `mxd` begins as in the paper.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from harness import RESULTS, machine, write_report
from method_layers import (
    BentTranscoder,
    ConfinedTranscoder,
    ConstantMixture,
    ContinuousTranscoder,
    NarrowMixture,
    SharedMixture,
)
from mxd.atomic import write_bytes_atomically, write_text_atomically
from mxd.cli.numbers import parse_count
from mxd.data.tokens import content_positions, held_out_contexts, special_tokens
from mxd.evaluation.drawing import MUTED, add_legend, figure, kind_style, png
from mxd.evaluation.faithfulness import EvaluationText, model_losses, replacement
from mxd.evaluation.specialisation import specialisation
from mxd.layers import LAYERS, MlpWeights, SharedTranscoder, SharedTranscoderConfig, SparseLayer
from mxd.layers.dense_encoder import dense_encoder
from mxd.layers.sizing import transcoder_budget
from mxd.losses import distillation_loss, shared_energy
from mxd.metrics import error_sums, kl_divergence
from mxd.models import capture_mlp, mlp_pairs, mlp_weights, replace_mlp, vocabulary_size
from mxd.quantities import compact
from mxd.training.config import TrainConfig
from mxd.training.decompose import make_plan
from mxd.training.optimizer import adamw, project_gradients_, renormalize_

STORED_TOKENS, HELD_OUT_TOKENS, FISHER_TOKENS = 830_000, 65_536, 60_000
FISHER_FLOOR, SMALLEST_DRAWN = 0.05, 1e-4
ANNEALED, THROUGH_MODEL = 0.5, 0.75  # Shares of training: until K is down; from which on the rest of the model counts.


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One candidate: a layer and how it learns; shares are of training."""

    layer: type[SparseLayer] = SharedTranscoder
    model_start: bool = True
    width: float = 1.0  # Hidden units over the model's own: its most important ones, or all of them and new ones.
    own_width: float = 0.0  # Hidden units of the experts' own, over the model's.
    directions: int = 0  # Those in which the target varies most, to which latents are confined.
    penalty: float = 0.0
    common: bool = False  # Whether the penalty is on the experts' best common direction too.
    released: float = 1.0  # Share from which on nothing is charged.
    shared_rate: Literal["quarter", "full", "frozen encoder"] = "quarter"
    fisher: bool = False
    first_k: int = 1  # Latents active at the beginning, over those active in the end.
    kl: float = 0.0  # Weight of KL(model ‖ model with the layer in it), towards the end.


SHARED, WIDE = Method(penalty=0.1), Method(penalty=0.15, width=4, shared_rate="full")
DRAWN = {kind: Method(layer=LAYERS[kind].layer, model_start=False) for kind in ("transcoder", "skip-transcoder", "mxd")}
METHODS: dict[str, Method] = {
    **DRAWN,
    "mxd-model": replace(DRAWN["mxd"], model_start=True),
    **{f"shared-{penalty}": Method(penalty=float(penalty)) for penalty in (".03", ".1", ".3", "1")},
    "full-rate-.1": replace(SHARED, shared_rate="full"),
    "frozen-.1": replace(SHARED, shared_rate="frozen encoder"),
    **{f"width-x{width:g}-.1": replace(SHARED, width=width) for width in (0.25, 0.5)},
    **{f"width-x{width}-.1": replace(SHARED, width=width, shared_rate="full") for width in (2, 6)},
    **{f"wide-{p}": replace(WIDE, penalty=float(p)) for p in (".07", ".1", ".15", ".3")},
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


class Task:
    """The MLP that every candidate learns: its activations, and held-out text."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = TrainConfig(
            **cast(Any, {name: getattr(args, name) for name in ("model", "tokens", "batch_tokens", "lr", "seed")}),
            layer=(args.layer,),
            k=(args.k,),
            text=tuple(args.text),
            kind=tuple(dict.fromkeys(method.layer.kind for method in METHODS.values())),
            schedule="linear",
            warmup_tokens=args.tokens // 25,  # As results/ had it, whatever `auto` is now.
            device="cpu",
            model_dtype="float32",
        )
        self.plan, self.layer, self.k, self.lr = make_plan(config), args.layer, args.k, args.lr
        self.model, self.site = cast(nn.Module, self.plan.language_model.model), self.plan.sites[args.layer]
        wanted = max(args.batch_tokens, min(args.tokens, STORED_TOKENS))
        self.contexts = self.plan.tokens.take(math.ceil(wanted / config.context))
        self.x, self.target = self._activations(self.contexts)
        tokenizer, sizes = self.plan.language_model.tokenizer, {"vocab_size": vocabulary_size(self.model)}
        sizes |= {"context": config.context, "num_tokens": HELD_OUT_TOKENS}
        held_out, documents = held_out_contexts(self.plan.text, tokenizer, **sizes)[:2]
        self.text = EvaluationText(contexts=held_out, documents=documents, special_ids=special_tokens(tokenizer))
        content = content_positions(held_out, self.text.special_ids).flatten()
        self.held_out = [rows[content] for rows in self._activations(held_out)]

    def _activations(self, contexts: Tensor) -> list[Tensor]:
        pairs = [mlp_pairs(self.model, some, [self.layer])[self.layer] for some in contexts.split(32)]
        return [torch.cat(tensors).flatten(0, 1) for tensors in zip(*pairs, strict=True)]

    @cached_property
    def fisher_root(self) -> Tensor:
        """R with R Rᵀ = E[g gᵀ], trace d: g is the gradient by the output of losses on what the model predicts."""
        generator = torch.Generator().manual_seed(self.plan.config.seed)
        products, context = torch.zeros(self.site.d_out, self.site.d_out), self.contexts.shape[1]
        tracked = replace_mlp(self.model, {self.layer: lambda x: self.site(x).requires_grad_()})
        with tracked, capture_mlp(self.model, [self.layer]) as pairs:
            for contexts in self.contexts[: math.ceil(FISHER_TOKENS / context)].split(32):
                logits = self.model(contexts, use_cache=False).logits.flatten(0, 1)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
                loss = functional.cross_entropy(logits, drawn, reduction="sum")
                gradient = torch.autograd.grad(loss, pairs[self.layer].target)[0].flatten(0, 1)
                products += gradient.T @ gradient
        scaled = products * (len(products) / products.trace())
        values, vectors = torch.linalg.eigh(torch.lerp(scaled, torch.eye(len(scaled)), FISHER_FLOOR))
        return vectors * values.clamp_min(0).sqrt()


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
    if isinstance(config, SharedTranscoderConfig):
        if method.directions:
            principal = torch.linalg.eigh(task.target.T.cov()).eigenvectors[:, -method.directions :]
            make = partial(make, directions=principal.contiguous())
        if method.own_width:
            make = partial(make, units=int(method.own_width * task.site.d_hidden))
        few = replace(config, d_hidden=int(method.width * task.site.d_hidden), num_latents=4 * task.k)
        with torch.device("meta"):
            layers = make(few), make(replace(few, num_latents=few.num_latents + 1))
        size, larger = (sum(weight.numel() for weight in layer.parameters()) for layer in layers)
        more = round((transcoder_budget(config.d_in, config.d_out) - size) / (larger - size))
        config = replace(few, num_latents=few.num_latents + more)
        mlp = narrowed(mlp, config, task.x[:20_000])
    layer = cast(SparseLayer, make(config, torch.Generator().manual_seed(planned.seed)))
    if method.model_start:
        layer.begin_from(mlp)
    return layer


def common_part(carried: Tensor, dense: Tensor, g: Tensor, tiny: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Return the best s_t (g ∘ q_t) in what experts carry, and g, a constant, by two rounds of least squares from g."""
    products, squares = (carried * dense).detach(), dense.detach().square()
    for _ in range(2):
        gains = products @ g / (squares @ g.square() + tiny)
        g = (gains @ products) / (gains.square() @ squares + tiny)
        # A decoder of zeros has no direction yet.
        g = g / g.norm() if g.norm() > tiny else torch.full_like(g, len(g) ** -0.5)
    gains = (carried * dense) @ g / (squares @ g.square() + tiny)
    return gains[:, None] * (g * dense), g


def shuffled(count: int, size: int, generator: Generator) -> Iterator[Tensor]:
    """Yield batches of numbers below `count` without end, each number at most once an epoch."""
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


def through_model(task: Task, layer: SparseLayer, contexts: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, base and what is carried at all tokens, and the model's KL divergence with the layer in it."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def stand_in(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        seen.append((rows, layer.base(rows), layer.carried(rows, layer.encode_at(rows, k))))
        return (seen[-1][1] + seen[-1][2]).view(x.shape)

    with torch.no_grad():
        reference = task.model(contexts, use_cache=False).logits
    with replace_mlp(task.model, {task.layer: stand_in}):
        logits = task.model(contexts, use_cache=False).logits
    return *seen.pop(), kl_divergence(reference, logits).mean()


def train(method: Method, layer: SparseLayer, task: Task) -> None:
    plan, k, lr, context = task.plan, task.k, task.lr, task.contexts.shape[1]
    if method.shared_rate == "frozen encoder":
        cast(SharedTranscoder, layer).encoder.requires_grad_(False)
    slow = ("encoder.", "W_shared") if isinstance(layer, SharedTranscoder) and method.shared_rate != "full" else ()
    named, tables = [pair for pair in layer.named_parameters() if pair[1].requires_grad], layer.unit_length_tables()
    groups = [(rate, [w for name, w in named if name.startswith(slow) == (rate < 1)]) for rate in (0.25, 1.0)]
    optimizers = [(rate, adamw(weights, lr, 0.0)) for rate, weights in groups if weights]
    generator, direction = torch.Generator().manual_seed(plan.config.seed), torch.ones(task.site.d_out)
    rows = shuffled(len(task.x), plan.config.batch_tokens, generator)
    contexts = shuffled(len(task.contexts), plan.config.batch_tokens // context, generator)
    for step in range(plan.steps):
        done = step / plan.steps
        active = max(k, round(k * (method.first_k - (method.first_k - 1) * done / ANNEALED)))
        if method.kl and done >= THROUGH_MODEL:
            chosen = next(contexts)
            target = task.target.unflatten(0, (-1, context))[chosen].flatten(0, 1)
            x, base, carried, divergence = through_model(task, layer, task.contexts[chosen], active)
            loss = method.kl * divergence
        else:
            chosen = next(rows)
            x, target, loss = task.x[chosen], task.target[chosen], torch.zeros(())
            base, carried = layer.base(x), layer.carried(x, layer.encode_at(x, active))
        error = base + carried - target
        loss = loss + distillation_loss(target + (error @ task.fisher_root if method.fisher else error), target)
        if method.penalty and done < method.released:
            if method.common:
                shared, direction = common_part(carried, cast(Tensor, layer.dense_branch(x)), direction)
                base = base + shared
            loss = loss + method.penalty * shared_energy(base, target)
        loss.backward()
        project_gradients_(tables)
        for rate, optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * plan.schedule.factor(step) * rate
            optimizer.step()
        layer.zero_grad(set_to_none=True)
        renormalize_(tables)


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
    row = {"candidate": name, **judge(layer, task), "seconds": seconds}
    return {"latents": layer.config.num_latents, "parameters": sum(w.numel() for w in layer.parameters()), "row": row}


def draw(rows: list[dict[str, Any]], subtitle: str) -> bytes:
    """Return the picture, where down is faithful and right is specialised; names keep clear of what is there."""
    with figure(9, 6, title="Faithful and specialised", subtitle=subtitle, legend=True) as drawing:
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
            task = task or Task(args)
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
