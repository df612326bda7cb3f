"""Where a run's activations come from: the language model, or the folder that keeps them."""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from mxd.atomic import canonical_json, nearest_folder
from mxd.data.activation_cache import PASSES_PER_SHARD, ActivationCache, CacheIdentity
from mxd.data.activations import ActivationStream, Blocks, Pairs
from mxd.data.text import TextSource
from mxd.data.tokenization import tokenizer_digest
from mxd.data.tokens import TokenStream, special_tokens
from mxd.metrics import ErrorSums, error_sums
from mxd.models import LanguageModel, MlpPair, MlpSite, digest, mlp_pairs
from mxd.quantities import gib
from mxd.runs.faults import TrainingFault
from mxd.training.config import TrainConfig
from mxd.training.normalization import InputNormalization, fold_input_normalization_, fold_into_, input_normalization
from mxd.training.plan import Plan, parameter_dtype
from mxd.training.resources import Resources
from mxd.training.student import Student

FORWARD_TOKENS = 4096
"""Tokens of one run of the language model on a CPU."""
MARGIN = 0.02
"""Part of what a cache is to write that must be free beside it."""


def activation_stream(plan: Plan) -> ActivationStream:
    """Return the batches of a plan: shuffled activations of every wanted layer."""
    config = plan.config
    return ActivationStream(
        _pairs(plan),
        plan.tokens,
        widths={layer: (site.d_in, site.d_out) for layer, site in plan.sites.items()},
        batch_tokens=config.batch_tokens,
        buffer_tokens=config.buffer_tokens,
        total_tokens=config.tokens,
        forward_contexts=forward_contexts(config, plan.resources.device),
        special_ids=special_tokens(plan.language_model.tokenizer),
        seed=config.seed,
        dtype=plan.activation_dtype,
        device=plan.resources.device,
    )


