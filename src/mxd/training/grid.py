"""Which students a configuration asks for: layers × kinds × ks × settings × seeds, each fully specified."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

import torch

from mxd.layers import L1, Init, LayerRequest, SparseLayer, SparseLayerConfig, TopK, require_kind
from mxd.layers.activations import Activation, activation_function
from mxd.layers.sizing import match_budget, shared_width, transcoder_budget, widest_rank
from mxd.models import MlpSite
from mxd.settings import StudentSettings, settings_of
from mxd.training.config import InitChoice, PenaltyChoice, Settings, TrainConfig, values_of
from mxd.training.student import random_ks

REFERENCE_WIDTH = 256
"""Input width up to which a kind's `reference_lr` holds; wider layers take theirs in inverse proportion to the width
(docs/training.md has the sweep)."""
FEWEST_TRANSFORMS = 128
"""Latents that there must be for a wider rank to be taken, of a kind whose rank the budget decides: four times the
default k. Not of what a grid's own ks are, so that the same student is the same layer in every grid."""


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
    l1_coefficient: float | None = None
    """Weight of the L1 penalty; None where the selection is not l1."""
    random_k: bool = False
    """Whether training draws the number of active latents anew each step."""
    init: Init = "paper"
    """Where its weights begin."""
    shared_penalty: float | None = None
    """What it is charged for the variance that its shared expert carries; None where there is none."""

    @property
    def name(self) -> str:
        """The student's name within its run: `<layer>/<id>`."""
        return f"{self.layer}/{self.id}"

    @property
    def settings(self) -> StudentSettings:
        """What may set it apart from its siblings."""
        return settings_of(
            self.network,
            l1_coefficient=self.l1_coefficient,
            random_k=self.random_k,
            init=self.init,
            shared_penalty=self.shared_penalty,
        )

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
    """Return every student of a configuration, in the order layer, kind, k, settings, seed.

    A setting multiplies only the students that read it: those that come out alike are one.

    Raises:
        ValueError: If a size does not fit, or a kind needs an activation and the MLP's own is none that it offers.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    students: list[StudentPlan] = []
    for layer, kind in product(config.layers, config.kind):
        alike: dict[StudentPlan, None] = {}
        for k, settings, seed in product(config.k, _settings(config), seeds):
            alike[_student(config, sites[layer], kind, k, settings, seed)] = None
        students += _named(config, list(alike))
    return students


def learning_rate(config: TrainConfig, kind: str, width: int) -> float:
    """Return the learning rate of a kind: the one that was asked for, or by kind and input width."""
    if isinstance(config.lr, dict):
        return config.lr[kind]
    if isinstance(config.lr, str):
        return require_kind(kind).layer.reference_lr * min(1.0, REFERENCE_WIDTH / width)
    return config.lr


def _settings(config: TrainConfig) -> Iterator[Settings]:
    for values in product(*(values_of(getattr(config, name)) for name in Settings._fields)):
        yield Settings(*values)


def _student(config: TrainConfig, site: MlpSite, kind: str, k: int, settings: Settings, seed: int) -> StudentPlan:
    """Return one student without a name, with what is `auto` taken from the MLP, and what it does not read left out."""
    network = _network(config, site, kind, k, settings)
    random_k = settings.random_k and settings.selection == TopK.name
    if random_k and random_ks(k)[-1] > network.num_latents:
        raise ValueError(
            f"k must be at most two thirds of the number of latents with random-k, which draws up to one and a half "
            f"times k; got {k} of {network.num_latents} for {kind}."
        )
    return StudentPlan(
        id="",
        layer=site.layer,
        kind=kind,
        network=network,
        seed=seed,
        lr=learning_rate(config, kind, network.d_in),
        l1_coefficient=settings.l1_coefficient if settings.selection == L1.name else None,
        random_k=random_k,
        init=_init(kind, settings.init),
        shared_penalty=_shared_penalty(kind, settings.shared_penalty),
    )


def _init(kind: str, asked: InitChoice) -> Init:
    inits = require_kind(kind).layer.inits
    if asked == "auto":
        return inits[0]
    return asked if asked in inits else "paper"


def _shared_penalty(kind: str, asked: PenaltyChoice) -> float | None:
    own = require_kind(kind).layer.shared_penalty
    return own if own is None or isinstance(asked, str) else asked


def _network(config: TrainConfig, site: MlpSite, kind: str, k: int, settings: Settings) -> SparseLayerConfig:
    request = LayerRequest(
        d_in=site.d_in,
        d_out=site.d_out,
        d_hidden=settings.hidden if isinstance(settings.hidden, int) else site.d_hidden,
        activation=_activation(settings.activation, site),
        encoder=settings.encoder if settings.encoder != "auto" else ("glu" if site.gated else "mlp"),
        rank=settings.rank if isinstance(settings.rank, int) else _own_rank(kind, site.d_out),
        selection=settings.selection,
        normalize=settings.normalize_experts,
        shared_expert=settings.shared_expert,
        site=f"the MLP at {site.path}",
    )
    num_latents = settings.num_latents
    if num_latents is None:
        budget = transcoder_budget(site.d_in, site.d_out, config.expansion)
        if settings.hidden == "auto" and require_kind(kind).layer.shared_penalty is not None:
            request = replace(request, d_hidden=shared_width(budget, request))
        if settings.rank == "auto" and require_kind(kind).layer.rank_by_budget:
            request = replace(request, rank=widest_rank(kind, budget, FEWEST_TRANSFORMS, request))
        num_latents = match_budget(kind, budget, request)
    # With l1 any number of latents may be active.
    k = num_latents if settings.selection == L1.name else k
    return require_kind(kind).configure(replace(request, num_latents=num_latents, k=k))


def _own_rank(kind: str, width: int) -> int | None:
    return width if require_kind(kind).layer.rank_by_budget else None


def _activation(name: str, site: MlpSite) -> Activation | None:
    chosen = name if name != "auto" else site.activation
    if chosen is not None:
        activation_function(chosen)
    return cast(Activation | None, chosen)


def _named(config: TrainConfig, students: Sequence[StudentPlan]) -> list[StudentPlan]:
    """Return the students of one layer and kind with their ids."""
    parts = [student.settings.words() for student in students]
    asked = [name for name in Settings._fields if len(values_of(getattr(config, name))) > 1]
    differing = [name for name in asked if len({part.get(name) for part in parts}) > 1]
    named: list[StudentPlan] = []
    for student, part in zip(students, parts, strict=True):
        words = [student.kind, f"k{student.network.k}", *(part[name] for name in differing if name in part)]
        words += [f"seed{student.seed}"] if config.seeds > 1 else []
        named.append(replace(student, id="-".join(words)))
    assert len({student.id for student in named}) == len(named), "two students have one name"
    return named
