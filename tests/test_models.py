from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from mxd.models import (
    MLP_SITES,
    ablate_mlp,
    apply_mlp,
    capture_mlp,
    find_mlp,
    mlp_pairs,
    mlp_weights,
    num_layers,
    replace_mlp,
)

IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))
TOKENS: dict[str, object] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **TOKENS}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
GEMMA = {**LLAMA, "head_dim": 8}
EXPERTS = {**GEMMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
ROUTED = {**GEMMA, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {**EXPERTS, "num_local_experts": 4, "shared_expert_intermediate_size": 24}
LATENT_ATTENTION = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
SHARED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
DEEPSEEK = {**MOE, **LATENT_ATTENTION, **SHARED, "head_dim": 4}
HEADS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR_ATTENTION = {**HEADS, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
LFM = {**LLAMA, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "full_attention"]}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **TOKENS}
NEO_ATTENTION = {"attention_types": [[["global", "local", "global"], 1]]}
NEO = {"vocab_size": 97, "hidden_size": 32, "num_layers": 3, "num_heads": 4, **NEO_ATTENTION, **TOKENS}
NEOX = {**SIZES, "intermediate_size": 48}
OPT = {**SIZES, "ffn_dim": 48}
EYES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28}
GEMMA3: dict[str, object] = {"text_config": GEMMA, "vision_config": EYES, "image_token_id": 96}

