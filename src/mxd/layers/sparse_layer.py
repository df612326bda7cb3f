"""The one contract that every sparse layer fulfils."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.linalg import vector_norm

from mxd.kernels import route
from mxd.layers.mlp_weights import MlpWeights
from mxd.layers.provenance import Provenance
from mxd.layers.selection import MOST_LATENTS, SelectionName, SparseCode, TopK, make_selection, scores_at

Init = Literal["paper", "model"]
"""Where weights begin: drawn as Oldfield et al. (2025) do, or as those of the MLP that is decomposed."""


class SparseLayerOutput(NamedTuple):
    """What a sparse layer returns: its prediction and the code that made it."""

    prediction: Float[Tensor, "*batch d_out"]
    """The layer's stand-in for the MLP's output."""
    code: SparseCode
    """The active latents."""


class LinearMap(NamedTuple):
    """A weight and a bias, used as `x @ weight + bias`."""

    weight: Float[Tensor, "d_in d_map"]
    """The map's matrix."""
    bias: Float[Tensor, " d_map"]
    """The map's offset."""


class AtomRows(NamedTuple):
    """Consecutive rows of a table that belong to one latent alone."""

    table: nn.Parameter
    """The table."""
    start: int
    """The first row."""
    stop: int
    """The row behind the last."""


@runtime_checkable
class SparseLayerConfig(Protocol):
    """What every layer's configuration says."""

    @property
    def d_in(self) -> int:
        """Width of the input."""
        ...

    @property
    def d_out(self) -> int:
        """Width of the output."""
        ...

    @property
    def num_latents(self) -> int:
        """Size of the code."""
        ...

    @property
    def k(self) -> int:
        """Number of latents active for each input, at most."""
        ...

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the layer."""
        ...

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward pass.

        Two for each multiplication by a weight, of the `k` latents that are decoded only; biases, activations and
        the selection are left out.
        """
        ...


