"""The dense hidden units of a mixture or a shared expert: what the original MLP has, and stays dense here."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from mxd.kernels import linear
from mxd.layers.activations import Activation, activation_function
from mxd.layers.initialization import uniform, zeros
from mxd.layers.mlp_weights import MlpWeights
from mxd.layers.sparse_layer import LinearMap

Encoder = Literal["mlp", "glu"]
"""Which dense encoder: one branch, or two of which the activated one gates the other."""


class MlpEncoder(nn.Module):
    r"""Hidden units $z = \phi(E^\top x + b_E)$."""

    W_enc: Float[nn.Parameter, "d_in d_hidden"]
    b_enc: Float[nn.Parameter, " d_hidden"]

    def __init__(self, d_in: int, d_hidden: int, activation: Activation, generator: Generator | None):
        super().__init__()
        self.activation = activation_function(activation)
        self.W_enc = uniform(d_in, d_hidden, bound=d_in**-0.5, generator=generator)
        self.b_enc = zeros(d_hidden)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_hidden"]:
        """Return the hidden units."""
        return self.activation(linear(x, self.W_enc, self.b_enc))

    def begin_from(self, mlp: MlpWeights) -> None:
        """Take an MLP's hidden units for the first of these; what is wider than the MLP stays as it was drawn.

        Raises:
            ValueError: If they are gated, or more than there are here.
        """
        _take_over([(self.W_enc, mlp.W_enc), (self.b_enc, mlp.b_enc)], gated=mlp.W_enc_gate is not None, encoder="mlp")

    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return the one branch."""
        return (LinearMap(self.W_enc, self.b_enc),)


class GluEncoder(nn.Module):
    r"""Hidden units $z = \psi(E_g^\top x + b_g) \circ (E^\top x + b_E)$."""

    W_enc_gate: Float[nn.Parameter, "d_in d_hidden"]
    b_enc_gate: Float[nn.Parameter, " d_hidden"]
    W_enc: Float[nn.Parameter, "d_in d_hidden"]
    b_enc: Float[nn.Parameter, " d_hidden"]

    def __init__(self, d_in: int, d_hidden: int, activation: Activation, generator: Generator | None):
        super().__init__()
        self.activation = activation_function(activation)
        self.W_enc_gate = uniform(d_in, d_hidden, bound=d_in**-0.5, generator=generator)
        self.b_enc_gate = zeros(d_hidden)
        self.W_enc = uniform(d_in, d_hidden, bound=d_in**-0.5, generator=generator)
        self.b_enc = uniform(d_hidden, bound=d_in**-0.5, generator=generator)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_hidden"]:
        """Return the hidden units."""
        gate = self.activation(linear(x, self.W_enc_gate, self.b_enc_gate))
        return gate * linear(x, self.W_enc, self.b_enc)

    def begin_from(self, mlp: MlpWeights) -> None:
        """Take a gated MLP's hidden units for the first of these; what is wider than the MLP stays as it was drawn.

        Raises:
            ValueError: If they are not gated, or more than there are here.
        """
        pairs = [(self.W_enc, mlp.W_enc), (self.b_enc, mlp.b_enc)]
        if mlp.W_enc_gate is not None and mlp.b_enc_gate is not None:
            pairs += [(self.W_enc_gate, mlp.W_enc_gate), (self.b_enc_gate, mlp.b_enc_gate)]
        _take_over(pairs, gated=mlp.W_enc_gate is not None, encoder="glu")

    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return both branches."""
        return LinearMap(self.W_enc_gate, self.b_enc_gate), LinearMap(self.W_enc, self.b_enc)


def _take_over(pairs: Sequence[tuple[nn.Parameter, Tensor]], *, gated: bool, encoder: Encoder) -> None:
    own, width = pairs[0][1].shape[1], pairs[0][0].shape[1]
    if gated != (encoder == "glu") or width < own:
        raise ValueError(
            f"the dense encoder must be as the model's own, {'glu' if gated else 'mlp'}, and at least {own} wide to "
            f"begin as it; got {encoder}, {width} wide. Leave --hidden and --encoder at auto, or begin with --init "
            "paper."
        )
    with torch.no_grad():
        for parameter, weight in pairs:
            parameter[..., :own].copy_(weight)


def num_branches(encoder: Encoder) -> int:
    """Return the number of linear maps of the input that the encoder of this name has."""
    return 2 if encoder == "glu" else 1


ENCODERS: dict[str, type[MlpEncoder] | type[GluEncoder]] = {"mlp": MlpEncoder, "glu": GluEncoder}


def dense_encoder(
    encoder: str, d_in: int, d_hidden: int, activation: Activation, generator: Generator | None
) -> MlpEncoder | GluEncoder:
    """Return the dense encoder of this name, freshly drawn (Oldfield et al., 2025: uniform, bound 1/√d_in).

    Raises:
        ValueError: If there is no such encoder.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(get_args(Encoder))}; got {encoder!r}.")
    return ENCODERS[encoder](d_in, d_hidden, activation, generator)
