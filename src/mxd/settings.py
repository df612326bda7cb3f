"""Settings that set students of one kind apart, and the words for them in ids: `<kind>-k<k>-<word>…-seed<seed>`."""

from dataclasses import fields
from decimal import Decimal
from typing import Any, NamedTuple

from mxd.layers import LAYERS, SparseLayerConfig, TopK, require_kind


class StudentSettings(NamedTuple):
    """What a student is beside its kind, K and seed; None for what its kind or its selection does not read."""

    num_latents: int | None = None
    """Number of latents."""
    hidden: int | None = None
    """Width of the dense branch."""
    activation: str | None = None
    """Activation of the dense branch."""
    encoder: str | None = None
    """Dense encoder, `mlp` or `glu`."""
    rank: int | None = None
    """Largest rank of a latent's map."""
    normalize_experts: bool | None = None
    """Whether rows that belong to latents are kept at unit length."""
    shared_expert: bool | None = None
    """Whether one more expert is active on every token."""
    selection: str | None = None
    """How latents are selected."""
    l1_coefficient: float | None = None
    """Weight of the L1 penalty."""
    random_k: bool | None = None
    """Whether training draws K anew each step."""
    init: str | None = None
    """Where its weights began."""
    shared_penalty: float | None = None
    """What training charges for the variance that its shared expert carries."""

    def row_fields(self) -> dict[str, Any]:
        """Return them by the names that a row of `mxd evaluate --json` has for them."""
        return {_ROW_NAMES.get(name, name): value for name, value in self._asdict().items()}

    @classmethod
    def of_row(cls, row: object) -> "StudentSettings":
        """Return the settings that a row of `mxd evaluate --json` tells."""
        return cls(**{name: getattr(row, _ROW_NAMES.get(name, name)) for name in cls._fields})

    def words(self) -> dict[str, str]:
        """Return how an id names each of them that is read, in the order of ids.

        Example:
            >>> StudentSettings(hidden=64, encoder="glu", l1_coefficient=3e-5, random_k=False).words()
            {'hidden': 'h64', 'encoder': 'glu', 'l1_coefficient': 'c0.00003', 'random_k': 'fixed'}
        """
        words = {
            "num_latents": self.num_latents and f"n{self.num_latents}",
            "hidden": self.hidden and f"h{self.hidden}",
            "activation": self.activation,
            "encoder": self.encoder,
            "rank": self.rank and f"r{self.rank}",
            "normalize_experts": {True: "unit", False: "free", None: None}[self.normalize_experts],
            "shared_expert": {True: "shared", False: "routed", None: None}[self.shared_expert],
            "selection": self.selection,
            "l1_coefficient": None if self.l1_coefficient is None else f"c{_plain(self.l1_coefficient)}",
            "random_k": {True: "random", False: "fixed", None: None}[self.random_k],
            "init": self.init,
            "shared_penalty": None if self.shared_penalty is None else f"p{_plain(self.shared_penalty)}",
        }
        return {name: str(word) for name, word in words.items() if word is not None}


_ROW_NAMES = {"hidden": "d_hidden"}
"""What a row calls otherwise than an option."""


_READ_AS = {
    "num_latents": ("num_latents",),
    "hidden": ("d_hidden",),
    "activation": ("activation",),
    "encoder": ("encoder",),
    "rank": ("rank",),
    "normalize_experts": ("normalize_experts", "normalize_decoder"),
    "shared_expert": ("shared_expert",),
}
"""What the configuration of a kind that reads a setting calls it; the other settings are no part of one."""


def _plain(number: float) -> str:
    """Return a number without an exponent, whose "-" would begin another part of the id, and without a last ".0"."""
    return f"{Decimal(repr(number)):f}".removesuffix(".0")


def settings_of(
    config: SparseLayerConfig,
    *,
    l1_coefficient: float | None = None,
    random_k: bool = False,
    init: str | None = None,
    shared_penalty: float | None = None,
) -> StudentSettings:
    """Return the settings of a student: those that its layer's configuration has, and how it is trained."""
    read = {
        name: next((getattr(config, field) for field in called if hasattr(config, field)), None)
        for name, called in _READ_AS.items()
    }
    selection: str = getattr(config, "selection", TopK.name)
    return StudentSettings(
        **read,
        selection=selection,
        l1_coefficient=l1_coefficient,
        random_k=random_k if selection == TopK.name else None,
        init=init,
        shared_penalty=shared_penalty,
    )


def kinds_that_read(name: str, value: object) -> list[str]:
    """Return the kinds of layer that do as this value of a setting says; of `init` that is those that can begin so."""
    return [kind for kind in LAYERS if _reads(kind, name, value)]


def _reads(kind: str, name: str, value: object) -> bool:
    config, layer = require_kind(kind)
    if name == "init":
        return value in layer.inits
    if name == "shared_penalty":
        return layer.shared_penalty is not None
    known = {field.name for field in fields(config)}
    return name not in _READ_AS or any(field in known or hasattr(config, field) for field in _READ_AS[name])
