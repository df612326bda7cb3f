"""The steps that the benchmarks time: mxd's, the same mathematics written densely, bare products, and peers'.

A variant builds its weights, from the same seed wherever it shares mxd's, and makes a step of them: forward, backward
and optimiser, on a batch that does not change.

* `mxd` is `Student.step`, which also keeps the metrics. For a shared transcoder its loss includes the charge on the
  shared expert's variance.
* `dense` is autograd throughout: all scores, top-k, a scatter into a code of one number per latent and token, its
  product with the whole table, and AdamW as torch ships it (on a GPU its fused one, since it is the faster).
* `products` is what no exact formulation can do without, by torch's `@`: the product of the input with the weights that
  score and, for a mixture of decoders and a shared transcoder, the dense branch's (the shared expert's) two products
  with their three gradients. Whole matrices, nothing added, no gradient kept.
* `linear products` are the same by mxd's own `kernels.linear`, the scores' as one product of whole matrices too. Where
  that is faster than torch's own choice, `mxd` can be faster than `products`.
* `packed products` are what `mxd` itself multiplies, and nothing else of its step: the scores by `score_blocks`, that
  is by blocks of rows that stay in the cache, with the weight rearranged once and the bias added, but nothing selected
  from them; the other products by `kernels.linear`. Of the three floors it is the one that `mxd` stands on.
* `sparsify` is what the trainer of eai-sparsify does in a step with its defaults (loss `fvu`, no AuxK, no Multi-TopK)
  on a transcoder, with fused AdamW where it has signum: the copies of inputs and targets, the loss over the variance,
  and the count of tokens since each latent fired. With `transcode=True` it neither normalises the decoder nor projects
  its gradient, so neither is done here, while `mxd` and `dense` do both. On a GPU its coder turns on bfloat16 autocast
  for itself, and its trainer lets other float32 products run in TF32: there it runs in bfloat16 only, on a CPU in
  float32 only.
* `sae-lens` is the step of its own `SAETrainer`, clipping included, with fused AdamW where it has Adam. It trains no
  transcoder, so this is a TopK autoencoder of the same size on the same inputs: once with its default settings, and
  once with `use_sparse_activations`, which on a CPU needs `rescale_acts_by_decoder_norm` off. It computes in float32
  unless its trainer is told `autocast`, which bfloat16 stands for.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mxd.kernels import linear, score_blocks
from mxd.layers import (
    LayerRequest,
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    SharedTranscoder,
    SharedTranscoderConfig,
    SparseLayer,
    Transcoder,
    TranscoderConfig,
)
from mxd.layers.sizing import EXPANSION, match_budget, paper_num_experts, shared_width, transcoder_budget
from mxd.losses import distillation_loss, shared_energy
from mxd.training.student import Student, StudentConfig

LEARNING_RATE = 1e-4
Kind = Literal["mxd", "shared-transcoder", "transcoder"]
Dtype = Literal["float32", "bfloat16"]
"""Type of the products: bfloat16 means autocast with float32 weights."""
Step = Callable[[], object]
COLOURS = {
    "mxd": "#0072b2",
    "dense": "#e69f00",
    "sparsify": "#009e73",
    "products": "#8a94a3",
    "linear products": "#8a94a3",
    "packed products": "#8a94a3",
}
OTHER_COLOUR = "#cc79a7"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is trained on how much."""

    kind: Kind
    tokens: int
    d_model: int
    d_hidden: int
    k: int
    num_latents: int = 0
    """0 until `sized` has chosen it."""
    device: str = "cpu"


def sized(shape: Shape) -> Shape:
    """Return the shape with as many latents as go with the MLP whose sizes it has.

    They are the paper's for a mixture, and otherwise what `mxd train` chooses at its own expansion: it gives a shared
    transcoder more hidden units than the MLP has.
    """
    width = shape.d_model
    if shape.kind == "mxd":
        return replace(shape, num_latents=paper_num_experts(width, shape.d_hidden))
    if shape.kind == "transcoder":
        return replace(shape, num_latents=EXPANSION * width)
    budget = transcoder_budget(width, width)
    request = LayerRequest(d_in=width, d_out=width, d_hidden=shape.d_hidden, activation="gelu", k=shape.k)
    d_hidden = shared_width(budget, request)
    num_latents = match_budget(shape.kind, budget, replace(request, d_hidden=d_hidden))
    return replace(shape, d_hidden=d_hidden, num_latents=num_latents)


class Batch(NamedTuple):
    """What a step learns from."""

    x: Tensor
    target: Tensor


def make_batch(shape: Shape) -> Batch:
    pair = torch.randn(2, shape.tokens, shape.d_model, generator=torch.Generator().manual_seed(1))
    return Batch(*pair.to(shape.device))


