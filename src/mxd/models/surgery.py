"""Reading what flows through the MLPs of a language model, and putting something else in their place."""

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mxd.layers.sparse_layer import SparseLayer
from mxd.models.requirements import (
    require_by_block,
    require_ids,
    require_layers,
    require_own_place,
    require_replacement,
    require_tokens,
    require_widths,
)
from mxd.models.sites import MlpSite, Override, find_mlp, hidden_part

Replacement = SparseLayer | MlpSite | Callable[[Tensor], Tensor]
"""What can stand in an MLP's place: a sparse layer, another block's MLP, or any function (or module) of its input."""

_Compute = Callable[[Tensor], Tensor]
_Step = Callable[[Tensor, _Compute], Tensor]
"""Computes an output from the input and from the computation that it replaces."""


class MlpPair(NamedTuple):
    """What an MLP was given and what it made of it."""

    x: Float[Tensor, "batch seq d_in"]
    """The MLP's input."""
    target: Float[Tensor, "batch seq d_out"]
    """The MLP's output, without the residual stream and without any norm that follows."""


class DeepestReached(Exception):
    """Ends a forward pass of which nothing more is wanted."""


class _Tap(Override):
    """Stands in an MLP's place while any context of this module is in force there.

    One tap serves all contexts, however they nest: the replacements apply in the order they were entered, each to
    what the ones before it left, and the listeners hear what really flows on.
    """

    def __init__(self, site: MlpSite):
        super().__init__(site.modules[-1])
        self.site = site
        self.users = 0
        self.replacements: list[_Step] = []
        self.listeners: list[Callable[[Tensor, Tensor], None]] = []
        self._returns_tensor = site.returns_tensor
        self._rows: tuple[int, ...] | None = None
        self._passed_on = [Override(module) for module in site.modules[:-1]]
        self._on_removal = ExitStack()

    def install(self) -> None:
        for override in self._passed_on:
            override.install()
        super().install()
        if self.site.block is not None:
            hook = self.site.block.register_forward_pre_hook(self._note_rows, with_kwargs=True)
            self._on_removal.callback(hook.remove)

    def remove(self) -> None:
        for override in self._passed_on:
            override.remove()
        super().remove()
        self._on_removal.close()

    def _note_rows(self, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        # OPT flattens batch and sequence before its linear layers; only the block still knows them.
        hidden, _, _ = _first_argument(args, kwargs)
        self._rows = tuple(hidden.shape[:-1])

    def __call__(self, *args: object, **kwargs: object) -> object:
        given, args, kwargs = _first_argument(args, kwargs)
        residual = None
        if self.site.takes_residual:
            residual, args, kwargs = _first_argument(args, kwargs)
            args = (residual.new_zeros(()), *args)
        x = given if self._rows is None else given.reshape(*self._rows, given.shape[-1])
        self._require_width("is given", x, self.site.d_in)
        seen: list[object] = []

        def own(x: Tensor) -> Tensor:
            output = self.site.run(x.reshape(given.shape), *args, **kwargs)
            seen[:] = [output]
            hidden = hidden_part(output, self.site.path)
            self._require_width("returns", hidden, self.site.d_out)
            return hidden.reshape(*x.shape[:-1], hidden.shape[-1])

        compute: _Compute = own
        for step in self.replacements:
            compute = partial(_apply, step, compute)
        y = compute(x)
        if not seen and not self._returns_tensor:
            own(x)
        if seen:
            self._returns_tensor = isinstance(seen[0], Tensor)
        for listener in self.listeners:
            listener(x, y)
        y = y.reshape(*given.shape[:-1], y.shape[-1])
        if residual is not None:
            return residual + y
        # Falcon adds the attention's output to the MLP's in place, which must not reach a listener's tensor.
        y = y.clone()
        return (y, *cast("tuple[object, ...]", seen[0])[1:]) if seen and isinstance(seen[0], tuple) else y

    def _require_width(self, what: str, hidden: Tensor, width: int) -> None:
        if hidden.shape[-1] != width:
            raise ValueError(
                f"The module '{self.site.path}' {what} vectors {hidden.shape[-1]} wide, where its linear layers or the "
                f"model's hidden_size say {width}. Give the path of a module whose widths show: a linear layer, or an "
                "MLP that is two or three of them."
            )


def _apply(step: _Step, own: _Compute, x: Tensor) -> Tensor:
    return step(x, own)


def _first_argument(
    args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Tensor, tuple[object, ...], dict[str, object]]:
    """Return the first argument of a call, and the arguments without it."""
    if args:
        return cast("Tensor", args[0]), args[1:], kwargs
    name = next(iter(kwargs))
    return cast("Tensor", kwargs[name]), (), {key: value for key, value in kwargs.items() if key != name}


@contextmanager
def _tapped(site: MlpSite) -> Generator[_Tap, None, None]:
    current = vars(site.modules[-1]).get("forward")
    tap = current if isinstance(current, _Tap) else _Tap(site)
    if not tap.users:
        tap.install()
    tap.users += 1
    try:
        yield tap
    finally:
        tap.users -= 1
        if not tap.users:
            tap.remove()


@contextmanager
def _listening(listeners: Mapping[MlpSite, Callable[[Tensor, Tensor], None]]) -> Generator[None, None, None]:
    with ExitStack() as stack:
        for site, listener in listeners.items():
            tap = stack.enter_context(_tapped(site))
            tap.listeners.append(listener)
            stack.callback(tap.listeners.remove, listener)
        yield


@contextmanager
def _replaced(steps: Mapping[MlpSite, _Step]) -> Generator[None, None, None]:
    with ExitStack() as stack:
        for site, step in steps.items():
            tap = stack.enter_context(_tapped(site))
            tap.replacements.append(step)
            stack.callback(tap.replacements.remove, step)
        yield


@contextmanager
def capture_mlp(
    model: nn.Module, layers: Collection[int], module_path: str | None = None
) -> Generator[dict[int, MlpPair], None, None]:
    """Record what flows through the MLPs of these layers; every forward pass inside refills the mapping.

    Where an MLP is replaced, what is recorded is what the replacement was given and returned. Tensors are the model's
    own, with their gradients.

    Args:
        model: A Hugging Face language model.
        layers: Indices of the blocks.
        module_path: Where the MLPs are, for a family that is not listed (see `find_mlp`).

    Raises:
        TypeError: As `find_mlp`; if the layers are none.
        ValueError: As `find_mlp`; in the forward pass, if an MLP is not given (batch, seq, d_in).
    """
    require_layers(layers)
    sites = [find_mlp(model, layer, module_path) for layer in dict.fromkeys(layers)]
    pairs: dict[int, MlpPair] = {}
    with _listening({site: partial(_record, pairs, site) for site in sites}):
        yield pairs


def _record(pairs: dict[int, MlpPair], site: MlpSite, x: Tensor, target: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(
            f"An MLP must be given a tensor of shape (batch, seq, d_in) to be captured; '{site.path}' was given "
            f"{tuple(x.shape)}. Give the path of a module that the model calls with all three axes."
        )
    pairs[site.layer] = MlpPair(x, target)


@torch.no_grad()
def mlp_pairs(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    layers: Collection[int],
    attention_mask: Tensor | None = None,
    module_path: str | None = None,
) -> dict[int, MlpPair]:
    """Return what flows through the MLPs of these layers, without gradients.

    The forward pass stops behind the MLP of the deepest layer that is wanted, and never computes logits.

    Args:
        model: A Hugging Face language model.
        input_ids: Token ids.
        layers: Indices of the blocks, at least one.
        attention_mask: 1 where there is a token and 0 where there is padding; none means no padding.
        module_path: Where the MLPs are, for a family that is not listed (see `find_mlp`).

    Raises:
        TypeError: As `find_mlp`; if the layers are none, or the ids are no tensor of whole numbers.
        ValueError: As `find_mlp`; if no layer is given, the ids are not (batch, seq), or an MLP of these is not run.
    """
    require_layers(layers)
    require_ids(input_ids)
    if not layers:
        raise ValueError("At least one layer must be given; got none.")
    deepest = find_mlp(model, max(layers), module_path)

    def stop(x: Tensor, target: Tensor) -> None:
        raise DeepestReached

    capturing, stopping = capture_mlp(model, layers, module_path), _listening({deepest: stop})
    with capturing as pairs, stopping, suppress(DeepestReached):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    missing = sorted(set(layers) - set(pairs))
    if missing:
        raise ValueError(
            f"The model must run the MLP of every layer that is wanted; a forward pass of {type(model).__name__} did "
            f"not run that of layers {missing}. Give the path of the module that it does run."
        )
    return pairs


@contextmanager
def replace_mlp(
    model: nn.Module,
    replacements: Mapping[int, Replacement],
    *,
    passthrough: Collection[int] = (),
    module_path: str | None = None,
    allow_misplaced: bool = False,
) -> Generator[None, None, None]:
    """Put something in the place of the MLPs of these layers, at every position.

    A sparse layer that reads the MLP's output, and positions that pass through, run what is replaced; otherwise it is
    not run at all. (In a mixture of experts and in a family that is not listed it is run once, to see whether it
    returns a tuple; if it does, it is always run, because the rest of the tuple is its own.) The input is cast to the
    replacement's dtype and its output to the dtype that the MLP would have returned.

    Args:
        model: A Hugging Face language model.
        replacements: What to put in the place of each layer's MLP. An `MlpSite` stands for the model's own MLP there.
        passthrough: Token ids at whose positions the output stays what it was (BOS, padding).
        module_path: Where the MLPs are, for a family that is not listed (see `find_mlp`).
        allow_misplaced: Whether a sparse layer may stand where its provenance says that it does not belong: in
            another block, in the place of another module, or in another model.

    Raises:
        TypeError: As `find_mlp`; if the replacements are not given by block, or one can replace nothing.
        ValueError: As `find_mlp`; if the widths do not agree, or a sparse layer belongs elsewhere; in the forward pass,
            if a replacement's output has the wrong shape, or positions are to pass through and the model is given
            embeddings rather than token ids.
    """
    require_by_block(replacements, "replacements")
    require_tokens(passthrough)
    sites = {layer: find_mlp(model, layer, module_path) for layer in replacements}
    kept = _PassthroughPositions(passthrough) if passthrough else None
    steps: dict[MlpSite, _Step] = {}
    for layer, replacement in replacements.items():
        require_replacement(layer, replacement)
        if isinstance(replacement, SparseLayer) and not allow_misplaced:
            require_own_place(model, sites[layer], replacement.provenance)
        require_widths(sites[layer], replacement)
        steps[sites[layer]] = partial(_replacement_step, sites[layer], replacement, kept)
    with ExitStack() as stack:
        if kept is not None:
            stack.callback(model.register_forward_pre_hook(kept.note_ids, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(kept.forget_ids, always_call=True).remove)
        stack.enter_context(_replaced(steps))
        yield


@contextmanager
def ablate_mlp(
    model: nn.Module,
    means: Mapping[int, Float[Tensor, " d_out"] | None],
    *,
    passthrough: Collection[int] = (),
    module_path: str | None = None,
) -> Generator[None, None, None]:
    """Put a constant in the place of the outputs of these layers' MLPs.

    Args:
        model: A Hugging Face language model.
        means: The vector that each layer's MLP is to return; None for zero.
        passthrough: Token ids at whose positions the output stays what it was (BOS, padding).
        module_path: Where the MLPs are, for a family that is not listed (see `find_mlp`).

    Raises:
        TypeError: As `replace_mlp`.
        ValueError: As `replace_mlp`; if a vector does not have the width of the MLP's output.
    """
    require_by_block(means, "means")
    constants: dict[int, Replacement] = {}
    for layer, mean in means.items():
        site = find_mlp(model, layer, module_path)
        if mean is not None and mean.shape != (site.d_out,):
            raise ValueError(
                f"The mean of layer {layer}'s MLP must have shape ({site.d_out},), the width of its output; "
                f"got {tuple(mean.shape)}."
            )
        constants[layer] = partial(_constant, site.d_out, mean)
    with replace_mlp(model, constants, passthrough=passthrough, module_path=module_path):
        yield


class _PassthroughPositions:
    """Where the current forward pass has one of these tokens."""

    def __init__(self, token_ids: Collection[int]):
        self._token_ids = torch.tensor(sorted(token_ids))
        self._input_ids: Tensor | None = None

    def note_ids(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(input_ids, Tensor):
            raise ValueError(
                "Passthrough needs the token ids of every forward pass; the model was called without input_ids. "
                "Call it with input_ids instead of inputs_embeds, or replace the MLP at every position."
            )
        self._input_ids = input_ids

    def forget_ids(self, model: nn.Module, args: tuple[object, ...], output: object) -> None:
        self._input_ids = None

    def mask(self, x: Tensor) -> Tensor:
        if self._input_ids is None or self._input_ids.shape != x.shape[:-1]:
            found = None if self._input_ids is None else tuple(self._input_ids.shape)
            raise ValueError(
                f"Passthrough needs one token id for each position of the MLP's input, {tuple(x.shape[:-1])}; "
                f"found {found}. Call the whole model with input_ids, or replace the MLP at every position."
            )
        # Moved once: every layer of every forward pass asks.
        self._token_ids = self._token_ids.to(x.device)
        return torch.isin(self._input_ids.to(x.device), self._token_ids).unsqueeze(-1)


def _replacement_step(
    site: MlpSite, replacement: Replacement, kept: _PassthroughPositions | None, x: Tensor, own: _Compute
) -> Tensor:
    if isinstance(replacement, MlpSite):
        y = replacement(x)
    elif isinstance(replacement, SparseLayer):
        given = own(x) if replacement.reads == "output" else x
        y = replacement(given.to(_parameter_dtype(replacement, given))).prediction
    elif isinstance(replacement, nn.Module):
        y = replacement(x.to(_parameter_dtype(replacement, x)))
    else:
        y = replacement(x)
    expected = (*x.shape[:-1], site.d_out)
    if y.shape != expected:
        raise ValueError(
            f"A replacement must return the MLP's output shape {expected} at '{site.path}'; got {tuple(y.shape)}."
        )
    y = y.to(_returned_dtype(x))
    return y if kept is None else torch.where(kept.mask(x), own(x), y)


def _constant(d_out: int, mean: Tensor | None, x: Tensor) -> Tensor:
    vector = x.new_zeros(d_out) if mean is None else mean.to(x)
    return vector.expand(*x.shape[:-1], d_out)


def _parameter_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)


def _returned_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a linear map of `x`, which is what every MLP ends with."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
