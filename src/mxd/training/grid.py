"""Which students a configuration asks for: layers × kinds × ks × seeds, each fully specified."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

import torch

from mxd.layers import LayerRequest, SparseLayer, SparseLayerConfig, require_kind
from mxd.layers.activations import Activation, activation_function
from mxd.layers.sizing import match_budget, transcoder_budget
from mxd.models import MlpSite
from mxd.training.config import TrainConfig

REFERENCE_WIDTH = 256
"""Input width up to which a kind's `reference_lr` holds; wider layers take theirs in inverse proportion to the width
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
        ValueError: If a size does not fit, or a kind needs an activation and the MLP's own is none that it offers.
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
        return require_kind(kind).layer.reference_lr * min(1.0, REFERENCE_WIDTH / width)
    return config.lr


def layer_config(config: TrainConfig, site: MlpSite, kind: str, k: int) -> SparseLayerConfig:
    """Return the configuration of one sparse layer, with what is `auto` taken from the MLP.

    Raises:
        ValueError: If a size does not fit, or a kind needs an activation and the MLP's own is none that it offers.
    """
    request = LayerRequest(
        d_in=site.d_in,
        d_out=site.d_out,
        k=k,
        d_hidden=config.hidden if isinstance(config.hidden, int) else site.d_hidden,
        activation=_activation(config, site),
        encoder=config.encoder if config.encoder != "auto" else ("glu" if site.gated else "mlp"),
        rank=config.rank if isinstance(config.rank, int) else None,
        site=f"the MLP at {site.path}",
    )
    num_latents = config.num_latents
    if num_latents is None:
        num_latents = match_budget(kind, transcoder_budget(site.d_in, site.d_out, config.expansion), request)
    return require_kind(kind).configure(replace(request, num_latents=num_latents))


def _activation(config: TrainConfig, site: MlpSite) -> Activation | None:
    name = config.activation if config.activation != "auto" else site.activation
    if name is not None:
        activation_function(name)
    return cast(Activation | None, name)
