"""What all formats have in common: a layer as an encoder, a rule for which latents are active, and decoder rows."""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.checkpoint import require_one_dtype
from mxd.edits import edits_of, fold_edits
from mxd.layers import BatchTopK, SelectionName, SkipTranscoder, SparseLayer, TopKAutoencoder, Transcoder

Format = Literal["sparsify", "saelens", "circuit-tracer"]
"""Whose files are written: EleutherAI's sparsify, SAELens, or circuit-tracer."""

FORMATS: tuple[Format, ...] = get_args(Format)

PLAIN_KINDS = (Transcoder.kind, SkipTranscoder.kind, TopKAutoencoder.kind)
"""Kinds that are an encoder, a rule and decoder rows, beside at most a linear map."""


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class DoesNotFit(ValueError):
    """A format has no place for a layer, or for where the layer belongs; the sentence says why, and what would fit."""


class PlainLayer(NamedTuple):
    r"""All that a layer computes, where its latents add fixed rows and nothing nonlinear stands beside them.

    $$y = \sum_n a_n d_n + W_\mathrm{skip}^\top x + b, \qquad
      a = \mathrm{rule}(W_\mathrm{enc}^\top x' + b_\mathrm{enc})$$

    with $x' = x - b$ in an autoencoder and $x' = x$ otherwise. The rule keeps, of the positive scores, the `k` largest
    (topk), those above `threshold` (batch-topk, as in evaluation) or all (l1).
    """

    kind: str
    """The layer's kind."""
    W_enc: Float[Tensor, "d_in num_latents"]
    """Encoder."""
    b_enc: Float[Tensor, " num_latents"]
    """Encoder's bias."""
    W_dec: Float[Tensor, "num_latents d_out"]
    """Decoder."""
    b_dec: Float[Tensor, " d_out"]
    """Output bias."""
    W_skip: Float[Tensor, "d_in d_out"] | None
    """Linear map of the input, if there is one."""
    is_autoencoder: bool
    """Whether it reads the MLP's output, with the output bias taken off."""
    rule: SelectionName
    """Which latents are active."""
    k: int
    """How many at most, with topk; on average or as a goal otherwise."""
    threshold: float
    """Scores up to this are not active; 0 but for batch-topk."""

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.W_dec.shape[1]

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def dtype_name(self) -> str:
        """Type of the weights, as in `float32`."""
        return str(self.W_enc.dtype).removeprefix("torch.")


def plain_layer(layer: SparseLayer, form: Format) -> PlainLayer:
    """Return a layer as every format sees it, with its edits, if any, in its weights.

    Args:
        layer: The layer; it stays as it is.
        form: For which format, for messages.

    Raises:
        DoesNotFit: If it is no encoder with a rule and decoder rows, or weights do not hold its edits.
        ValueError: If its weights are not finite, or not of one type that other tools read.
    """
    require_plain_kind(type(layer), form)
    require_weights(f"A {layer.kind} to be exported", layer.state_dict())
    if edits_of(layer):
        try:
            layer = fold_edits(layer)
            require_weights(f"An edited {layer.kind}", layer.state_dict())
        except ValueError as error:
            raise DoesNotFit(f"{form} has no place for edits beside weights. {error}") from error
    skip = layer.W_skip if isinstance(layer, SkipTranscoder) else None
    selection = layer.selection
    assert isinstance(layer, Transcoder | SkipTranscoder | TopKAutoencoder)
    return PlainLayer(
        kind=layer.kind,
        W_enc=layer.W_enc.detach().cpu(),
        b_enc=layer.b_enc.detach().cpu(),
        W_dec=layer.W_dec.detach().cpu(),
        b_dec=layer.b_dec.detach().cpu(),
        W_skip=None if skip is None else skip.detach().cpu(),
        is_autoencoder=isinstance(layer, TopKAutoencoder),
        rule=layer.config.selection,
        k=layer.config.k,
        # No score that is not positive is active, whatever the threshold.
        threshold=max(0.0, selection.threshold.item()) if isinstance(selection, BatchTopK) else 0.0,
    )


def require_weights(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that weights are numbers that every tool reads: finite, of one of the usual floating-point types.

    Args:
        where: What has them, for the message.
        tensors: The weights by their names.

    Raises:
        ValueError: If they are not.
    """
    require_one_dtype(where, tensors)
    unusual = sorted({str(tensor.dtype) for tensor in tensors.values()} - set(map(str, _DTYPES)))
    if unusual:
        raise ValueError(f"{where} must have weights of 16, 32 or 64 bits; got {unusual[0]}. Convert them with .to().")
    infinite = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if infinite:
        raise ValueError(f"{where} must have finite weights; {', '.join(infinite)} has NaN or infinite entries.")


def require_plain_kind(layer: type[SparseLayer], form: Format) -> None:
    """Check that layers of a class are an encoder, a rule and decoder rows.

    Raises:
        DoesNotFit: If they are not.
    """
    if layer in (Transcoder, SkipTranscoder, TopKAutoencoder):
        return
    fits = f"What fits: {', '.join(PLAIN_KINDS)}."
    if issubclass(layer, Transcoder | SkipTranscoder | TopKAutoencoder):
        raise DoesNotFit(f"{form} is written of mxd's own kinds; {layer.__name__} changes one of them. {fits}")
    if not layer.fixed_atoms:
        raise DoesNotFit(
            f"{form} holds one decoder row for each latent; what a latent of {layer.kind} adds depends on the input, "
            f"so it has no such row. {fits}"
        )
    raise DoesNotFit(
        f"{form} holds latents and at most a linear map beside them; {layer.kind} has more than that (a dense expert "
        f"in shared-transcoder), which would be lost. {fits}"
    )


def require_one_width(layer: PlainLayer, form: Format) -> None:
    """Check that a layer's output is as wide as its input.

    Raises:
        DoesNotFit: If it is not.
    """
    if layer.d_in != layer.d_out:
        raise DoesNotFit(
            f"{form} holds such layers with one width for input and output; this {layer.kind} reads {layer.d_in} and "
            f"writes {layer.d_out}. What fits: a layer of a model whose MLPs write as many numbers as they read."
        )
