"""The weights of a dense MLP, as layers take them over."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class MlpWeights(NamedTuple):
    r"""The weights of a dense MLP, used as `x @ W`, in float32.

    $$t = W_\mathrm{dec}^\top \phi(W_\mathrm{enc}^\top x + b_\mathrm{enc}) + b_\mathrm{dec}$$

    or, where it is gated, with $\psi(W_\mathrm{gate}^\top x + b_\mathrm{gate}) \circ
    (W_\mathrm{enc}^\top x + b_\mathrm{enc})$ for its hidden units.
    """

    W_enc: Float[Tensor, "d_in d_hidden"]
    """The map that the activation reads, or of a gated MLP the one that it does not."""
    b_enc: Float[Tensor, " d_hidden"]
    """Its bias; zeros where there is none."""
    W_enc_gate: Float[Tensor, "d_in d_hidden"] | None
    """The map that the activation of a gated MLP reads."""
    b_enc_gate: Float[Tensor, " d_hidden"] | None
    """Its bias."""
    W_dec: Float[Tensor, "d_hidden d_out"]
    """The map to the output."""
    b_dec: Float[Tensor, " d_out"]
    """Its bias."""
