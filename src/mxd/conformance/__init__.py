"""A conformance suite for sparse layers, after the fashion of scikit-learn's `check_estimator`.

`check_layer` runs every check that applies to a layer; it serves layers that are not part of this library as well.
A check works on a float64 copy on the CPU whose parameters are drawn at random (the zeros of an initialisation prove
nothing), and leaves the given layer and the global random state as they were. All latents are written out densely, so
the layer should be small.
"""

import torch

from mxd.conformance.compiling import check_compiles
from mxd.conformance.contract import (
    check_affine,
    check_autocast,
    check_batch_dimensions,
    check_bfloat16,
    check_code,
    check_dense_branch,
    check_encode_among,
    check_fixed_atoms,
    check_forward,
    check_gradients,
    check_input_maps,
)
from mxd.conformance.example import Check
from mxd.conformance.mixture import check_expert_rank, check_expert_tensor, check_first_step
from mxd.conformance.saving import check_resaving, check_saving
from mxd.layers import SparseLayer

__all__ = [
    "CHECKS",
    "Check",
    "check_affine",
    "check_autocast",
    "check_batch_dimensions",
    "check_bfloat16",
    "check_code",
    "check_compiles",
    "check_dense_branch",
    "check_encode_among",
    "check_expert_rank",
    "check_expert_tensor",
    "check_first_step",
    "check_fixed_atoms",
    "check_forward",
    "check_gradients",
    "check_input_maps",
    "check_layer",
    "check_resaving",
    "check_saving",
]

CHECKS: tuple[Check, ...] = (
    check_forward,
    check_code,
    check_affine,
    check_dense_branch,
    check_fixed_atoms,
    check_gradients,
    check_encode_among,
    check_batch_dimensions,
    check_input_maps,
    check_bfloat16,
    check_autocast,
    check_expert_tensor,
    check_expert_rank,
    check_first_step,
    check_saving,
)
"""The checks that `check_layer` runs; each returns at once for a layer that it does not apply to."""


def check_layer(layer: SparseLayer, *, seed: int = 0) -> None:
    """Run every check that applies to this layer.

    Args:
        layer: A small layer; it is not altered.
        seed: Seed of the random parameters and inputs.

    Raises:
        AssertionError: If the layer breaks the contract; the message is one sentence saying what does not hold.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for check in CHECKS:
            check(layer, seed=seed)
