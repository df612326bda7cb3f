"""Where a language model keeps its MLPs, and what they are."""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from jaxtyping import Float
from torch import Tensor, nn

from mxd.models.families import (
    ACTIVATION_CLASSES,
    ACTIVATION_NAMES,
    MLP_SITES,
    SHARED_EXPERTS,
    TOKENS_EXPERTS,
    USUAL_NAMES,
    MlpSpec,
)


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
        hidden = hidden_part(self.run(x, *no_residual), self.path)
        # Some mixtures of experts return their tokens flattened.
        return hidden.reshape(*x.shape[:-1], hidden.shape[-1])

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
        TypeError: If the model is none of PyTorch's.
        ValueError: If the model is of no listed family and its config does not say.
    """
    require_model(model)
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
        TypeError: If the model is none of PyTorch's, or the layer no index.
        ValueError: If the family is not listed and no path is given, or the model is bidirectional; if the path does
            not exist or leads to single experts of a mixture; if there is no such layer.
    """
    require_model(model)
    try:
        layer = operator.index(layer)
    except TypeError as error:
        raise TypeError(f"A layer must be the index of a block; got {layer!r:.60}.") from error
    known = MLP_SITES.get(_model_type(model))
    if module_path is not None and "{layer}" not in module_path:
        raise ValueError(
            f"A module path must contain '{{layer}}' where the block's index stands; got '{module_path}'. "
            "Give for example 'model.layers.{layer}.mlp'."
        )
    if known is None and module_path is None:
        require_causal(getattr(model, "config", None), _model_type(model))
        raise ValueError(
            f"The model must be of a family that docs/models.md lists; got model_type '{_model_type(model)}'. Say "
            f"where its MLPs are with --module (module_path=), such as '{_likely_path(model)}'."
        )
    spec = known if known is not None and module_path in (None, known.path) else MlpSpec(str(module_path))
    _check_layer(model, spec, layer)
    _refuse_single_experts(model, spec, layer)
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
        activation=spec.activation or _activation(model, parts or (module,)),
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


def require_causal(config: object, name: str) -> None:
    """Check that a model predicts each token from those before it alone, as far as its configuration says.

    Raises:
        ValueError: If it is one of masked text, such as BERT.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"A model must be causal, predicting each token from those before it; found '{name}', which reads in both "
            f"directions (model_type {getattr(config, 'model_type', 'unknown')}). Give a model that generates text."
        )


def require_model(model: object) -> None:
    """Check that this is a model whose modules can be looked up.

    Raises:
        TypeError: If the model is none of PyTorch's.
    """
    if not isinstance(model, nn.Module):
        hint = " Give its .model." if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"model must be a Hugging Face language model; got {type(model).__name__}.{hint}")


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


def _likely_path(model: nn.Module) -> str:
    """Return where the MLPs of a model are if it follows a custom, and an example of a path if not."""
    for path, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            names = dict(blocks[0].named_children())
            for name in USUAL_NAMES:
                if name in names:
                    return f"{path}.{{layer}}.{name}"
    return "path.{layer}.mlp"


def _refuse_single_experts(model: nn.Module, spec: MlpSpec, layer: int) -> None:
    """Refuse paths to experts, which see only the tokens that are routed to them."""
    whole, within, _ = spec.path.partition(".experts")
    if not within:
        return
    prefix, numbered, _ = whole.partition(".{layer}")
    blocks = range(len(list(_submodule(model, prefix).children()))) if numbered else [layer]
    names = {name for name, _ in model.named_modules()}
    mixtures = [block for block in blocks if whole.replace("{layer}", str(block)) + ".experts" in names]
    if layer in mixtures:
        dense = [block for block in blocks if block not in mixtures]
        raise ValueError(
            f"An MLP must see every token, and single experts see those that are routed to them; got '{spec.path}'. "
            f"Blocks {_ranges(mixtures)} are mixtures of experts{f', {_ranges(dense)} are dense' if dense else ''}: "
            f"give the path of the whole MLP, '{whole}'."
        )


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as in `0, 3-5`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


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
    if len(linears) == 1:
        d_in, d_out = linears[0]
        return _Shape(d_in, 4 * d_in, d_out, False)
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
    chosen = next((found for name in TOKENS_EXPERTS if (found := _config_int(model, name)) is not None), None)
    width = _config_int(model, "moe_intermediate_size") or _config_int(model, "intermediate_size")
    if chosen is None or width is None:
        return None
    shared = [module for name, module in moe.named_children() if name in SHARED_EXPERTS]
    return chosen * width + sum(d_in for d_in, _ in list(_linear_shapes(shared))[-1:])


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
        elif type(module).__name__ in ACTIVATION_CLASSES:
            found.add(ACTIVATION_CLASSES[type(module).__name__])
    if found:
        return found.pop() if len(found) == 1 else None
    for name in ("hidden_act", "activation_function", "hidden_activation", "activation"):
        value = getattr(_text_config(model), name, None)
        if isinstance(value, str):
            return ACTIVATION_NAMES.get(value)
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
