"""Exported layers through the other tools' own loaders, where these are installed."""

import importlib
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
import yaml
from torch import nn

from mxd.interop import export_layers, load_sparsify
from mxd.layers import SelectionName, SparseLayer
from mxd.models import find_mlp, mlp_pairs
from tests import tiny_model
from tests.exported_layers import CASES, D_MODEL, FITTING, NUM_BLOCKS, K, a_layer, inputs, outline, whole_set

GPT2 = outline()
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
OTHERS: dict[str, dict[str, int]] = {
    "gpt_neox": {},
    "phi": {"num_key_value_heads": 2},
    "qwen3": GROUPED,
    "gemma2": GROUPED,
    "olmo2": {"num_key_value_heads": 2},
}
"""Families beside GPT-2 and Llama, and what else their sizes are: MLPs beside attention, and norms behind them."""


def peer(module: str, package: str) -> Any:
    """Return another tool's module; skip where it is not there."""
    return pytest.importorskip(module, reason=f"{package} is not installed", exc_type=ImportError)


def cases(form: str) -> list[tuple[str, SelectionName]]:
    return [(case.kind, case.selection) for case in CASES if case.form == form]


def assert_same(found: torch.Tensor, layer: SparseLayer, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found, layer(x).prediction, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FITTING["sparsify"])
def test_sparsify_computes_what_the_layer_does(kind: str, tmp_path: Path) -> None:
    sparsify = peer("sparsify", "eai-sparsify")
    layers, x = whole_set(kind, dtype=torch.float32), inputs(torch.float32)
    export_layers(layers, tmp_path / "out", "sparsify", model=GPT2)
    coders = sparsify.SparseCoder.load_many(str(tmp_path / "out"), local=True)
    assert list(coders) == ["h.0.mlp", "h.1.mlp", "h.2.mlp"]
    for layer, coder in zip(layers, coders.values(), strict=True):
        assert_same(coder(x).sae_out, layer, x)
        code = layer.encode(x)
        dense = torch.zeros(len(x), layer.num_latents).scatter(1, coder.encode(x).top_indices, coder.encode(x).top_acts)
        torch.testing.assert_close(dense, code.dense(layer.num_latents), rtol=1e-5, atol=2e-6)
        assert coder.cfg.transcode == (layer.reads == "input")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_a_coder_that_sparsify_wrote_is_read(transcode: bool, skip: bool, tmp_path: Path) -> None:
    sparsify = peer("sparsify", "eai-sparsify")
    settings = sparsify.SparseCoderConfig(num_latents=20, k=3, transcode=transcode, skip_connection=skip)
    coder = sparsify.SparseCoder(D_MODEL, settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in coder.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    coder.save_to_disk(tmp_path / "layers.4.mlp")
    layer, x = load_sparsify(tmp_path / "layers.4.mlp"), inputs(torch.float32)
    assert_same(coder(x).sae_out, layer, x)
    assert (layer.kind, layer.provenance.layer) == (
        "topk-sae" if not transcode else "skip-transcoder" if skip else "transcoder",
        4,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "selection"), cases("saelens"))
def test_saelens_computes_what_the_layer_does(kind: str, selection: SelectionName, tmp_path: Path) -> None:
    sae_lens = peer("sae_lens", "sae-lens")
    layer, x = a_layer(kind, selection, 1, torch.float32), inputs(torch.float32)
    export_layers([layer], tmp_path / "out", "saelens", model=GPT2)
    sae = sae_lens.SAE.load_from_disk(tmp_path / "out/blocks.1.mlp")
    with torch.no_grad():
        assert_same(sae(x), layer, x)
        code = layer.encode(x).dense(layer.num_latents)
        torch.testing.assert_close(sae.encode(x), code, rtol=1e-5, atol=2e-6)
    assert sae.cfg.metadata.model_name == "someone/tiny"
    assert sae.cfg.metadata.mxd["text"] == "words"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "selection"), cases("circuit-tracer"))