class SparseLayer(nn.Module, ABC):
    r"""An affine function of its code, given its input.

    $$y(x) = \mathrm{base}(x) + \sum_j v_j \, \mathrm{atom}(x, i_j), \qquad (v, i) = \mathrm{encode}(x)$$

    Steering is `layer.decode(x, edit(layer.encode(x)))`; ablation, attribution and the meaning of a latent
    are written against `base` and `atoms` and so serve every kind of layer.
    """

    kind: ClassVar[str]
    """The layer's name in configurations and on the command line."""
    reads: ClassVar[Literal["input", "output"]] = "input"
    """Whether x is the MLP's input or its output (then the layer stands behind an MLP that stays)."""
    reference_lr: ClassVar[float] = 4e-3
    """Learning rate for inputs up to 256 wide (docs/training.md has the sweep)."""
    inits: ClassVar[tuple[Init, ...]] = ("paper",)
    """Where its weights may begin; the first is meant by `auto`."""
    shared_penalty: ClassVar[float | None] = None
    """What training charges for the variance that a shared expert carries, unless told otherwise; None for kinds
    without one."""
    rank_by_budget: ClassVar[bool] = False
    """Whether a rank that nobody chose is the widest with which a budget pays for enough latents, in training; else it
    is a quarter of the output's width."""
    fixed_atoms: ClassVar[bool] = False
    """Whether what a latent adds per unit of its value is the same for every input: a row of its own. Then a latent
    maps x to a multiple of one vector, of rank one."""
    config: SparseLayerConfig
    edit: Callable[[SparseCode], SparseCode] | None
    """What becomes of every code before it is decoded (`mxd.edits.with_edits`); None for a layer as it was trained."""
    loaded_sha256: str | None
    """SHA-256 of the saved weights of which `provenance` tells how they came about; None where they were not loaded."""

    def __init__(self, *, selection: SelectionName = "topk") -> None:
        super().__init__()
        self.selection = make_selection(selection)
        self.edit = None
        self.provenance = Provenance()

    @property
    def provenance(self) -> Provenance:
        """Where the layer belongs and how it came about, as far as is known; it is saved with the layer.

        Loading fills it in. To set it is to say it of the weights as they are.

        Raises:
            TypeError: If it is set to something else.
        """
        return self._provenance

    @provenance.setter
    def provenance(self, provenance: Provenance) -> None:
        if not isinstance(provenance, Provenance):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"provenance must be a mxd.Provenance; got {type(provenance).__name__}.")
        self._provenance, self.loaded_sha256 = provenance, None

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.config.d_in

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.config.d_out

    @property
    def num_latents(self) -> int:
        """Size of the code."""
        return self.config.num_latents

    @property
    def k(self) -> int:
        """Number of latents active for each input, at most (with top-k; on average or as a goal with others)."""
        return self.config.k

    def extra_repr(self) -> str:
        """Return what printing the layer shows of it: sizes, what else was chosen, and where it belongs."""
        shown: dict[str, object] = {name: getattr(self, name) for name in ("d_in", "d_out", "num_latents", "k")}
        for field in fields(self.config) if is_dataclass(self.config) else ():
            value = getattr(self.config, field.name)
            if field.default is MISSING or value != field.default:
                shown.setdefault(field.name, value)
        known = {"model": self.provenance.model, "block": self.provenance.layer}
        shown |= {name: value for name, value in known.items() if value is not None}
        return ", ".join([*(f"{name}={value!r}" for name, value in shown.items()), *(["edited"] if self.edit else [])])

    @property
    @abstractmethod
    def scorer(self) -> LinearMap:
        """The map from the encoder's input to the latents' scores."""

    def given(
        self, x: Float[Tensor, "*batch d_mlp_in"], target: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_in"]:
        """Return which of an MLP's input and output this layer is applied to: what it `reads`."""
        return target if self.reads == "output" else x

    def scorer_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return what the scorer is applied to: x itself for most kinds."""
        return x

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        """Return the scores of all latents, dense: for small layers and for tests."""
        return self.scorer_input(x) @ self.scorer.weight + self.scorer.bias

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> SparseCode:
        """Return the active latents of each input: the `k` largest scores, rectified and not renormalised.

        Which are active is `selection`'s to say where the configuration names another one than top-k. In an edited
        layer the code is the edited one, which may be wider than `k` and hold negative values.

        Raises:
            TypeError: If x is no tensor of the layer's type; under autocast other floating-point types will do.
            ValueError: If x is not `d_in` wide.
        """
        code = self.encode_at(x, self.config.k)
        return code if self.edit is None else self.edit(code)

    def encode_at(self, x: Float[Tensor, "*batch d_in"], k: int) -> SparseCode:
        """Return the code of another number of active latents than the configuration's.

        Raises:
            TypeError: As `encode`.
            ValueError: As `encode`.
        """
        require_activations(self, x)
        return self.selection(self.scorer_input(x), *self.scorer, k)

    def encode_among(self, x: Float[Tensor, "*batch d_in"], latents: Int[Tensor, " chosen"], k: int) -> SparseCode:
        """Return the code of the `k` latents with the largest scores among these, whatever the others score."""
        columns = self.scorer.weight.t().index_select(0, latents).t()
        values, places = route(self.scorer_input(x), columns, self.scorer.bias.index_select(0, latents), k)
        return SparseCode(values, latents[places])

    def scores_of(self, x: Float[Tensor, "tokens d_in"], indices: Int[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
        """Return the scores of the latents that each input names, not rectified."""
        return scores_at(self.scorer_input(x), *self.scorer, indices)

    @abstractmethod
    def decode(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        """Return the prediction that this code makes for this input; the code need not be the input's own."""

    @abstractmethod
    def base(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the prediction of an empty code."""

    @abstractmethod
    def atoms(
        self, x: Float[Tensor, "*batch d_in"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k d_out"]:
        """Return what each of these latents adds to the prediction per unit of its value."""

    def carried(self, x: Float[Tensor, "*batch d_in"], code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        """Return the part of the prediction that this code carries: what is beyond `base`."""
        return self.decode(x, code) - self.base(x)

    def dense_branch(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | None:
        """Return the vector of which every atom is an elementwise multiple; None for kinds that have no such vector."""
        return None

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> SparseLayerOutput:
        """Return the prediction and the code that made it."""
        code = self.encode(x)
        return SparseLayerOutput(self.decode(x, code), code)

    def begin_from(self, mlp: MlpWeights) -> None:
        """Take over what the layer has in common with the MLP that it decomposes.

        Raises:
            ValueError: If it has nothing, or its sizes are others.
        """
        raise ValueError(f"init must be paper for {self.kind}, which has no weights in common with an MLP; got model.")

    def unit_length_tables(self) -> tuple[nn.Parameter, ...]:
        """Return the tables whose rows training keeps at unit length: none for most kinds."""
        return ()

    @property
    def latent_table(self) -> nn.Parameter | None:
        """The table with a row for each latent, to which its atoms, and nothing else, are proportional.

        None for kinds without such, and for those whose latents have several rows each.
        """
        return None

    def latent_lengths(self) -> Float[Tensor, " num_latents"]:
        """Return how much each latent adds per unit of its value, by which an L1 penalty weighs it.

        It is the length of the latent's row, or the Frobenius norm of its map; 1 where a kind does not say.
        """
        table = self.latent_table
        return self.scorer.bias.new_ones(self.config.num_latents) if table is None else vector_norm(table, dim=1)

    def atom_rows(self, latent: int) -> AtomRows | None:
        """Return the rows to which this latent's atoms, and nothing else, are proportional; None without such."""
        table = self.latent_table
        return None if table is None else AtomRows(table, latent, latent + 1)

    def latent_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which each latent has a part of its own: the scorer and the tables of `atom_rows`.

        They are what the loss on dead latents teaches. All parameters where a kind does not say which are whose.
        """
        rows = self.atom_rows(0)
        own = [part for part in self.scorer if isinstance(part, nn.Parameter)]
        return list(self.parameters()) if rows is None or len(own) < len(self.scorer) else [*own, rows.table]

    def add_to_output_(self, vector: Float[Tensor, " d_out"]) -> None:
        """Add a constant to the prediction for every input and code, by weights alone.

        Raises:
            ValueError: If the layer has no output bias, `b_dec`.
        """
        bias = getattr(self, "b_dec", None)
        if not isinstance(bias, nn.Parameter):
            raise ValueError(f"A constant is added to a prediction through its bias, b_dec; {self.kind} has none.")
        bias.add_(vector)

    @abstractmethod
    def input_maps(self) -> tuple[LinearMap, ...]:
        """Return every map that the layer applies to its input, so that a change of input can be folded into them."""


def require_activations(layer: SparseLayer, x: Tensor) -> None:
    """Check that a layer can be applied to x; only shape and type are looked at, so that no device is waited for.

    Raises:
        TypeError: If x is no tensor of the layer's type; under autocast other floating-point types will do.
        ValueError: If x is not as wide as the layer's input.
    """
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]  # not all callers are type-checked
        raise TypeError(f"x must be a tensor of activations; got {type(x).__name__}. mxd.mlp_pairs captures them.")
    if not x.is_floating_point():
        raise TypeError(
            f"x must hold activations, of a floating-point type; got {x.dtype}. For token ids, mxd.mlp_pairs captures "
            "what flows through an MLP."
        )
    if x.ndim == 0 or x.shape[-1] != layer.config.d_in:
        raise ValueError(
            f"x must be {layer.config.d_in} wide in its last axis, as the MLP's {layer.reads} that this {layer.kind} "
            f"encodes; got shape {tuple(x.shape)}. Use a layer that was trained for this model."
        )
    dtype = layer.scorer.bias.dtype
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must have the layer's type, {dtype}; got {x.dtype}. Convert it, as with x.to({dtype}).")


def require_sizes(config: SparseLayerConfig, **widths: int) -> None:
    """Check a configuration's sizes.

    Raises:
        ValueError: If a width is not positive, `k` does not lie in `[1, num_latents]`, or the selection does not serve
            so many latents.
    """
    widths |= {"d_in": config.d_in, "d_out": config.d_out, "num_latents": config.num_latents}
    for name, width in widths.items():
        if width < 1:
            raise ValueError(f"{name} must be at least 1; got {width}.")
    if not 1 <= config.k <= config.num_latents:
        raise ValueError(f"k must lie in [1, {config.num_latents}], the number of latents; got {config.k}.")
    selection: SelectionName = getattr(config, "selection", "topk")
    if selection != TopK.name and config.num_latents > MOST_LATENTS:
        raise ValueError(
            f"num_latents must be at most {MOST_LATENTS:,} with selection {selection}, which looks at all scores of a "
            f"batch at once; got {config.num_latents:,}. Ask for fewer, or for selection topk."
        )