INNER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
GEMMA4 = {**GEMMA, **INNER, "global_head_dim": 8, "layer_types": ["full_attention"] * 3}
GEMMA3N = {**GEMMA, **INNER, "num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 3}


class Family(NamedTuple):
    model_type: str
    settings: dict[str, object]
    d_hidden: int
    activation: str | None
    gated: bool


FAMILIES = {
    "apertus": Family("apertus", LLAMA, 48, None, False),
    "arcee": Family("arcee", LLAMA, 48, None, False),
    "biogpt": Family("biogpt", {**SIZES, "intermediate_size": 48}, 48, "gelu", False),
    "bloom": Family("bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4}, 128, "gelu_tanh", False),
    "codegen": Family("codegen", {**GPT, "rotary_dim": 4}, 128, "gelu_tanh", False),
    "cohere": Family("cohere", LLAMA, 48, "silu", True),
    "cohere2": Family("cohere2", LLAMA, 48, "silu", True),
    "deepseek_v2": Family("deepseek_v2", DEEPSEEK, 60, "silu", True),
    "deepseek_v3": Family("deepseek_v3", DEEPSEEK, 60, "silu", True),
    "deepseek_v3-dense": Family("deepseek_v3", {**DEEPSEEK, "first_k_dense_replace": 3}, 48, "silu", True),
    "diffllama": Family("diffllama", LLAMA, 48, "silu", True),
    "dots1": Family("dots1", DEEPSEEK, 60, "silu", True),
    "ernie4_5": Family("ernie4_5", GEMMA, 48, "silu", True),
    "ernie4_5_moe": Family(
        "ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_num_shared_experts": 1}, 60, "silu", True
    ),
    "exaone4": Family("exaone4", {**LLAMA, "sliding_window": 8}, 48, "silu", True),
    "falcon": Family("falcon", {**SIZES, "ffn_hidden_size": 48}, 48, "gelu", False),
    "falcon-new": Family("falcon", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}, 128, "gelu", False),
    "falcon-sequential": Family("falcon", {**SIZES, "parallel_attn": False, "bias": True}, 128, "gelu", False),
    "falcon_h1": Family("falcon_h1", {**LLAMA, **MAMBA}, 48, "silu", True),
    "gemma": Family("gemma", GEMMA, 48, "gelu_tanh", True),
    "gemma2": Family("gemma2", GEMMA, 48, "gelu_tanh", True),
    "gemma3": Family("gemma3", GEMMA3, 48, "gelu_tanh", True),
    "gemma3_text": Family("gemma3_text", GEMMA, 48, "gelu_tanh", True),
    "gemma3n_text": Family("gemma3n_text", GEMMA3N, 48, "gelu_tanh", True),
    "gemma4": Family(
        "gemma4", {"text_config": GEMMA4, "vision_config": EYES, "audio_config": None}, 48, "gelu_tanh", True
    ),
    "gemma4_text": Family("gemma4_text", GEMMA4, 48, "gelu_tanh", True),
    "glm": Family("glm", GEMMA, 48, "silu", True),
    "glm4": Family("glm4", GEMMA, 48, "silu", True),
    "glm4_moe": Family("glm4_moe", {**DEEPSEEK, "head_dim": 8}, 60, "silu", True),
    "gpt2": Family("gpt2", GPT, 128, "gelu_tanh", False),
    "gpt2-other": Family("gpt2", {**GPT, "activation_function": "tanh"}, 128, None, False),
    "gpt2-square": Family("gpt2", {**GPT, "n_inner": 32, "activation_function": "relu"}, 32, "relu", False),
    "gpt_bigcode": Family("gpt_bigcode", {**GPT, "n_inner": 48}, 48, "gelu_tanh", False),
    "gpt_neo": Family("gpt_neo", NEO, 128, "gelu_tanh", False),
    "gpt_neox": Family("gpt_neox", NEOX, 48, "gelu", False),
    "gpt_neox-sequential": Family("gpt_neox", {**NEOX, "use_parallel_residual": False}, 48, "gelu", False),
    "gpt_oss": Family("gpt_oss", ROUTED, 96, "silu", True),
    "gptj": Family("gptj", {**GPT, "rotary_dim": 4}, 128, "gelu_tanh", False),
    "granite": Family("granite", LLAMA, 48, "silu", True),
    "granitemoe": Family("granitemoe", ROUTED, 96, "silu", True),
    "helium": Family("helium", GEMMA, 48, "silu", True),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", GEMMA, 48, "silu", True),
    "jamba": Family("jamba", {**ROUTED, "attn_layer_period": 2, "attn_layer_offset": 1}, 48, "silu", True),
    "lfm2": Family("lfm2", LFM, 48, "silu", True),
    "lfm2_moe": Family("lfm2_moe", {**LFM, **MOE, "num_dense_layers": 1}, 40, "silu", True),
    "llama": Family("llama", LLAMA, 48, "silu", True),
    "llama-square": Family("llama", {**LLAMA, "intermediate_size": 32}, 32, "silu", True),
    "llama4_text": Family("llama4_text", {**ROUTED, "intermediate_size_mlp": 48}, 144, "silu", True),
    "ministral": Family("ministral", {**GEMMA, "layer_types": ["full_attention"] * 3}, 48, "silu", True),
    "ministral3": Family("ministral3", GEMMA, 48, "silu", True),
    "mistral": Family("mistral", LLAMA, 48, "silu", True),
    "mixtral": Family("mixtral", {**LLAMA, "num_local_experts": 4}, 96, "silu", True),
    "mpt": Family("mpt", {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 3}, 128, "gelu", False),
    "nanochat": Family("nanochat", GEMMA, 48, None, False),
    "nemotron": Family("nemotron", LLAMA, 48, None, False),
    "olmo": Family("olmo", LLAMA, 48, "silu", True),
    "olmo2": Family("olmo2", LLAMA, 48, "silu", True),
    "olmo3": Family("olmo3", {**LLAMA, "sliding_window": 8}, 48, "silu", True),
    "olmoe": Family("olmoe", ROUTED, 96, "silu", True),
    "openai-gpt": Family("openai-gpt", GPT, 128, "gelu_tanh", False),
    "opt": Family("opt", {**OPT, "word_embed_proj_dim": 32}, 48, "relu", False),
    "opt-post-norm": Family(
        "opt", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, 48, "relu", False
    ),
    "persimmon": Family("persimmon", LLAMA, 48, None, False),
    "phi": Family("phi", LLAMA, 48, "gelu_tanh", False),
    "phi3": Family("phi3", LLAMA, 48, "silu", True),
    "phimoe": Family("phimoe", ROUTED, 96, "silu", True),
    "qwen2": Family("qwen2", LLAMA, 48, "silu", True),
    "qwen2_moe": Family("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24}, 64, "silu", True),
    "qwen2_moe-dense": Family("qwen2_moe", {**EXPERTS, "mlp_only_layers": [2]}, 48, "silu", True),
    "qwen3": Family("qwen3", GEMMA, 48, "silu", True),
    "qwen3_5_moe_text": Family("qwen3_5_moe_text", {**MOE, **LINEAR_ATTENTION}, 64, "silu", True),
    "qwen3_5_text": Family("qwen3_5_text", {**GEMMA, **LINEAR_ATTENTION}, 48, "silu", True),
    "qwen3_moe": Family("qwen3_moe", EXPERTS, 40, "silu", True),
    "qwen3_next": Family("qwen3_next", {**MOE, **LINEAR_ATTENTION}, 64, "silu", True),
    "seed_oss": Family("seed_oss", GEMMA, 48, "silu", True),
    "smollm3": Family("smollm3", LLAMA, 48, "silu", True),
    "stablelm": Family("stablelm", LLAMA, 48, "silu", True),
    "stablelm-parallel": Family("stablelm", {**LLAMA, "use_parallel_residual": True}, 48, "silu", True),
    "starcoder2": Family("starcoder2", LLAMA, 48, "gelu_tanh", False),
    "vaultgemma": Family("vaultgemma", GEMMA, 48, "gelu_tanh", True),
    "xglm": Family(
        "xglm",
        {"vocab_size": 97, "d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
        48,
        "gelu",
        False,
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(FAMILIES[name].model_type, **FAMILIES[name].settings)
    model = cast("nn.Module", hf.AutoModelForCausalLM.from_config(config))
    for parameter in model.parameters():
        # Large and without zeros, so that a wrong MLP or a lost bias cannot go unseen.
        nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@cache
def model_of(name: str) -> nn.Module:
    return build(name)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def generate(model: nn.Module) -> Tensor:
    method = cast("Callable[..., Tensor]", model.generate)
    tokens = {"max_new_tokens": 4, "min_new_tokens": 4}
    return method(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, use_cache=True, **tokens)


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_every_listed_family_is_tested() -> None:
    assert {family.model_type for family in FAMILIES.values()} == set(MLP_SITES)


@every_family
def test_facts(name: str) -> None:
    model, family = model_of(name), FAMILIES[name]
    assert num_layers(model) == 3
    site = find_mlp(model, 2)
    assert (site.layer, site.d_in, site.d_hidden, site.d_out) == (2, 32, family.d_hidden, 32)
    assert (site.activation, site.gated) == (family.activation, family.gated)
    assert ".2" in site.path


MIXTURES = {
    *("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "lfm2_moe"),
    *("llama4_text", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"),
}


@every_family
def test_the_weights_of_a_dense_mlp_compute_it(name: str) -> None:
    site = find_mlp(model_of(name), 2)
    if name in MIXTURES or FAMILIES[name].activation is None:
        with pytest.raises(ValueError, match=r"must be dense linear maps around a known activation.*--init paper"):
            mlp_weights(site)
        return
    weights, x = mlp_weights(site), torch.randn(11, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(apply_mlp(weights, x, site.activation), site(x), rtol=1e-4, atol=1e-4)
    assert (weights.W_enc_gate is not None) == site.gated


@every_family
def test_capture_and_self_replacement(name: str) -> None:
    model = model_of(name)
    before = logits(model)
    sites = {layer: find_mlp(model, layer) for layer in range(3)}
    with capture_mlp(model, range(3)) as pairs:
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    for layer, (x, target) in pairs.items():
        assert x.shape == target.shape == (2, 7, 32)
        torch.testing.assert_close(sites[layer](x), target, rtol=0, atol=0)
    with replace_mlp(model, sites):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    early = mlp_pairs(model, IDS, [0, 1])
    for layer in early:
        torch.testing.assert_close(early[layer], pairs[layer], rtol=0, atol=0)
    assert forwards(model) == []
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@every_family
def test_replacement_ablation_and_generation(name: str) -> None:
    model = model_of(name)
    before = logits(model)
    with replace_mlp(model, {1: zeros}):
        replaced = logits(model)
    with ablate_mlp(model, {1: None}):
        torch.testing.assert_close(logits(model), replaced, rtol=0, atol=0)
    assert not torch.allclose(replaced, before)
    third = find_mlp(model, 2)
    with replace_mlp(model, {1: third}), capture_mlp(model, [1, 2]) as pairs:
        assert not torch.allclose(logits(model), before)
    torch.testing.assert_close(pairs[1].target, third(pairs[1].x), rtol=0, atol=0)
    expected = generate(model)
    with replace_mlp(model, {0: find_mlp(model, 0), 2: third}, passthrough=[5]):
        assert torch.equal(generate(model), expected)
