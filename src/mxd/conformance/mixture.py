"""Checks of mixtures of decoders, with the lemmas of Oldfield et al. (2025); other kinds pass them unlooked at."""

import copy

import torch

from mxd.conformance.example import dense_code, example, require, require_close
from mxd.layers import MixtureOfDecoders, SparseLayer


def check_expert_tensor(layer: SparseLayer, *, seed: int = 0) -> None:
    r"""Check Lemma 2 of a mixture of decoders: its forward pass is that of the tensor it never builds.

    The tensor's three forms are the explicit sum $\sum_n a_n W_n^\top z$, the Khatri–Rao form of its third unfolding,
    $W_{(3)} = (C \odot D)^\top$, and the mode products $W \times_1 a \times_2 z$.
    """
    mixture, x, _ = example(layer, seed)
    if not isinstance(mixture, MixtureOfDecoders):
        return
    output, z = mixture(x), mixture.encoder(x)
    a = dense_code(mixture, output.code)
    tensor = torch.stack([mixture.expert_weight(n) for n in range(mixture.config.num_experts)])
    explicit = mixture.base(x) + sum(a[:, n, None] * (z @ tensor[n]) for n in range(len(tensor)))
    require_close(output.prediction, explicit, "the prediction must be Σ_n a_n W_nᵀ z + b")
    columns = zip(mixture.W_expert.t(), mixture.W_dec.t(), strict=True)
    khatri_rao = torch.stack([torch.kron(c, d) for c, d in columns], dim=1)
    unfolding = tensor.permute(2, 0, 1).flatten(1)
    require_close(unfolding, khatri_rao.t(), "the experts' third unfolding must be the Khatri-Rao product (C ⊙ D)ᵀ")
    folded = torch.stack([khatri_rao.t() @ torch.kron(*row) for row in zip(a, z, strict=True)]) + mixture.base(x)
    require_close(output.prediction, folded, "the prediction must be (C ⊙ D)ᵀ (a ⊗ z) + b")
    first_mode = (a @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])
    modes = torch.linalg.vecdot(z[:, :, None], first_mode, dim=1) + mixture.base(x)
    require_close(output.prediction, modes, "the prediction must be W ×₁ a ×₂ z + b")


def check_expert_rank(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check Lemma 1 of a mixture of decoders: an expert has the rank of the decoder's columns in its own support."""
    mixture, _, generator = example(layer, seed)
    if not isinstance(mixture, MixtureOfDecoders):
        return
    d_hidden, d_out = mixture.W_dec.shape
    full = min(d_hidden, d_out)
    for rank in sorted({full, max(1, full // 2), 1}, reverse=True):
        left = torch.randn(d_hidden, rank, generator=generator, dtype=torch.float64)
        right = torch.randn(rank, d_out, generator=generator, dtype=torch.float64)
        for zeros in sorted({0, 1, d_out // 2, d_out - 1, d_out}):
            vector = torch.rand(d_out, generator=generator, dtype=torch.float64) + 0.5
            vector[torch.randperm(d_out, generator=generator)[:zeros]] = 0.0
            with torch.no_grad():
                mixture.W_dec.copy_(left @ right)
                mixture.W_expert[0] = vector
            found = int(torch.linalg.matrix_rank(mixture.expert_weight(0)))
            expected = min(rank, d_out - zeros)
            require(
                found == expected == int(torch.linalg.matrix_rank(mixture.W_dec[:, vector != 0])),
                f"an expert with {zeros} zeros over a decoder of rank {rank} must have rank {expected}; got {found}.",
            )


def check_first_step(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that a mixture of decoders whose decoder is zero moves only the decoder and the output bias at first."""
    mixture, x, generator = example(layer, seed)
    if not isinstance(mixture, MixtureOfDecoders):
        return
    with torch.no_grad():
        mixture.W_dec.zero_()
    before = copy.deepcopy(mixture.state_dict())
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=0.1, weight_decay=0.0)
    target = torch.randn(len(x), mixture.config.d_out, generator=generator, dtype=x.dtype)
    (mixture(x).prediction - target).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in mixture.state_dict().items() if not torch.equal(tensor, before[name])}
    require(
        moved == {"W_dec", "b_dec"},
        f"from a decoder of zeros the first step must move W_dec and b_dec only; it moved {', '.join(sorted(moved))}.",
    )