def make_layer(shape: Shape, seed: int = 0) -> SparseLayer:
    generator = torch.Generator().manual_seed(seed)
    width, latents = shape.d_model, shape.num_latents
    sizes = {"d_in": width, "d_out": width, "k": shape.k}
    if shape.kind == "transcoder":
        return Transcoder(TranscoderConfig(num_latents=latents, **sizes), generator).to(shape.device)
    if shape.kind == "shared-transcoder":
        config = SharedTranscoderConfig(d_hidden=shape.d_hidden, num_latents=latents, **sizes)
        layer = SharedTranscoder(config, generator)
    else:
        config = MixtureOfDecodersConfig(d_hidden=shape.d_hidden, num_experts=latents, **sizes)
        layer = MixtureOfDecoders(config, generator)
    with torch.no_grad():  # It begins at zero, and then no weight before it has a gradient.
        dense_output(layer).normal_(std=shape.d_hidden**-0.5, generator=generator)
    return layer.to(shape.device)


def dense_output(layer: MixtureOfDecoders | SharedTranscoder) -> nn.Parameter:
    """Return the weight that the dense hidden units are multiplied with."""
    return layer.W_dec if isinstance(layer, MixtureOfDecoders) else layer.W_shared


def autocast(dtype: str, device: str = "cpu") -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def mxd_loss(layer: SparseLayer, batch: Batch) -> Tensor:
    """Return the loss as `Student` computes it."""
    prediction, code = layer(batch.x)
    loss = distillation_loss(prediction.float(), batch.target)
    if layer.shared_penalty is None:
        return loss
    shared = prediction.float() - layer.carried(batch.x, code).float()
    return loss + layer.shared_penalty * shared_energy(shared, batch.target)


def make_student(layer: SparseLayer) -> Student:
    config = StudentConfig(lr=LEARNING_RATE, shared_penalty=layer.shared_penalty or 0.0)
    return Student("benchmark", 0, layer, config)


def mxd_step(weights: nn.Module, batch: Batch, dtype: str) -> Step:
    student = make_student(cast(SparseLayer, weights))
    is_content = torch.ones(len(batch.x), dtype=torch.bool, device=batch.x.device)
    cast_to = torch.bfloat16 if dtype == "bfloat16" else None
    return lambda: student.step(0, *batch, is_content, lr_factor=1.0, autocast=cast_to)


def dense_loss(layer: SparseLayer, batch: Batch) -> Tensor:
    scores = functional.relu(batch.x @ layer.scorer.weight + layer.scorer.bias)
    values, indices = scores.topk(layer.config.k, dim=-1)
    code = torch.zeros_like(scores).scatter(-1, indices, values)
    length = batch.target.norm(dim=-1, keepdim=True)
    if isinstance(layer, Transcoder):
        prediction, charge = code @ layer.W_dec + layer.b_dec, 0.0
    else:
        hidden = functional.gelu(batch.x @ layer.encoder.W_enc + layer.encoder.b_enc)
        dense = hidden @ dense_output(layer)
        if isinstance(layer, MixtureOfDecoders):
            prediction, charge = (code @ layer.W_expert) * dense + layer.b_dec, 0.0
        else:
            shared = dense + layer.b_dec
            prediction = code @ layer.W_dec + shared
            charge = layer.shared_penalty * ((shared.float() - shared.float().mean(0)).square() / length).mean()
    return ((prediction.float() - batch.target).square() / length).mean() + charge


def dense_step(weights: nn.Module, batch: Batch, dtype: str) -> Step:
    layer = cast(SparseLayer, weights)
    fused = True if batch.x.is_cuda else None
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=fused)
    tables = layer.unit_length_tables()

    def step() -> None:
        with torch.no_grad():
            for table in tables:
                table.div_(table.norm(dim=1, keepdim=True))
        with autocast(dtype, batch.x.device.type):
            loss = dense_loss(layer, batch)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for table in tables:
                assert table.grad is not None
                table.grad -= (table.grad * table).sum(dim=1, keepdim=True) * table
        optimizer.step()

    return step


def torch_scores(x: Tensor, layer: SparseLayer) -> None:
    _ = x @ layer.scorer.weight


def linear_scores(x: Tensor, layer: SparseLayer) -> None:
    _ = linear(x, layer.scorer.weight)


def packed_scores(x: Tensor, layer: SparseLayer) -> None:
    for _ in score_blocks(x, *layer.scorer):
        pass


