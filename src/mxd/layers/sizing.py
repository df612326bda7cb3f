"""How large a layer is, and how large it must be to match another.

The field compares kinds at equal parameters: a budget is what a transcoder of a given expansion has, and each kind
gets as many latents as the budget pays for.
"""

from mxd.layers.dense_encoder import Encoder

EXPANSION = 32
"""Latents of the reference transcoder per unit of input width (Oldfield et al., 2025)."""


def transcoder_budget(d_in: int, d_out: int, expansion: int = EXPANSION) -> int:
    """Return the number of parameters of a transcoder with `expansion · d_in` latents.

    Raises:
        ValueError: If a size is not positive.
    """
    for name, size in {"d_in": d_in, "d_out": d_out, "expansion": expansion}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")
    return num_parameters("transcoder", expansion * d_in, d_in, d_out)


def num_parameters(
    kind: str, num_latents: int, d_in: int, d_out: int, d_hidden: int = 0, encoder: Encoder = "mlp"
) -> int:
    """Return the number of parameters of a layer of this kind and size.

    Args:
        kind: `mxd`, `transcoder`, `skip-transcoder` or `topk-sae`.
        num_latents: Size of the code.
        d_in: Width of the input; for `topk-sae` the width of the MLP's output.
        d_out: Width of the output.
        d_hidden: Dense hidden units; read for `mxd` only.
        encoder: Dense encoder; read for `mxd` only.

    Raises:
        ValueError: If the kind is unknown.
    """
    per_latent, fixed = _affine_count(kind, d_in, d_out, d_hidden, encoder)
    return num_latents * per_latent + fixed


def matched_num_latents(
    kind: str, budget: int, d_in: int, d_out: int, d_hidden: int = 0, encoder: Encoder = "mlp"
) -> int:
    """Return the number of latents whose layer comes nearest to a budget of parameters.

    Raises:
        ValueError: If the kind is unknown, or the budget does not pay for a single latent.
    """
    per_latent, fixed = _affine_count(kind, d_in, d_out, d_hidden, encoder)
    if budget < fixed + per_latent:
        raise ValueError(
            f"the budget must pay for at least one latent of {kind!r}, {fixed + per_latent:,} parameters; "
            f"got {budget:,}. Raise the expansion, or set the number of latents or a smaller hidden width."
        )
    return round((budget - fixed) / per_latent)


def paper_num_experts(d_model: int, d_hidden: int, encoder: Encoder = "mlp", expansion: int = EXPANSION) -> int:
    """Return the number of experts as the paper's released scripts round it.

    For an MLP encoder the scripts charge the mixture `expansion · d_model` biases where it has `d_hidden`, and take
    the hidden width to be four times `d_model`; the match is off by about 0.05 % (papers.md 1.5). With expansion 32
    it gives 21,490 experts for GPT-2, 28,658 and 57,330 for Pythia 410M and 1.4B, and 86,015 for Llama 3.2 3B (GLU).
    """
    budget = 2 * expansion * d_model**2 + expansion * d_model + d_model
    if encoder == "glu":
        dense = 2 * d_hidden * (d_model + 1) + d_model * (d_hidden + 1)
        return (budget - dense) // (2 * d_model + 1)
    dense = 2 * d_hidden * d_model + expansion * d_model + d_model
    return round((budget - dense) / (2 * d_model + 1))


def flops_per_token(
    kind: str, num_latents: int, k: int, d_in: int, d_out: int, d_hidden: int = 0, encoder: Encoder = "mlp"
) -> int:
    """Return the floating-point operations of one token's forward pass, two per multiply-add, decoding `k` rows.

    Biases, activations and the selection are left out. For GPT-2 (21,490 experts, k 32) this is 42.5 million where
    the original MLP takes 9.4 (papers.md 1.5).

    Raises:
        ValueError: If the kind is unknown.
    """
    _affine_count(kind, d_in, d_out, d_hidden, encoder)
    dense = 0
    if kind == "mxd":
        dense = (2 if encoder == "glu" else 1) * d_in * d_hidden + d_hidden * d_out
    elif kind == "skip-transcoder":
        dense = d_in * d_out
    return 2 * (num_latents * d_in + k * d_out + dense)


def _affine_count(kind: str, d_in: int, d_out: int, d_hidden: int, encoder: Encoder) -> tuple[int, int]:
    """Return the parameters per latent and those that a layer has whatever its number of latents."""
    per_latent = d_in + d_out + 1
    branches = 2 if encoder == "glu" else 1
    match kind:
        case "mxd":
            return per_latent, branches * d_hidden * (d_in + 1) + d_hidden * d_out + d_out
        case "transcoder" | "topk-sae":
            return per_latent, d_out
        case "skip-transcoder":
            return per_latent, d_out + d_in * d_out
        case _:
            raise ValueError(f"kind must be one of mxd, transcoder, skip-transcoder, topk-sae; got {kind!r}.")
