"""How large a layer is, and how large it must be to match another.

The field compares kinds at equal parameters: a budget is what a transcoder of a given expansion has, and each kind
gets as many latents as the budget pays for. What a layer of some size has and costs is said by its configuration
(`num_parameters`, `flops_per_token`); here kinds are asked for sizes that nobody has built.
"""

from dataclasses import replace

from mxd.layers import LayerRequest, require_kind
from mxd.layers.dense_encoder import Encoder, num_branches

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
    kind: str,
    num_latents: int,
    d_in: int,
    d_out: int,
    d_hidden: int = 0,
    encoder: Encoder = "mlp",
    rank: int | None = None,
) -> int:
    """Return the number of parameters of a layer of this kind and size.

    Args:
        kind: A registered kind.
        num_latents: Size of the code.
        d_in: Width of the MLP's input; a `topk-sae` does not read it.
        d_out: Width of the MLP's output.
        d_hidden: Dense hidden units; read by mixtures that have them.
        encoder: Dense encoder; read by the same.
        rank: Rank of `low-rank`'s experts and of `molt`'s widest transforms; a quarter of d_out where it is None.

    Raises:
        ValueError: If the kind is unknown or a size that it reads is not positive.
    """
    request = _request(d_in, d_out, d_hidden, encoder, rank)
    return require_kind(kind).configure(replace(request, num_latents=num_latents)).num_parameters


def matched_num_latents(
    kind: str,
    budget: int,
    d_in: int,
    d_out: int,
    d_hidden: int = 0,
    encoder: Encoder = "mlp",
    rank: int | None = None,
) -> int:
    """Return the number of latents whose layer comes nearest to a budget of parameters; see `num_parameters`.

    Raises:
        ValueError: If the kind is unknown, or the budget does not pay for a single latent.
    """
    return match_budget(kind, budget, _request(d_in, d_out, d_hidden, encoder, rank))


def shared_width(budget: int, request: LayerRequest) -> int:
    """Return how wide a shared expert is that takes half of a budget of parameters, and no narrower than was asked for.

    Half is where the sweep of docs/method.md has both little error and specialised latents.
    """
    unit = num_branches(request.encoder) * (request.d_in + 1) + request.d_out
    return max(request.d_hidden, budget // 2 // unit)


def widest_rank(kind: str, budget: int, num_latents: int, request: LayerRequest) -> int:
    """Return the widest rank with which a budget of parameters pays for so many latents.

    It is the largest of the output's width, its half, its quarter and so on, rounded down; 1 where none will do.

    Raises:
        ValueError: If the kind is unknown.
    """
    tried = replace(request, num_latents=num_latents, k=1, selection="topk")
    rank = request.d_out
    while rank > 1 and require_kind(kind).configure(replace(tried, rank=rank)).num_parameters > budget:
        rank //= 2
    return rank


def match_budget(kind: str, budget: int, request: LayerRequest) -> int:
    """Return the number of latents with which what was asked for comes nearest to a budget of parameters.

    Of two that are equally near, the even one is taken, as by `round`.

    Raises:
        ValueError: If the kind is unknown, or the budget does not pay for a single latent.
    """

    def size(num_latents: int) -> int:
        # A selection changes no size, and not every one serves the sizes that are tried on the way.
        tried = replace(request, num_latents=num_latents, k=1, selection="topk")
        return require_kind(kind).configure(tried).num_parameters

    low, high = 1, 2
    if budget < size(low):
        raise ValueError(
            f"the budget must pay for at least one latent of {kind!r}, {size(low):,} parameters; "
            f"got {budget:,}. Raise the expansion, or set the number of latents or a smaller hidden width."
        )
    while size(high) <= budget:
        low, high = high, 2 * high
    # A layer of `low` latents is paid for and one of `high` is not, until the two are neighbours.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return min(low, high, key=lambda num_latents: (abs(size(num_latents) - budget), num_latents % 2))


def paper_num_experts(d_model: int, d_hidden: int, encoder: Encoder = "mlp", expansion: int = EXPANSION) -> int:
    """Return the number of experts as the paper's released scripts round it.

    For an MLP encoder the scripts charge the mixture `expansion · d_model` biases where it has `d_hidden`, and take
    the hidden width to be four times `d_model`; the match is off by about 0.05 % (Oldfield et al., 2025). With
    expansion 32 it gives 21,490 experts for GPT-2, 28,658 and 57,330 for Pythia 410M and 1.4B, and 86,015 for Llama
    3.2 3B (GLU).
    """
    budget = 2 * expansion * d_model**2 + expansion * d_model + d_model
    if encoder == "glu":
        dense = 2 * d_hidden * (d_model + 1) + d_model * (d_hidden + 1)
        return (budget - dense) // (2 * d_model + 1)
    dense = 2 * d_hidden * d_model + expansion * d_model + d_model
    return round((budget - dense) / (2 * d_model + 1))


def flops_per_token(
    kind: str,
    num_latents: int,
    k: int,
    d_in: int,
    d_out: int,
    d_hidden: int = 0,
    encoder: Encoder = "mlp",
    rank: int | None = None,
) -> int:
    """Return the floating-point operations of one token's forward pass, two per multiply-add, decoding `k` latents.

    Biases, activations and the selection are left out. See `num_parameters` for the arguments.

    Raises:
        ValueError: If the kind is unknown or a size does not fit.
    """
    request = replace(_request(d_in, d_out, d_hidden, encoder, rank), num_latents=num_latents, k=k)
    return require_kind(kind).configure(request).flops_per_token


def _request(d_in: int, d_out: int, d_hidden: int, encoder: Encoder, rank: int | None) -> LayerRequest:
    # Which activation it is changes no size.
    return LayerRequest(d_in=d_in, d_out=d_out, d_hidden=d_hidden, activation="gelu", encoder=encoder, rank=rank)