@torch.no_grad()
def products_step(
    weights: nn.Module,
    batch: Batch,
    dtype: str,
    scores: Callable[[Tensor, SparseLayer], None] = torch_scores,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Step:
    layer = cast(SparseLayer, weights.to(getattr(torch, dtype)).requires_grad_(False))
    x, gradient = (tensor.to(getattr(torch, dtype)) for tensor in batch)

    def step() -> None:
        scores(x, layer)
        if isinstance(layer, MixtureOfDecoders | SharedTranscoder):
            output = dense_output(layer)
            hidden = product(x, layer.encoder.W_enc)
            _ = product(hidden, output)
            _ = product(hidden.t(), gradient)
            _ = product(x.t(), product(gradient, output.t()))

    return step


linear_products_step = partial(products_step, scores=linear_scores, product=linear)
packed_products_step = partial(products_step, scores=packed_scores, product=linear)


@torch.no_grad()
def sparsify_coder(shape: Shape) -> nn.Module:
    from sparsify import SparseCoder, SparseCoderConfig

    layer = make_layer(shape)
    assert isinstance(layer, Transcoder)
    coder = SparseCoder(shape.d_model, SparseCoderConfig(num_latents=shape.num_latents, k=shape.k, transcode=True))
    coder.encoder.weight.copy_(layer.W_enc.t())
    coder.W_dec.copy_(layer.W_dec)
    return coder.to(shape.device)


def sparsify_step(coder: nn.Module, batch: Batch, dtype: str) -> Step:
    device = batch.x.device
    assert dtype == sparsify_dtype(device.type)
    optimizer = torch.optim.AdamW(coder.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    tokens_mask = torch.ones(len(batch.x), dtype=torch.bool, device=device)
    did_fire = torch.zeros(coder.num_latents, dtype=torch.bool, device=device)
    tokens_since_fired = torch.zeros(coder.num_latents, dtype=torch.long, device=device)

    def step() -> None:
        num_tokens = int(tokens_mask.sum())
        _all_outputs = batch.target.clone()
        outputs, inputs = batch.target[tokens_mask], batch.x[tokens_mask]
        total_variance = (outputs - outputs.mean(0)).pow(2).sum()
        out = coder(x=inputs, y=outputs, dead_mask=None, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens_since_fired.add_(num_tokens)
        tokens_since_fired[did_fire] = 0
        did_fire.zero_()

    def step_in_tf32() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        step()
        torch.set_float32_matmul_precision(before)

    return step_in_tf32 if device.type == "cuda" else step


def sparsify_dtype(device: str) -> Dtype:
    """Return what its coder computes in, which it decides itself."""
    return "bfloat16" if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def sae_lens_autoencoder(shape: Shape, sparse: bool = False) -> nn.Module:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(0)
    config = TopKTrainingSAEConfig(
        d_in=shape.d_model,
        d_sae=shape.num_latents,
        k=shape.k,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
        device=shape.device,
    )
    return TopKTrainingSAE(config)


def sae_lens_sparse_autoencoder(shape: Shape) -> nn.Module:
    return sae_lens_autoencoder(shape, sparse=True)


def sae_lens_step(autoencoder: nn.Module, batch: Batch, dtype: str) -> Step:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    tokens = len(batch.x)
    config = SAETrainerConfig(
        total_training_samples=1_000_000 * tokens,
        train_batch_size_samples=tokens,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        device=str(batch.x.device),
        autocast=dtype == "bfloat16",
        logger=LoggingConfig(log_to_wandb=False),
    )
    no_more: Iterator[Tensor] = iter(())
    trainer = SAETrainer(config, autoencoder, no_more)
    trainer.optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)

    def step() -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(batch.x)
        trainer.n_training_steps += 1

    return step


class Variant(NamedTuple):
    """How one sort of step is put together."""

    weights: Callable[[Shape], nn.Module]
    step: Callable[[nn.Module, Batch, str], Step]
    package: str | None = None
    """What it imports, where that is not mxd's own."""
    trains: bool = True
    """Whether it has gradients and optimiser state."""


OURS = {"mxd": Variant(make_layer, mxd_step), "dense": Variant(make_layer, dense_step)}
PEERS = {
    "sparsify": Variant(sparsify_coder, sparsify_step, "sparsify"),
    "sae-lens SAE": Variant(sae_lens_autoencoder, sae_lens_step, "sae_lens"),
    "sae-lens sparse SAE": Variant(sae_lens_sparse_autoencoder, sae_lens_step, "sae_lens"),
}
PRODUCTS = {
    "products": Variant(make_layer, products_step, trains=False),
    "linear products": Variant(make_layer, linear_products_step, trains=False),
    "packed products": Variant(make_layer, packed_products_step, trains=False),
}
VARIANTS: dict[Kind, dict[str, Variant]] = {
    "mxd": {**OURS, **PRODUCTS},
    "shared-transcoder": {**OURS, **PRODUCTS},
    "transcoder": {**OURS, **PEERS, **PRODUCTS},
}


def is_installed(variant: Variant) -> bool:
    return variant.package is None or importlib.util.find_spec(variant.package) is not None
