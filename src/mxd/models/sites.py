"""Where each family of language models keeps its MLPs, and what they are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from jaxtyping import Float
from torch import Tensor, nn


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


_GPT = MlpSpec("transformer.h.{layer}.mlp", returns_tensor=True)
_LLAMA = MlpSpec("model.layers.{layer}.mlp", returns_tensor=True)
_MOE = MlpSpec("model.layers.{layer}.mlp")

MLP_SITES: dict[str, MlpSpec] = {
    "bloom": MlpSpec("transformer.h.{layer}.mlp", takes_residual=True, returns_tensor=True),
    "cohere": _LLAMA,
    "falcon": _GPT,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": MlpSpec("model.language_model.layers.{layer}.mlp", returns_tensor=True),
    "gemma3_text": _LLAMA,
    "gpt2": _GPT,
    "gpt_neo": _GPT,
    "gpt_neox": MlpSpec("gpt_neox.layers.{layer}.mlp", returns_tensor=True),
    "gptj": _GPT,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MOE,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "opt": MlpSpec("model.decoder.layers.{layer}", parts=("fc1", "activation_fn", "fc2"), returns_tensor=True),
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
}
"""Model type (of the model's config) to where its MLPs are."""

_ACTIVATION_CLASSES = {
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
_ACTIVATION_NAMES = {
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


class Override:
    """Stands in the place of a module's `forward`, and remembers what stood there."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.original: Callable[..., object] = module.forward
        self._shadowed: object = vars(module).get("forward")

    def install(self) -> None:
        """Take the place of the module's `forward`; the module itself, its weights and its hooks stay."""
        vars(self.module)["forward"] = self

    def remove(self) -> None:
        """Put back what stood there."""
        if self._shadowed is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self._shadowed

    def __call__(self, x: Tensor) -> object:
        """Return `x`: the part of an inline MLP that another part computes."""
        return x


def _own_forward(module: nn.Module) -> Callable[..., object]:
    current = vars(module).get("forward")
    return current.original if isinstance(current, Override) else module.forward


def hidden_part(output: object, path: str) -> Tensor:
    """Return the output of an MLP without what it may return beside it (the router's logits).

    Raises:
        ValueError: If there is no tensor where it is expected.
    """
    hidden = cast("object", output[0]) if isinstance(output, tuple) and output else cast("object", output)
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"An MLP must return a tensor or a tuple that begins with one; '{path}' returned {type(hidden).__name__}. "
            "Give the path of the MLP's own module."
        )
    return hidden


@dataclass(frozen=True, kw_only=True)
class MlpSite:
    """What the MLP of one block is, and where.

    Calling it runs the model's own MLP, whatever stands in its place at the moment.
    """

    layer: int
    """Index of the block."""
    path: str
    """Dotted path of the MLP's module in the model; for an MLP without one, the block's path and the MLP's parts."""
    d_in: int
    """Width of the input."""
    d_hidden: int
    """Width between the linear layers; for a mixture of experts, what is active for one token: the experts chosen
    times an expert's width, plus the shared expert."""
    d_out: int
    """Width of the output."""
    activation: str | None
    """`relu`, `gelu` (exact), `gelu_tanh`, `silu` or `sigmoid`; None if it is another one."""
    gated: bool
    """Whether the activation multiplies a second linear map (GLU)."""
    modules: tuple[nn.Module, ...] = field(repr=False)
    """The MLP's module, or its parts in the order they run."""
    block: nn.Module | None = field(default=None, repr=False)
    """The block, if the MLP has no module of its own."""
    takes_residual: bool = field(default=False, repr=False)
    """Whether the module adds the residual stream itself."""
    returns_tensor: bool = field(default=False, repr=False)
    """Whether the module is known to return a tensor and no tuple."""

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return what the model's own MLP makes of `x`."""
        no_residual = (x.new_zeros(()),) if self.takes_residual else ()
        return hidden_part(self.run(x, *no_residual), self.path)

    def run(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """Return exactly what the model's own MLP returns for the arguments the model gave it."""
        first, *others = self.modules
        output = _own_forward(first)(x, *args, **kwargs)
        for module in others:
            output = _own_forward(module)(output)
        return output


def num_layers(model: nn.Module) -> int:
    """Return the number of blocks of a language model.

    Raises:
        ValueError: If the model is of no listed family and its config does not say.
    """
    known = MLP_SITES.get(_model_type(model))
    if known is not None:
        return len(list(_submodule(model, known.path.partition(".{layer}")[0]).children()))
    count = _config_int(model, "num_hidden_layers")
    if count is None:
        raise ValueError(
            f"The number of layers must be the config's num_hidden_layers for a family that is not listed; "
            f"the config of {type(model).__name__} has none. Give layer indices with a module path instead."
        )
    return count


def find_mlp(model: nn.Module, layer: int, module_path: str | None = None) -> MlpSite:
    """Return what the MLP of one block is.

    The widths and whether it is gated are read from the module's linear layers. Where these do not show it (in a
    family that is not listed), d_hidden is 4 d_in and gated False.

    Args:
        model: A Hugging Face language model.
        layer: Index of the block, from 0.
        module_path: Where the MLPs are, such as `model.layers.{layer}.mlp`, for a family that is not in `MLP_SITES`.

    Raises:
        ValueError: If the family is not listed and no path is given, the path does not exist, or there is no such
            layer.
    """
    known = MLP_SITES.get(_model_type(model))
    if module_path is not None and "{layer}" not in module_path:
        raise ValueError(
            f"A module path must contain '{{layer}}' where the block's index stands; got '{module_path}'. "
            "Give for example 'model.layers.{layer}.mlp'."
        )
    if known is None and module_path is None:
        raise ValueError(
            f"The model must be of a known family ({', '.join(MLP_SITES)}); got model_type '{_model_type(model)}'. "
            "Say where its MLPs are with module_path='path.{layer}.mlp' (on the command line, --module)."
        )
    spec = known if known is not None and module_path in (None, known.path) else MlpSpec(str(module_path))
    _check_layer(model, spec, layer)
    path = spec.path.replace("{layer}", str(layer))
    module = _submodule(model, path)
    parts = tuple(_submodule(model, f"{path}.{part}") for part in spec.parts)
    shape = _shape(model, parts or (module,), path)
    return MlpSite(
        layer=layer,
        path=f"{path} ({', '.join(spec.parts)} inline)" if parts else path,
        d_in=shape.d_in,
        d_hidden=shape.d_hidden,
        d_out=shape.d_out,
        activation=_activation(model, parts or (module,)),
        gated=shape.gated,
        modules=parts or (module,),
        block=module if parts else None,
        takes_residual=spec.takes_residual,
        returns_tensor=spec.returns_tensor,
    )


def find_block(model: nn.Module, layer: int, module_path: str | None = None) -> nn.Module:
    """Return the block whose MLP `find_mlp` returns.

    Args:
        model: A Hugging Face language model.
        layer: Index of the block, from 0.
        module_path: Where the MLPs are, for a family that is not listed.

    Raises:
        ValueError: As `find_mlp`.
    """
    find_mlp(model, layer, module_path)
    known = MLP_SITES.get(_model_type(model))
    path = str(module_path) if module_path is not None or known is None else known.path
    return _submodule(model, path.partition("{layer}")[0] + str(layer))


class _Shape(NamedTuple):
    d_in: int
    d_hidden: int
    d_out: int
    gated: bool


def _check_layer(model: nn.Module, spec: MlpSpec, layer: int) -> None:
    before, numbered, _ = spec.path.partition(".{layer}.")
    if not numbered and not spec.path.endswith(".{layer}"):
        return
    count = len(list(_submodule(model, before.removesuffix(".{layer}")).children()))
    if not 0 <= layer < count:
        raise ValueError(
            f"A layer must lie in [0, {count - 1}], the {count} blocks of {type(model).__name__}; got {layer}."
        )


def _submodule(model: nn.Module, path: str) -> nn.Module:
    module, walked = model, type(model).__name__
    for name in path.split(".") if path else ():
        children = dict(module.named_children())
        if name not in children:
            there = ", ".join(list(children)[:12]) or "nothing"
            raise ValueError(
                f"The module path must exist in {type(model).__name__}; of '{path}', '{walked}' has no '{name}' "
                f"(there is: {there}). Give a path that exists."
            )
        module, walked = children[name], name if module is model else f"{walked}.{name}"
    return module


def _shape(model: nn.Module, modules: Sequence[nn.Module], path: str) -> _Shape:
    linears = list(_linear_shapes(modules))
    width = _config_int(model, "hidden_size") or (linears[0][0] if linears else None)
    if width is None:
        raise ValueError(
            f"The width of an MLP must show in its linear layers or in the config's hidden_size; '{path}' has neither. "
            "Give the path of the module that holds the MLP's linear layers."
        )
    if "experts" in dict(modules[0].named_children()):
        return _Shape(width, _active_width(model, modules[0]) or 4 * width, width, True)
    if len(linears) > 1:
        d_in = linears[0][0]
        # Where the hidden layer is as wide as the input, only the order tells the way down from the way up.
        down = [shape for shape in linears if shape[0] != d_in] or linears[-1:]
        up = len(linears) - len(down)
        d_hidden, d_out = down[0]
        fused = up == 1 and linears[0][1] == 2 * d_hidden
        if len(down) == 1 and up in (1, 2):
            return _Shape(d_in, d_hidden, d_out, fused or up == 2)
    return _Shape(width, 4 * width, width, False)


def _active_width(model: nn.Module, moe: nn.Module) -> int | None:
    chosen = _config_int(model, "num_experts_per_tok")
    width = _config_int(model, "moe_intermediate_size") or _config_int(model, "intermediate_size")
    if chosen is None or width is None:
        return None
    has_shared = "shared_expert" in dict(moe.named_children())
    return chosen * width + (_config_int(model, "shared_expert_intermediate_size") or 0 if has_shared else 0)


def _linear_shapes(modules: Sequence[nn.Module]) -> Iterator[tuple[int, int]]:
    for module in (inner for outer in modules for inner in outer.modules()):
        # Attributes rather than weights: a quantised layer's weight has another shape, and Conv1D's is transposed.
        shape = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if type(module).__name__ == "Conv1D":
            shape = (getattr(module, "nx", None), getattr(module, "nf", None))
        if isinstance(shape[0], int) and isinstance(shape[1], int):
            yield shape[0], shape[1]


def _activation(model: nn.Module, modules: Sequence[nn.Module]) -> str | None:
    # What runs is a better witness than the config, which says "gelu" for Gemma's tanh and nothing for Bloom.
    found: set[str] = set()
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, nn.GELU):
            found.add("gelu_tanh" if module.approximate == "tanh" else "gelu")
        elif type(module).__name__ in _ACTIVATION_CLASSES:
            found.add(_ACTIVATION_CLASSES[type(module).__name__])
    if found:
        return found.pop() if len(found) == 1 else None
    for name in ("hidden_act", "activation_function", "hidden_activation", "activation"):
        value = getattr(_text_config(model), name, None)
        if isinstance(value, str):
            return _ACTIVATION_NAMES.get(value)
    return None


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _text_config(model: nn.Module) -> object:
    config: object = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config


def _config_int(model: nn.Module, name: str) -> int | None:
    value = getattr(_text_config(model), name, None)
    return value if isinstance(value, int) else None
