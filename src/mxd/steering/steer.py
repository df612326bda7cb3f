"""A model whose replaced MLPs are steered, for as long as a context is open."""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mxd.edits import CodeEditor, Edit, edits_of, with_edits
from mxd.layers import SparseCode, SparseLayer
from mxd.models import replace_mlp

NO_POSITION = -1
"""What stands at padding in place of a position."""


@contextmanager
def steer(
    model: nn.Module,
    layers: Mapping[int, SparseLayer],
    edits: Mapping[int, Sequence[Edit]],
    *,
    passthrough: Collection[int] = (),
    module_path: str | None = None,
    allow_misplaced: bool = False,
) -> Generator[None, None, None]:
    """Put sparse layers in the place of MLPs, with these edits of their codes, for every forward pass inside.

    Any way of running the model will do, `model.generate` with its key-value cache, batches padded on the left, beams
    and sampling among them. Edits that a layer has already come first.

    Args:
        model: A Hugging Face language model.
        layers: The sparse layer that stands in for each block's MLP.
        edits: What happens to the code of each of these layers; a layer that is left out is replaced only.
        passthrough: Token ids at whose positions the original MLP's output stays.
        module_path: Where the MLPs are, for a family that is not listed.
        allow_misplaced: As in `replace_mlp`.

    Raises:
        TypeError: As `replace_mlp`.
        ValueError: As `replace_mlp`; if edits are for a layer that is not given or name a latent that it has not.

    Example:
        >>> edit = Edit(latents=(3,), operation=Add(amount=10.0), positions=Span(start=5))  # doctest: +SKIP
        >>> with steer(model, {8: layer}, {8: [edit]}):  # doctest: +SKIP
        ...     model.generate(**tokenizer("Let's talk about ", return_tensors="pt"), max_new_tokens=32)
    """
    unknown = sorted(set(edits) - set(layers))
    if unknown:
        raise ValueError(f"Edits must be for layers that are given, {sorted(layers)}; got some for {unknown}.")
    where = _Positions()
    steered = {block: _steered(layer, edits.get(block, ()), where) for block, layer in layers.items()}
    with ExitStack() as stack:
        if any(edit.positions is not None for some in edits.values() for edit in some):
            stack.callback(model.register_forward_pre_hook(where.note, with_kwargs=True).remove)
        replaced = replace_mlp(
            model, steered, passthrough=passthrough, module_path=module_path, allow_misplaced=allow_misplaced
        )
        stack.enter_context(replaced)
        yield


def _steered(layer: SparseLayer, edits: Sequence[Edit], where: "_Positions") -> SparseLayer:
    editor = CodeEditor((*edits_of(layer), *edits), layer.config.num_latents)

    def edit(code: SparseCode) -> SparseCode:
        return editor(code, where.now)

    result = with_edits(layer, ())
    result.edit = edit if editor.edits else None
    return result


class _Positions:
    """Where in its sequence each token of the current forward pass stands."""

    def __init__(self) -> None:
        self.now: Int[Tensor, "batch seq"] | None = None

    def note(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        tokens = args[0] if given is None and args else given
        if not isinstance(tokens, Tensor):
            raise ValueError(
                "Steering at chosen positions needs input_ids or inputs_embeds in every forward pass; the model was "
                "called with neither. Call it with input_ids, or steer everywhere."
            )
        self.now = positions_of(tokens.shape[0], tokens.shape[1], kwargs).to(tokens.device)


def positions_of(batch: int, seq: int, kwargs: Mapping[str, object]) -> Int[Tensor, "batch seq"]:
    """Return where in its sequence each token of a forward pass stands, `NO_POSITION` at padding.

    The attention mask counts the tokens, those in the key-value cache too, wherever padding stands. Without one (a
    static cache is given a mask of attention instead) the model's own position ids do, and without these the length of
    the cache.

    Args:
        batch: Sequences.
        seq: Tokens of each that are new.
        kwargs: What the model was called with.
    """
    mask, ids, cache = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    if isinstance(mask, Tensor) and mask.ndim == 2:
        counted = mask.long().cumsum(-1) - 1
        return torch.where(mask > 0, counted, NO_POSITION)[:, -seq:]
    if isinstance(ids, Tensor) and ids.ndim == 2:
        return ids.long().expand(batch, seq)
    past = 0 if cache is None else int(cast(Any, cache).get_seq_length())
    return torch.arange(past, past + seq).expand(batch, seq)
