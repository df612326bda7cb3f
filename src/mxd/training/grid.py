"""Which students a configuration asks for: layers × kinds × ks × seeds, each fully specified."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import cast

import torch

from mxd.layers import (
    MixtureOfDecodersConfig,
    SkipTranscoderConfig,
    SparseLayer,
    SparseLayerConfig,
    TopKAutoencoderConfig,
    TranscoderConfig,
    require_kind,
)
from mxd.layers.activations import Activation, activation_function
from mxd.layers.sizing import matched_num_latents, transcoder_budget
from mxd.models import MlpSite
from mxd.training.config import TrainConfig

REFERENCE_WIDTH = 256
REFERENCE_RATES = {"mxd": 4e-3, "transcoder": 4e-3, "skip-transcoder": 4e-3, "topk-sae": 4e-3}
"""Learning rates up to `REFERENCE_WIDTH`; wider layers take theirs in inverse proportion to the width
(docs/training.md has the sweep)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentPlan:
    """One student before it exists."""

    id: str
    """Name within its layer: `<kind>-k<k>` and every further setting in which it differs from its siblings."""
    layer: int
    """Block whose MLP it learns."""
    kind: str
    """Kind of sparse layer."""
    network: SparseLayerConfig
    """The sparse layer's configuration."""
    seed: int
    """Seed of its initialisation."""
    lr: float
    """Learning rate after warm-up."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the layer."""
        return sum(parameter.numel() for parameter in self.skeleton().parameters())

    def skeleton(self) -> SparseLayer:
        """Return the layer with shapes and no memory for its weights."""
        with torch.device("meta"):
            return require_kind(self.kind).layer(self.network)  # pyright: ignore[reportCallIssue]

    def build(self) -> SparseLayer:
        """Return the freshly initialised layer; the same seed gives the same weights, whatever else is trained."""
        generator = torch.Generator().manual_seed(self.seed)
        return require_kind(self.kind).layer(self.network, generator)  # pyright: ignore[reportCallIssue]


def plan_students(config: TrainConfig, sites: Mapping[int, MlpSite]) -> list[StudentPlan]:
    """Return every student of a configuration, in the order layer, kind, k, seed.

    Raises:
        ValueError: If a size does not fit, or the MLP's own activation is none that an MxD offers.
    """
    plans: list[StudentPlan] = []
    seeds = range(config.seed, config.seed + config.seeds)
    for layer, kind, k, seed in product(config.layer, config.kind, config.k, seeds):
        suffix = f"-seed{seed}" if config.seeds > 1 else ""
        network = layer_config(config, sites[layer], kind, k)
        lr = learning_rate(config, kind, network.d_in)
        plan = StudentPlan(id=f"{kind}-k{k}{suffix}", layer=layer, kind=kind, network=network, seed=seed, lr=lr)
        plans.append(plan)
    return plans


def learning_rate(config: TrainConfig, kind: str, width: int) -> float:
    """Return the learning rate of a kind: the one that was asked for, or by kind and input width."""
    if isinstance(config.lr, dict):
        return config.lr[kind]
    if isinstance(config.lr, str):
        return REFERENCE_RATES[kind] * min(1.0, REFERENCE_WIDTH / width)
    return config.lr


def layer_config(config: TrainConfig, site: MlpSite, kind: str, k: int) -> SparseLayerConfig:
    """Return the configuration of one sparse layer, with what is `auto` taken from the MLP.

    Raises:
        ValueError: If a size does not fit, or the MLP's own activation is none that an MxD offers.
    """
    d_in, d_out = (site.d_out, site.d_out) if kind == "topk-sae" else (site.d_in, site.d_out)
    encoder = config.encoder if config.encoder != "auto" else ("glu" if site.gated else "mlp")
    d_hidden = config.hidden if isinstance(config.hidden, int) else site.d_hidden
    num_latents = config.num_latents
    if num_latents is None:
        budget = transcoder_budget(site.d_in, site.d_out, config.expansion)
        num_latents = matched_num_latents(kind, budget, d_in, d_out, d_hidden, encoder)
    match kind:
        case "mxd":
            return MixtureOfDecodersConfig(
                d_in=d_in,
                d_hidden=d_hidden,
                d_out=d_out,
                num_experts=num_latents,
                k=k,
                activation=_activation(config, site),
                encoder=encoder,
            )
        case "transcoder":
            return TranscoderConfig(d_in=d_in, d_out=d_out, num_latents=num_latents, k=k)
        case "skip-transcoder":
            return SkipTranscoderConfig(d_in=d_in, d_out=d_out, num_latents=num_latents, k=k)
        case "topk-sae":
            return TopKAutoencoderConfig(d_in=d_in, num_latents=num_latents, k=k)
        case _:
            raise ValueError(f"kind must be one that training can size: {', '.join(REFERENCE_RATES)}; got {kind!r}.")


def _activation(config: TrainConfig, site: MlpSite) -> Activation:
    name = config.activation if config.activation != "auto" else site.activation
    if name is None:
        raise ValueError(
            f"activation must be given for the MLP at {site.path}, whose own is none that an MxD offers; "
            "choose one with --activation."
        )
    activation_function(name)
    return cast(Activation, name)