def forward_contexts(config: TrainConfig, device: str) -> int:
    """Contexts of one run of the language model: a whole shard where starting a kernel takes as long as running it."""
    passes = PASSES_PER_SHARD if torch.device(device).type == "cuda" else 1
    return passes * max(1, FORWARD_TOKENS // config.context)


def open_cache(
    config: TrainConfig,
    language_model: LanguageModel,
    sites: Mapping[int, MlpSite],
    text: TextSource,
    tokens: TokenStream,
    resources: Resources,
) -> ActivationCache | None:
    """Return the cache that a run asked for, checked against the run and the room on its disk; nothing is written.

    Raises:
        ValueError: If it holds activations of something else, or there is no room for what is missing.
    """
    if config.cache is None:
        return None
    blocks = Blocks(
        batch_tokens=config.batch_tokens,
        buffer_tokens=config.buffer_tokens,
        total_tokens=config.tokens,
        context=config.context,
    )
    run = _model_pairs(language_model, resources, config.module)
    cache = ActivationCache(
        Path(config.cache).expanduser(),
        _identity(config, language_model, text, resources),
        run,
        tokens,
        widths={layer: (site.d_in, site.d_out) for layer, site in sites.items()},
        forward_contexts=forward_contexts(config, resources.device),
        num_contexts=blocks.total_contexts,
    )
    _require_room(cache)
    return cache


def announcement(cache: ActivationCache) -> str:
    """One phrase on what a run reads from its cache and what it writes there."""
    there, missing = cache.coverage()
    if missing == 0:
        return f"cache: complete, {gib(there)} in {cache.folder}; the model does not run"
    writes = f"{gib(missing)} to write in {cache.folder} ({gib(_room(cache.folder))} free)"
    return f"cache: {gib(there)} to read and {writes}" if there else f"cache: {writes}"


def _require_room(cache: ActivationCache) -> None:
    missing, place = cache.coverage().bytes_missing, nearest_folder(cache.folder)
    if missing and not os.access(place, os.W_OK):
        raise ValueError(f"{cache.folder} must be where a cache can be written; {place} is not; give another --cache.")
    if missing and _room(place) < missing * (1 + MARGIN):
        raise ValueError(
            f"the cache needs {gib(missing)} in {cache.folder} and a little more; {gib(_room(place))} are free: "
            "make room, give another --cache, ask for --cache-dtype bfloat16 or fewer --tokens, or leave --cache out."
        )


def _room(folder: Path) -> int:
    return shutil.disk_usage(nearest_folder(folder)).free


def _identity(
    config: TrainConfig, language_model: LanguageModel, text: TextSource, resources: Resources
) -> CacheIdentity:
    weights = parameter_dtype(language_model)
    # float32 holds every float16; bfloat16 does not.
    lossless = torch.float32 if weights == torch.float16 else weights
    of_text = text.identity
    rows = canonical_json([of_text.names, of_text.revision, of_text.split, config.text_field])
    return CacheIdentity(
        model=language_model.id,
        fingerprint=digest(cast(torch.nn.Module, language_model.model)),
        revision=language_model.revision,
        model_dtype=_name(weights),
        precision=resources.model_precision,
        module=config.module,
        text=text.name,
        text_digest=of_text.digest or hashlib.sha256(rows.encode()).hexdigest(),
        tokenizer=tokenizer_digest(language_model.tokenizer),
        context=config.context,
        # Streamed text comes in its own order, whatever the seed.
        order_seed=config.seed if text.is_local else None,
        dtype=_name(lossless) if config.cache_dtype == "auto" else config.cache_dtype,
        shard_contexts=PASSES_PER_SHARD * forward_contexts(config, "cpu"),
    )


def _pairs(plan: Plan) -> Pairs:
    if plan.cache is not None:
        return plan.cache.read
    run, layers = _model_pairs(plan.language_model, plan.resources, plan.config.module), list(plan.sites)

    def pairs(first: int, contexts: Int[Tensor, "n context"]) -> dict[int, MlpPair]:
        return run(contexts, layers)

    return pairs


def _model_pairs(
    language_model: LanguageModel, resources: Resources, module: str | None
) -> Callable[[Int[Tensor, "n context"], Collection[int]], dict[int, MlpPair]]:
    model, device = cast(torch.nn.Module, language_model.model), torch.device(resources.device)
    casts = resources.model_precision != _name(parameter_dtype(language_model))

    def run(contexts: Int[Tensor, "n context"], layers: Collection[int]) -> dict[int, MlpPair]:
        with torch.autocast(device.type, torch.bfloat16, enabled=casts):
            return mlp_pairs(model, contexts.to(device), layers, module_path=module)

    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def start_from_activations(plan: Plan, students: Sequence[Student]) -> None:
    """Set input normalisations and output biases from the first block, which training sees again from its start.

    Raises:
        TrainingFault: If an activation is not finite.
    """
    beginning = plan.tokens.state()
    contexts = min(plan.config.buffer_tokens, plan.config.tokens) // plan.config.context
    pairs_of = _pairs(plan)
    sums: dict[int, list[ErrorSums]] = {}
    first = 0
    for chunk in plan.tokens.take(max(1, contexts)).split(forward_contexts(plan.config, plan.resources.device)):
        for layer, pair in pairs_of(first, chunk).items():
            here = [error_sums(rows, rows) for rows in (tensor.float().flatten(0, 1) for tensor in pair)]
            sums[layer] = [old + new for old, new in zip(sums[layer], here, strict=True)] if layer in sums else here
        first += len(chunk)
    plan.tokens.restore(beginning)
    for layer, both in sums.items():
        if not all(math.isfinite(of_one.square) for of_one in both):
            raise TrainingFault(
                f"activations must be finite; one of layer {layer} is NaN or infinite before step 1. "
                "Run the model in a wider type (--model-dtype float32)."
            )
    for student in students:
        inputs, targets = sums[student.layer]
        bias = student.network.get_parameter("b_dec")
        if plan.config.normalize_input:
            mean, scale = input_normalization(inputs)
            student.normalization = InputNormalization(mean.to(bias.device), scale.to(bias.device))
            if plan.config.init_from is not None:
                fold_input_normalization_(student.network, student.normalization.inverse())
            elif student.config.inherits:
                # The scorer, which comes first, is drawn for normalised inputs; the other maps are the MLP's own.
                fold_into_(student.network.input_maps()[1:], student.normalization.inverse())
        if plan.config.output_bias == "mean":
            with torch.no_grad():
                bias.copy_(targets.target / targets.tokens)
