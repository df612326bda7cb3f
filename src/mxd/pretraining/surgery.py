"""Put a multilinear mixture in the place of every MLP of a model, for good."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Generator, nn

from mxd.layers import Activation
from mxd.models import find_mlp, num_layers
from mxd.multilinear import (
    ExpertsKind,
    GateName,
    Match,
    MultilinearMLP,
    MultilinearMLPConfig,
    Normalization,
    fractional_block_rank,
    matched_block_rank,
    ranks_of,
)

Kind = Literal["dense", "cp", "tr"]
"""What a model's MLPs are: as they were, or mixtures of CP or of tensor-ring experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpChoice:
    """What is put in the place of every MLP."""

    kind: Kind = "cp"
    """`cp` or `tr` experts, or `dense` to leave the MLPs as they are."""
    num_experts: tuple[int, ...] = (64,)
    """Number of experts; several numbers make a hierarchy whose number of experts is their product."""
    rank_fraction: float | None = None
    """Rank as a share of the MLP's input width, as in the paper; by default the rank that matches its parameters."""
    ring: int = 4
    """The other ranks of a tensor ring."""
    gate: GateName = "entmax"
    """What makes coefficients of the gate's scores: `entmax` (mostly zeros) or `softmax`."""
    normalization: Normalization = "layer"
    """How the gate's scores are normalised: over the `batch`, or over the experts (`layer`)."""
    normalize_input: bool = False
    """Whether the first layer of each block reads its input through a LayerNorm of its own."""

    def __post_init__(self) -> None:
        if self.ring < 1:
            raise ValueError(f"ring must be at least 1; got {self.ring}.")
        if self.rank_fraction is not None and not 0 < self.rank_fraction < float("inf"):
            raise ValueError(f"rank-fraction must be a positive number; got {self.rank_fraction}.")


class FoundMlp(NamedTuple):
    """An MLP that can be replaced."""

    path: str
    """Where it stands in the model."""
    d_in: int
    """Width of its input."""
    d_hidden: int
    """Width between its layers."""
    d_out: int
    """Width of its output."""
    activation: Activation
    """What it has between its layers."""
    dropout: float
    """Dropout of its output."""


def replace_mlps(
    model: nn.Module, choice: MlpChoice, generator: Generator | None = None
) -> dict[str, MultilinearMLPConfig]:
    """Put a multilinear mixture in the place of every MLP, in place; nothing else of the model changes.

    A Hugging Face language model of a known family whose MLPs are plain (GPT-2's, OPT has none of its own) has one a
    block; an MLP-Mixer with timm's module names has a token-mixing and a channel-mixing one.

    Args:
        model: The model; what it learnt elsewhere than in its MLPs stays.
        choice: What the mixtures are; with kind `dense`, nothing is done.
        generator: Random numbers of the new weights.

    Returns:
        The shape of each new block by its path in the model.

    Raises:
        ValueError: If the model's MLPs cannot be replaced, or no rank fits.
    """
    if choice.kind == "dense":
        return {}
    configs = {found.path: block_config(found, choice) for found in find_mlps(model)}
    for path, config in configs.items():
        old = model.get_submodule(path)
        weight = next(old.parameters())
        block = MultilinearMLP(config, generator).to(weight.device, weight.dtype)
        model.set_submodule(path, block.train(old.training), strict=True)
    return configs


def block_config(found: FoundMlp, choice: MlpChoice) -> MultilinearMLPConfig:
    """Return the shape of what replaces an MLP."""
    return _config(found, choice, _match(found, choice).rank)


def find_mlps(model: nn.Module) -> list[FoundMlp]:
    """Return every MLP that `replace_mlps` would replace.

    Raises:
        ValueError: If there is one that cannot be replaced.
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and all(hasattr(block, "mlp_tokens") for block in blocks):
        paths = [f"blocks.{n}.{name}" for n in range(len(blocks)) for name in ("mlp_tokens", "mlp_channels")]
        return [_mixer_mlp(model.get_submodule(path), path) for path in paths]
    return [_language_mlp(model, layer) for layer in range(num_layers(model))]


def _match(found: FoundMlp, choice: MlpChoice) -> Match:
    template = _config(found, choice, 1)
    if choice.rank_fraction is None:
        return matched_block_rank(template, ring=choice.ring)
    return fractional_block_rank(template, choice.rank_fraction, ring=choice.ring)


def _config(found: FoundMlp, choice: MlpChoice, rank: int) -> MultilinearMLPConfig:
    kind: ExpertsKind = "tr" if choice.kind == "tr" else "cp"
    return MultilinearMLPConfig(
        kind=kind,
        d_in=found.d_in,
        d_hidden=found.d_hidden,
        d_out=found.d_out,
        num_experts=choice.num_experts,
        ranks=ranks_of(kind, rank, len(choice.num_experts), choice.ring),
        activation=found.activation,
        gate=choice.gate,
        normalization=choice.normalization,
        normalize_input=choice.normalize_input,
        dropout=found.dropout,
    )


def _language_mlp(model: nn.Module, layer: int) -> FoundMlp:
    site = find_mlp(model, layer)
    if site.gated or site.block is not None or site.takes_residual:
        raise ValueError(
            f"an MLP must be a module of two linear layers, as GPT-2's is, to be replaced for good; that of block "
            f"{layer} ({site.path}) is gated, has no module of its own or adds the residual itself."
        )
    dropouts = [module.p for module in site.modules[0].modules() if isinstance(module, nn.Dropout)]
    activation = _known_activation(site.activation, site.path)
    return FoundMlp(
        site.path, site.d_in, site.d_hidden, site.d_out, activation, float(dropouts[-1]) if dropouts else 0.0
    )


def _mixer_mlp(module: nn.Module, path: str) -> FoundMlp:
    first, second, act = (getattr(module, name, None) for name in ("fc1", "fc2", "act"))
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear):
        raise ValueError(f"{path} must have linear layers fc1 and fc2, as timm's Mlp has; it is a {type(module)}.")
    name = None
    if isinstance(act, nn.GELU):
        name = "gelu_tanh" if act.approximate == "tanh" else "gelu"
    elif isinstance(act, nn.ReLU):
        name = "relu"
    dropout = getattr(module, "drop2", None)
    return FoundMlp(
        path,
        first.in_features,
        first.out_features,
        second.out_features,
        _known_activation(name, path),
        float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0,
    )


def _known_activation(name: str | None, path: str) -> Activation:
    for known in get_args(Activation):
        if known == name:
            return known
    raise ValueError(f"the activation of {path} must be one of {', '.join(get_args(Activation))}; got another one.")


def count_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters, those that are tied counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return AdamW's groups: matrices and factors decay, vectors (norms, biases) do not.

    `b_in` is the row of the input factor that the constant 1 meets (Oldfield et al., 2024), so it decays with it,
    although that of CP is a vector. Which weights the paper's runs decayed is not known; this is what nanoGPT does.
    """
    decays = {name: parameter.ndim >= 2 or name.endswith("b_in") for name, parameter in model.named_parameters()}
    decaying = [parameter for name, parameter in model.named_parameters() if decays[name]]
    others = [parameter for name, parameter in model.named_parameters() if not decays[name]]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter is a finite number."""
    with torch.no_grad():
        return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
