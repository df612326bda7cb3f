"""The steps that the benchmarks time: mxd's, the same mathematics written densely, bare products, and peers'.

A variant builds its weights, from the same seed wherever it shares mxd's, and makes a step of them: forward, backward
and optimiser, on a batch that does not change.

* `mxd` is `Student.step`, which also keeps the metrics.
* `dense` is autograd throughout: all scores, top-k, a scatter into a code of one number per latent and token, its
  product with the whole table, and AdamW as torch ships it.
* `products` is what no exact formulation can do without, by torch's `@`: the product of the input with the weights that
  score and, for a mixture of decoders, the dense branch's two products with their three gradients. `linear products`
  are the same by mxd's own `kernels.linear`: where that is faster, `mxd` can be faster than `products`.
* `sparsify` is what the trainer of eai-sparsify does in a step with its defaults (loss `fvu`, no AuxK, no Multi-TopK)
  on a transcoder, with fused AdamW where it has signum: the copies of inputs and targets, the loss over the variance,
  and the count of tokens since each latent fired. With `transcode=True` it neither normalises the decoder nor projects
  its gradient, so neither is done here, while `mxd` and `dense` do both.
* `sae-lens` is the step of its own `SAETrainer`, clipping included, with fused AdamW where it has Adam. It trains no
  transcoder, so this is a TopK autoencoder of the same size on the same inputs: once with its default settings, and
  once with `use_sparse_activations`, which on a CPU needs `rescale_acts_by_decoder_norm` off.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mxd.kernels import linear
from mxd.layers import MixtureOfDecoders, MixtureOfDecodersConfig, SparseLayer, Transcoder, TranscoderConfig
from mxd.losses import distillation_loss
from mxd.training.student import Student, StudentConfig

LEARNING_RATE = 1e-4
Kind = Literal["mxd", "transcoder"]
Dtype = Literal["float32", "bfloat16"]
"""Type of the products: bfloat16 means autocast with float32 weights."""
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is trained on how much."""

    kind: Kind
    tokens: int
    d_model: int
    d_hidden: int
    num_latents: int
    k: int


class Batch(NamedTuple):
    """What a step learns from."""

    x: Tensor
    target: Tensor


def make_batch(shape: Shape) -> Batch:
    return Batch(*torch.randn(2, shape.tokens, shape.d_model, generator=torch.Generator().manual_seed(1)))


def make_layer(shape: Shape, seed: int = 0) -> SparseLayer:
    generator = torch.Generator().manual_seed(seed)
    width, latents = shape.d_model, shape.num_latents
    if shape.kind == "transcoder":
        return Transcoder(TranscoderConfig(d_in=width, d_out=width, num_latents=latents, k=shape.k), generator)
    config = MixtureOfDecodersConfig(d_in=width, d_hidden=shape.d_hidden, d_out=width, num_experts=latents, k=shape.k)
    layer = MixtureOfDecoders(config, generator)
    with torch.no_grad():  # It begins at zero, and then no other weight has a gradient.
        layer.W_dec.normal_(std=shape.d_hidden**-0.5, generator=generator)
    return layer


