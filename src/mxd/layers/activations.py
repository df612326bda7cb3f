"""The activation functions that a dense encoder may have."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid"]
"""Name of an activation; `gelu` is exact, `gelu_tanh` its tanh approximation."""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return the elementwise function of this name.

    Raises:
        ValueError: If there is none.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}; got {name!r}.")
    return _FUNCTIONS[name]
