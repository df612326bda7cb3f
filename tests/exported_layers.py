"""Layers to export, the model that they belong to, and what other tools make of the files, restated naively."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers as hf
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from mxd.interop import Format
from mxd.layers import BatchTopK, LayerRequest, Provenance, SelectionName, SparseLayer, require_kind

D_MODEL, NUM_LATENTS, K, NUM_BLOCKS = 16, 24, 5, 3
THRESHOLD = 0.4
FITTING: dict[Format, dict[str, tuple[SelectionName, ...]]] = {
    "sparsify": {"transcoder": ("topk",), "skip-transcoder": ("topk",), "topk-sae": ("topk",)},
    "saelens": {
        "transcoder": ("topk", "batch-topk", "l1"),
        "skip-transcoder": ("batch-topk", "l1"),
        "topk-sae": ("topk", "batch-topk", "l1"),
    },
    "circuit-tracer": {
        "transcoder": ("topk", "batch-topk", "l1"),
        "skip-transcoder": ("topk", "batch-topk", "l1"),
        "topk-sae": (),
    },
}
"""What fits, by format and kind: the table of docs/export.md."""


class Case(NamedTuple):
    """A kind and a selection that a format has a place for."""

    form: Format
    kind: str
    selection: SelectionName


CASES = [
    Case(form, kind, selection)
    for form, kinds in FITTING.items()
    for kind, selections in kinds.items()
    for selection in selections
]


def outline(model_type: str = "gpt2", blocks: int = NUM_BLOCKS, **sizes: int) -> nn.Module:
    """Return a language model without weights."""
    names = {"gpt2": ("n_embd", "n_layer", "n_head")}
    width, depth, heads = names.get(model_type, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    config = hf.AutoConfig.for_model(model_type, **{width: D_MODEL, depth: blocks, heads: 2, "vocab_size": 11, **sizes})
    with torch.device("meta"):
        return cast(nn.Module, hf.AutoModelForCausalLM.from_config(config))


def a_layer(
    kind: str, selection: SelectionName = "topk", block: int = 0, dtype: torch.dtype = torch.float64, **changes: int
) -> SparseLayer:
    """Return a layer with random weights, of whose scores about a fifth are positive: often fewer than k of a token."""
    sizes = {"d_in": D_MODEL, "d_hidden": 20, "d_out": D_MODEL, "num_latents": NUM_LATENTS, "k": K, **changes}
    request = LayerRequest(**sizes, activation="gelu", selection=selection, rank=2)  # pyright: ignore[reportArgumentType]
    found = require_kind(kind)
    layer = found.layer(found.configure(request))  # pyright: ignore[reportCallIssue]
    generator = torch.Generator().manual_seed(block)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.25, generator=generator)
    layer.scorer.bias.detach().sub_(0.9)
    if isinstance(layer.selection, BatchTopK):
        layer.selection.threshold.fill_(THRESHOLD)
    layer.provenance = Provenance(model="someone/tiny", revision="abc", layer=block, text="words", mxd_version="0.1.0")
    return layer.to(dtype).eval().requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float64, rows: int = 60) -> Tensor:
    return torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def keep_largest(scores: Tensor, k: int) -> Tensor:
    """Return the scores with all but the k largest of each row set to 0."""
    kept = torch.zeros_like(scores)
    for row, values in enumerate(scores.tolist()):
        for place in sorted(range(len(values)), key=values.__getitem__)[-k:]:
            kept[row, place] = values[place]
    return kept


def positive(scores: Tensor) -> Tensor:
    return torch.where(scores > 0, scores, torch.zeros_like(scores))


def by_sparsify(folder: Path, x: Tensor) -> Tensor:
    """Restate sparsify's SparseCoder (eai-sparsify 1.3.3): rectify, then the k largest."""
    settings, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    seen = x if settings["transcode"] else x - tensors["b_dec"]
    scores = positive(seen @ tensors["encoder.weight"].T + tensors["encoder.bias"])
    y = keep_largest(scores, settings["k"]) @ tensors["W_dec"] + tensors["b_dec"]
    return y + x @ tensors["W_skip"].T if settings["skip_connection"] else y


def by_saelens(folder: Path, x: Tensor) -> Tensor:
    """Restate SAELens's architectures (sae-lens 6.54.12)."""
    settings, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    seen = x - tensors["b_dec"] if settings["apply_b_dec_to_input"] else x
    scores = seen @ tensors["W_enc"] + tensors["b_enc"]
    architecture = cast(str, settings["architecture"])
    if architecture == "topk":
        codes = positive(keep_largest(scores, settings["k"]))
    elif architecture.startswith("jumprelu"):
        codes = positive(scores) * (scores > tensors["threshold"])
    else:
        codes = positive(scores)
    y = codes @ tensors["W_dec"] + tensors["b_dec"]
    return y + x @ tensors["W_skip"].T if "skip" in architecture else y


def by_circuit_tracer(folder: Path, block: int, x: Tensor) -> Tensor:
    """Restate circuit-tracer's main branch: the k largest scores are not rectified."""
    settings = cast("dict[str, Any]", yaml.safe_load((folder / "config.yaml").read_text()))
    tensors = load_file(folder / f"layer_{block}.safetensors")
    scores = x @ tensors["W_enc"].T + tensors["b_enc"]
    if settings.get("activation") == "topk":
        codes = keep_largest(scores, settings["k"])
    elif settings.get("activation") is None and "activation_function.threshold" in tensors:
        codes = scores * (scores > tensors["activation_function.threshold"])
    else:
        codes = positive(scores)
    y = codes @ tensors["W_dec"] + tensors["b_dec"]
    return y + x @ tensors["W_skip"].T if "W_skip" in tensors else y


def restated(form: Format, folder: Path, block: int, x: Tensor) -> Tensor:
    """Return what a tool is said to compute from the files of GPT-2's layers."""
    if form == "sparsify":
        return by_sparsify(folder / f"h.{block}.mlp", x)
    if form == "saelens":
        return by_saelens(folder / f"blocks.{block}.mlp", x)
    return by_circuit_tracer(folder, block, x)


def whole_set(
    kind: str, selection: SelectionName = "topk", blocks: Sequence[int] = range(NUM_BLOCKS), **options: Any
) -> list[SparseLayer]:
    return [a_layer(kind, selection, block, **options) for block in blocks]
