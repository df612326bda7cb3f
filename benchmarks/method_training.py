"""How the candidates of `method_candidates.py` learn: what may differ between them, what they learn, and the loop."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from method_layers import Adapting, likeness
from mxd.data.tokens import content_positions, held_out_contexts, special_tokens
from mxd.evaluation.faithfulness import EvaluationText
from mxd.layers import SharedTranscoder, SparseCode, SparseLayer
from mxd.layers.selection import SelectionName
from mxd.losses import distillation_loss, shared_energy
from mxd.metrics import kl_divergence
from mxd.models import capture_mlp, mlp_pairs, replace_mlp, vocabulary_size
from mxd.training.config import TrainConfig
from mxd.training.decompose import make_plan
from mxd.training.optimizer import adamw, project_gradients_, renormalize_
from mxd.training.student import Student, StudentConfig

STORED_TOKENS, HELD_OUT_TOKENS, FISHER_TOKENS = 830_000, 65_536, 60_000
FISHER_FLOOR = 0.05
ANNEALED, THROUGH_MODEL = 0.5, 0.75  # Shares of training: until K is down; from which on the rest of the model counts.
SHARED_RATES = {"quarter": 0.25, "full": 1.0, "fourfold": 4.0, "frozen encoder": 0.25}
DEAD_TOKENS = 100_000  # Those without firing after which a latent is dead; the library's million is half of such a run.


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
    shared_rate: Literal["quarter", "full", "fourfold", "frozen encoder"] = "quarter"  # Over that of the latents.
    selection: SelectionName = "topk"
    auxiliary: float = 0.0  # Weight of the loss that revives dead latents.
    unlike: float = 0.0  # Charge for the likeness of the rows that fire together.
    mean_beside: bool = False  # Whether a mean-free mixture has a shared expert that may learn the mean.
    mean_size: float = 0.0  # Or the size at which the mean is held.
    fisher: bool = False
    first_k: int = 1  # Latents active at the beginning, over those active in the end.
    kl: float = 0.0  # Weight of KL(model ‖ model with the layer in it), towards the end.


class Task:
    """The MLP that every candidate learns: its activations, and held-out text."""

    def __init__(self, args: argparse.Namespace, kinds: Sequence[str]) -> None:
        config = TrainConfig(
            **cast(Any, {name: getattr(args, name) for name in ("model", "tokens", "batch_tokens", "lr", "seed")}),
            layer=(args.layer,),
            k=(args.k,),
            text=tuple(args.text),
            kind=tuple(kinds),
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


def through_model(
    task: Task, layer: SparseLayer, contexts: Tensor, k: int
) -> tuple[Tensor, SparseCode, Tensor, Tensor, Tensor]:
    """Return x, code, base and what is carried at all tokens, and the model's KL divergence with the layer in it."""
    seen: list[tuple[Tensor, SparseCode, Tensor, Tensor]] = []

    def stand_in(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        base, code = layer.base(rows), layer.encode_at(rows, k)
        carried = layer.carried(rows, code)
        seen.append((rows, code, base, carried))
        return (base + carried).view(x.shape)

    with torch.no_grad():
        reference = task.model(contexts, use_cache=False).logits
    with replace_mlp(task.model, {task.layer: stand_in}):
        logits = task.model(contexts, use_cache=False).logits
    return *seen.pop(), kl_divergence(reference, logits).mean()


def train_as_student(method: Method, layer: SparseLayer, task: Task) -> None:
    """Train on the same batches with the library's own step, which has the loss that revives dead latents."""
    plan, batch_tokens = task.plan, task.plan.config.batch_tokens
    config = StudentConfig(
        lr=task.lr, shared_penalty=method.penalty, aux_coefficient=method.auxiliary, dead_tokens=DEAD_TOKENS
    )
    student = Student(layer.kind, task.layer, layer, config)
    generator, content = torch.Generator().manual_seed(plan.config.seed), torch.ones(batch_tokens, dtype=torch.bool)
    rows = shuffled(len(task.x), batch_tokens, generator)
    for step in range(plan.steps):
        chosen, factor = next(rows), plan.schedule.factor(step)
        student.step(step, task.x[chosen], task.target[chosen], content, lr_factor=factor, autocast=None)


def train(method: Method, layer: SparseLayer, task: Task) -> None:
    if method.auxiliary:
        train_as_student(method, layer, task)
        return
    plan, k, lr, context = task.plan, task.k, task.lr, task.contexts.shape[1]
    if method.shared_rate == "frozen encoder":
        cast(SharedTranscoder, layer).encoder.requires_grad_(False)
    shared_rate = SHARED_RATES[method.shared_rate]
    apart = ("encoder.", "W_shared") if isinstance(layer, SharedTranscoder) and shared_rate != 1 else ()
    named, tables = [pair for pair in layer.named_parameters() if pair[1].requires_grad], layer.unit_length_tables()
    groups = {shared_rate: [w for name, w in named if name.startswith(apart)]} if apart else {}
    groups[1.0] = [w for name, w in named if not name.startswith(apart)]
    optimizers = [(rate, adamw(weights, lr, 0.0)) for rate, weights in groups.items()]
    generator, direction = torch.Generator().manual_seed(plan.config.seed), torch.ones(task.site.d_out)
    rows = shuffled(len(task.x), plan.config.batch_tokens, generator)
    contexts = shuffled(len(task.contexts), plan.config.batch_tokens // context, generator)
    for step in range(plan.steps):
        done = step / plan.steps
        active = max(k, round(k * (method.first_k - (method.first_k - 1) * done / ANNEALED)))
        if method.kl and done >= THROUGH_MODEL:
            chosen = next(contexts)
            target = task.target.unflatten(0, (-1, context))[chosen].flatten(0, 1)
            x, code, base, carried, divergence = through_model(task, layer, task.contexts[chosen], active)
            loss = method.kl * divergence
        else:
            chosen = next(rows)
            x, target, loss = task.x[chosen], task.target[chosen], torch.zeros(())
            base, code = layer.base(x), layer.encode_at(x, active)
            carried = layer.carried(x, code)
        error = base + carried - target
        loss = loss + distillation_loss(target + (error @ task.fisher_root if method.fisher else error), target)
        if method.penalty and done < method.released:
            if method.common:
                shared, direction = common_part(carried, cast(Tensor, layer.dense_branch(x)), direction)
                base = base + shared
            loss = loss + method.penalty * shared_energy(base, target)
        if method.unlike:
            loss = loss + method.unlike * likeness(code, cast(SharedTranscoder, layer).W_dec)
        loss.backward()
        project_gradients_(tables)
        for rate, optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * plan.schedule.factor(step) * rate
            optimizer.step()
        layer.zero_grad(set_to_none=True)
        renormalize_(tables)
        if isinstance(layer, Adapting):
            layer.adapt(x, code)