def autocast(dtype: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def mxd_loss(layer: SparseLayer, batch: Batch) -> Tensor:
    return distillation_loss(layer(batch.x).prediction.float(), batch.target)


def mxd_step(weights: nn.Module, batch: Batch, dtype: str) -> Step:
    student = Student("benchmark", 0, cast(SparseLayer, weights), StudentConfig(lr=LEARNING_RATE))
    is_content = torch.ones(len(batch.x), dtype=torch.bool)
    cast_to = torch.bfloat16 if dtype == "bfloat16" else None
    return lambda: student.step(0, *batch, is_content, lr_factor=1.0, autocast=cast_to)


def dense_loss(layer: SparseLayer, batch: Batch) -> Tensor:
    scores = functional.relu(batch.x @ layer.scorer.weight + layer.scorer.bias)
    values, indices = scores.topk(layer.config.k, dim=-1)
    code = torch.zeros_like(scores).scatter(-1, indices, values)
    if isinstance(layer, MixtureOfDecoders):
        hidden = functional.gelu(batch.x @ layer.encoder.W_enc + layer.encoder.b_enc)
        prediction = (code @ layer.W_expert) * (hidden @ layer.W_dec) + layer.b_dec
    else:
        prediction = code @ layer.W_dec + layer.b_dec
    return ((prediction.float() - batch.target).square() / batch.target.norm(dim=-1, keepdim=True)).mean()


def dense_step(weights: nn.Module, batch: Batch, dtype: str) -> Step:
    layer = cast(SparseLayer, weights)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    (table,) = layer.unit_length_tables()

    def step() -> None:
        with torch.no_grad():
            table.div_(table.norm(dim=1, keepdim=True))
        with autocast(dtype):
            loss = dense_loss(layer, batch)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert table.grad is not None
            table.grad -= (table.grad * table).sum(dim=1, keepdim=True) * table
        optimizer.step()

    return step


@torch.no_grad()
def products_step(
    weights: nn.Module, batch: Batch, dtype: str, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Step:
    layer = cast(SparseLayer, weights.to(getattr(torch, dtype)).requires_grad_(False))
    x, gradient = (tensor.to(getattr(torch, dtype)) for tensor in batch)

    def step() -> None:
        _ = product(x, layer.scorer.weight)
        if isinstance(layer, MixtureOfDecoders):
            hidden = product(x, layer.encoder.W_enc)
            _ = product(hidden, layer.W_dec)
            _ = product(hidden.t(), gradient)
            _ = product(x.t(), product(gradient, layer.W_dec.t()))

    return step


def linear_products_step(weights: nn.Module, batch: Batch, dtype: str) -> Step:
    return products_step(weights, batch, dtype, linear)


@torch.no_grad()
def sparsify_coder(shape: Shape) -> nn.Module:
    from sparsify import SparseCoder, SparseCoderConfig

    layer = make_layer(shape)
    assert isinstance(layer, Transcoder)
    coder = SparseCoder(shape.d_model, SparseCoderConfig(num_latents=shape.num_latents, k=shape.k, transcode=True))
    coder.encoder.weight.copy_(layer.W_enc.t())
    coder.W_dec.copy_(layer.W_dec)
    return coder


def sparsify_step(coder: nn.Module, batch: Batch, dtype: str) -> Step:
    assert dtype == "float32"
    optimizer = torch.optim.AdamW(coder.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    tokens_mask = torch.ones(len(batch.x), dtype=torch.bool)
    did_fire = torch.zeros(coder.num_latents, dtype=torch.bool)
    tokens_since_fired = torch.zeros(coder.num_latents, dtype=torch.long)

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

    return step


def sae_lens_autoencoder(shape: Shape, sparse: bool = False) -> nn.Module:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(0)
    config = TopKTrainingSAEConfig(
        d_in=shape.d_model,
        d_sae=shape.num_latents,
        k=shape.k,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
    )
    return TopKTrainingSAE(config)


def sae_lens_sparse_autoencoder(shape: Shape) -> nn.Module:
    return sae_lens_autoencoder(shape, sparse=True)


def sae_lens_step(autoencoder: nn.Module, batch: Batch, dtype: str) -> Step:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    assert dtype == "float32"
    tokens = len(batch.x)
    config = SAETrainerConfig(
        total_training_samples=1_000_000 * tokens,
        train_batch_size_samples=tokens,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
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
}
VARIANTS: dict[str, dict[str, Variant]] = {"mxd": {**OURS, **PRODUCTS}, "transcoder": {**OURS, **PEERS, **PRODUCTS}}


def is_installed(variant: Variant) -> bool:
    return variant.package is None or importlib.util.find_spec(variant.package) is not None