def test_circuit_tracer_computes_what_the_layer_does(kind: str, selection: SelectionName, tmp_path: Path) -> None:
    peer("circuit_tracer.transcoder.single_layer_transcoder", "circuit-tracer")
    layers, x = whole_set(kind, selection, dtype=torch.float32), inputs(torch.float32)
    export_layers(layers, tmp_path / "out", "circuit-tracer", model=GPT2)
    loaded = _loaded(tmp_path / "out", NUM_BLOCKS, selection)
    with torch.no_grad():
        found = loaded.decode(loaded.encode(x.expand(NUM_BLOCKS, -1, -1)), x.expand(NUM_BLOCKS, -1, -1))
        parts = loaded.compute_attribution_components(x.expand(NUM_BLOCKS, -1, -1))
    for block, layer in enumerate(layers):
        assert_same(found[block], layer, x)
        # The first position is left out of graphs.
        assert_same(parts["reconstruction"][block, 1:], layer, x[1:])
    nodes = parts["activation_matrix"]
    assert int(nodes.indices()[2].max()) < layers[0].num_latents, "latents without weights are no nodes"
    assert bool((nodes.values() > 0).all())
    active = sum(int((layer.encode(x[1:]).values > 0).sum()) for layer in layers)
    assert nodes.values().numel() == active


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "selection"), [("transcoder", "topk"), ("skip-transcoder", "batch-topk")])
def test_circuit_tracer_makes_graphs_of_what_the_mlps_read(kind: str, selection: SelectionName, tmp_path: Path) -> None:
    models = peer("circuit_tracer.replacement_model.replacement_model_transformerlens", "circuit-tracer")
    lens = importlib.import_module("transformer_lens")
    conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    folder = _model("gpt2", tmp_path / "model")
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = whole_set(kind, selection, range(2), dtype=torch.float32)
    export_layers(layers, tmp_path / "out", "circuit-tracer", model=cast(nn.Module, model))
    sizes = {"n_layers": 2, "d_model": D_MODEL, "n_ctx": 64, "d_head": 8, "n_heads": 2, "d_mlp": 64, "d_vocab": 259}
    config = lens.HookedTransformerConfig(
        **sizes, act_fn="gelu_new", normalization_type="LN", eps=1e-5, model_name="gpt2", device="cpu"
    )
    replaced = models.TransformerLensReplacementModel.from_config(config, _loaded(tmp_path / "out", 2, selection))
    weights = conversions.convert_gpt2_weights(model, config)
    renamed = {".mlp.": ".mlp.old_mlp.", "unembed.": "unembed.old_unembed."}
    for before, after in renamed.items():
        weights = {name.replace(before, after): tensor for name, tensor in weights.items()}
    assert replaced.load_state_dict(weights, strict=False).unexpected_keys == []
    replaced.tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    # It would put the token that begins a text in front, and leaves that out of graphs.
    ids = torch.tensor([256, *range(1, 9)])
    pairs = mlp_pairs(cast(nn.Module, model), ids[None], [0, 1])
    with torch.no_grad():
        _, cache = replaced.run_with_cache(ids[None])
        _, activations = replaced.get_activations(ids[None])
    active = 0
    for block, layer in enumerate(layers):
        read, returned = pairs[block]
        torch.testing.assert_close(cache[f"blocks.{block}.mlp.hook_in"], read, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache[f"blocks.{block}.mlp.hook_out"], returned, rtol=1e-4, atol=1e-5)
        code = layer.encode(read[0]).dense(layer.num_latents)
        torch.testing.assert_close(activations[block, 1:, : layer.num_latents], code[1:], rtol=1e-4, atol=1e-5)
        active += int((code[1:] > 0).sum())
    attribution = importlib.import_module("circuit_tracer.attribution.attribute")
    graph = attribution.attribute(ids, replaced)
    assert len(graph.active_features) == active
    assert bool(torch.isfinite(graph.adjacency_matrix).all())
    assert bool(graph.adjacency_matrix.any())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama", *OTHERS])
def test_saelens_hooks_are_what_the_mlp_reads_and_returns(family: str, tmp_path: Path) -> None:
    peer("sae_lens", "sae-lens")
    bridges = importlib.import_module("sae_lens.analysis.sae_transformer_bridge")
    sae_lens = importlib.import_module("sae_lens")
    folder = _model(family, tmp_path / "model")
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    layer = a_layer("transcoder", "topk", 1, torch.float32, k=K)
    export_layers([layer], tmp_path / "out", "saelens", model=cast(nn.Module, model))
    sae = sae_lens.SAE.load_from_disk(tmp_path / "out/blocks.1.mlp")
    bridge = bridges.SAETransformerBridge.boot_transformers(str(folder), device="cpu")
    ids, kept = torch.arange(1, 9)[None], dict[str, torch.Tensor]()

    def keep(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        kept.update(read=given[0], returned=output)

    handle = find_mlp(cast(nn.Module, model), 1).modules[0].register_forward_hook(keep)
    with torch.no_grad():
        model(ids)
        handle.remove()
        names = (sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out)
        _, cache = bridge.run_with_cache(ids, names_filter=list(names))
        for name, expected in zip(names, ("read", "returned"), strict=True):
            torch.testing.assert_close(cache[name], kept[expected], rtol=1e-4, atol=1e-5)
        bridge.add_sae(sae)
        replaced = bridge(ids)
        site = find_mlp(cast(nn.Module, model), 1).modules[0]
        site.register_forward_hook(lambda _, given, __: layer(given[0]).prediction)
        torch.testing.assert_close(replaced, model(ids).logits, rtol=1e-4, atol=1e-5)


def _loaded(folder: Path, blocks: int, selection: SelectionName) -> Any:
    """Load a set as the documents do, or as they do for releases that read no activation."""
    tracer = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    paths = {block: str(folder / f"layer_{block}.safetensors") for block in range(blocks)}
    options: dict[str, Any] = {name: config[name] for name in ("activation", "k") if name in config}
    hooks = config["feature_input_hook"], config["feature_output_hook"]
    try:
        return tracer.load_transcoder_set(paths, "mxd", *hooks, device=torch.device("cpu"), **options)
    except TypeError:
        loaded = tracer.load_transcoder_set(paths, "mxd", *hooks, device=torch.device("cpu"))
    if selection == "topk":
        # What the main branch does.
        functions = importlib.import_module("circuit_tracer.transcoder.activation_functions")
        for one in loaded:
            one.activation_function = functions.TopK(config["k"])
    return loaded


def _model(family: str, folder: Path) -> Path:
    """Write a tiny model whose norms have weights, so that before and behind these is not the same."""
    tiny_model.write_model(folder, "gpt2" if family == "gpt2" else "llama")
    if family in OTHERS:
        sizes = {"hidden_size": D_MODEL, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"vocab_size": 259, "max_position_embeddings": 64, "pad_token_id": 258, **OTHERS[family]}
        config = hf.AutoConfig.for_model(family, **sizes)
    else:
        config = hf.AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            nn.init.normal_(parameter, mean=float(is_scale), std=0.3)
    model.save_pretrained(folder)
    return folder
