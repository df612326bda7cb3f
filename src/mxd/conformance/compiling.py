"""The check of a layer that is compiled."""

import torch

from mxd.conformance.example import dense_code, example, gradients_of, require_close
from mxd.layers import SparseLayer


def check_compiles(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that `torch.compile` takes the layer as one graph and changes neither values nor gradients.

    `check_layer` leaves it out: it takes long, needs a C++ compiler, and jaxtyping's import hook breaks it.
    """
    layer, x, _ = example(layer, seed)
    expected = layer(x.requires_grad_())
    # Layers share their code, of which a process compiles only so many versions.
    torch.compiler.reset()
    output = torch.compile(layer, fullgraph=True)(x)
    require_close(output.prediction, expected.prediction, "the compiled layer must make the same prediction")
    dense, wanted = dense_code(layer, output.code), dense_code(layer, expected.code)
    require_close(dense, wanted, "the compiled layer must return the same code")
    eager = gradients_of(layer, x, expected.prediction, wanted)
    for (name, gradient), (_, uncompiled) in zip(gradients_of(layer, x, output.prediction, dense), eager, strict=True):
        require_close(gradient, uncompiled, f"the compiled layer must have the same gradient of {name}")
