"""Which families of language models are known: where each keeps its MLPs, and what their activations are called."""

from typing import NamedTuple


class MlpSpec(NamedTuple):
    """Where a family keeps the MLP of a block, and in what it differs from a module that maps x to its output."""

    path: str
    """Dotted path of the MLP's module, or of the block if the MLP has none; `{layer}` stands for the index."""
    parts: tuple[str, ...] = ()
    """Children of the block that make up an MLP without a module of its own, in the order they run."""
    takes_residual: bool = False
    """Whether the module takes the residual stream as a second argument and adds it itself."""
    returns_tensor: bool = False
    """Whether it is known to return a tensor; otherwise the first call shows whether it returns a tuple."""
    activation: str | None = None
    """Its activation, where neither the module nor the config tells."""


_GPT = MlpSpec("transformer.h.{layer}.mlp", returns_tensor=True)
_LLAMA = MlpSpec("model.layers.{layer}.mlp", returns_tensor=True)
_MOE = MlpSpec("model.layers.{layer}.mlp")
_SEEING = MlpSpec("model.language_model.layers.{layer}.mlp", returns_tensor=True)
_OPT = ("fc1", "activation_fn", "fc2")

MLP_SITES: dict[str, MlpSpec] = {
    "apertus": _LLAMA,
    "arcee": _LLAMA,
    "biogpt": MlpSpec("biogpt.layers.{layer}", parts=_OPT, returns_tensor=True),
    "bloom": MlpSpec("transformer.h.{layer}.mlp", takes_residual=True, returns_tensor=True),
    "codegen": _GPT,
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "deepseek_v2": _MOE,
    "deepseek_v3": _MOE,
    "diffllama": _LLAMA,
    "dots1": _MOE,
    "ernie4_5": _LLAMA,
    "ernie4_5_moe": _MOE,
    "exaone4": _LLAMA,
    "falcon": _GPT,
    "falcon_h1": MlpSpec("model.layers.{layer}.feed_forward", returns_tensor=True),
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": _SEEING,
    "gemma3_text": _LLAMA,
    "gemma3n_text": _LLAMA,
    "gemma4": _SEEING,
    "gemma4_text": _LLAMA,
    "glm": _LLAMA,
    "glm4": _LLAMA,
    "glm4_moe": _MOE,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": _GPT,
    "gpt_neox": MlpSpec("gpt_neox.layers.{layer}.mlp", returns_tensor=True),
    "gpt_oss": _MOE,
    "gptj": _GPT,
    "granite": _LLAMA,
    "granitemoe": MlpSpec("model.layers.{layer}.block_sparse_moe"),
    "helium": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "jamba": MlpSpec("model.layers.{layer}.feed_forward"),
    "lfm2": MlpSpec("model.layers.{layer}.feed_forward", returns_tensor=True, activation="silu"),
    "lfm2_moe": MlpSpec("model.layers.{layer}.feed_forward", activation="silu"),
    "llama": _LLAMA,
    "llama4_text": MlpSpec("model.layers.{layer}.feed_forward"),
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MOE,
    "mpt": MlpSpec("transformer.blocks.{layer}.ffn", takes_residual=True, returns_tensor=True),
    "nanochat": _LLAMA,
    "nemotron": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "olmoe": _MOE,
    "openai-gpt": _GPT,
    "opt": MlpSpec("model.decoder.layers.{layer}", parts=_OPT, returns_tensor=True),
    "persimmon": _LLAMA,
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "phimoe": _MOE,
    "qwen2": _LLAMA,
    "qwen2_moe": _MOE,
    "qwen3": _LLAMA,
    "qwen3_5_moe_text": _MOE,
    "qwen3_5_text": _LLAMA,
    "qwen3_moe": _MOE,
    "qwen3_next": _MOE,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "vaultgemma": _LLAMA,
    "xglm": MlpSpec("model.layers.{layer}", parts=_OPT, returns_tensor=True),
}
"""Model type (of the model's config) to where its MLPs are."""

ACTIVATION_CLASSES = {
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "AccurateGELUActivation": "gelu_tanh",
    "BloomGelu": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}
"""Class of a module that is an activation, to its name here."""
ACTIVATION_NAMES = {
    "relu": "relu",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What a configuration calls an activation, to its name here."""

TOKENS_EXPERTS = ("num_experts_per_tok", "moe_k")
"""What configurations call the number of experts that a token is given to."""
SHARED_EXPERTS = ("shared_expert", "shared_experts")
"""What mixtures of experts call the part that every token is given to."""
USUAL_NAMES = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe")
"""What most families call a block's MLP."""
