"""What can be done to the value of a latent, and where."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mxd.atomic import JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class Set:
    """Give the latents this value, whether they are active or not."""

    name: ClassVar[str] = "set"
    amount: float
    """The value."""

    def __post_init__(self) -> None:
        _require_finite(self.name, amount=self.amount)

    def __call__(self, values: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        """Return the amount everywhere."""
        return torch.full_like(values, self.amount)


@dataclass(frozen=True, kw_only=True, slots=True)
class Add:
    """Add this to the latents' values, whether they are active or not: the steering of Oldfield et al. (2025)."""

    name: ClassVar[str] = "add"
    amount: float
    """What is added; a negative sum stays as it is."""

    def __post_init__(self) -> None:
        _require_finite(self.name, amount=self.amount)

    def __call__(self, values: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        """Return the values and the amount, summed."""
        return values + self.amount


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Multiply the latents' values by this: a latent that is not active stays so."""

    name: ClassVar[str] = "scale"
    factor: float
    """What they are multiplied by."""

    def __post_init__(self) -> None:
        _require_finite(self.name, factor=self.factor)

    def __call__(self, values: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        """Return the values, each times the factor."""
        return values * self.factor


@dataclass(frozen=True, kw_only=True, slots=True)
class Clamp:
    """Keep the latents' values between these bounds; a lower bound above 0 makes them always active."""

    name: ClassVar[str] = "clamp"
    low: float | None = None
    """The least value; None for no lower bound."""
    high: float | None = None
    """The largest value; None for no upper bound."""

    def __post_init__(self) -> None:
        bounds = {name: bound for name, bound in (("low", self.low), ("high", self.high)) if bound is not None}
        _require_finite(self.name, **bounds)
        if not bounds:
            raise ValueError("clamp must have a bound; got neither low nor high.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"clamp must have low at most high; got low {self.low:g} and high {self.high:g}.")

    def __call__(self, values: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        """Return the values, brought to the nearer bound where they lie outside."""
        return values.clamp(self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablate:
    """Make the latents inactive."""

    name: ClassVar[str] = "ablate"

    def __call__(self, values: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        """Return zeros."""
        return torch.zeros_like(values)


Operation = Set | Add | Scale | Clamp | Ablate
"""What is done to a value, elementwise."""

OPERATIONS = (Set, Add, Scale, Clamp, Ablate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Positions from `start` on, up to but without `stop`."""

    start: int = 0
    """The first position, counted from 0."""
    stop: int | None = None
    """The position behind the last one; None for no end."""

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(f"A span must have 0 <= start < stop; got start {self.start} and stop {self.stop}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One operation on some latents, at all positions or chosen ones."""

    latents: tuple[int, ...]
    """The latents, each once."""
    operation: Operation
    """What happens to their values."""
    positions: tuple[int, ...] | Span | None = None
    """Where: positions in the sequence, counted from 0 at its first token (padding on the left does not count), the
    prompt's and those that are generated alike; None for everywhere."""

    def __post_init__(self) -> None:
        if not self.latents or len(set(self.latents)) < len(self.latents) or min(self.latents) < 0:
            raise ValueError(f"An edit must name latents, each once and from 0 on; got {few(self.latents)}.")
        if isinstance(self.positions, tuple) and (not self.positions or min(self.positions) < 0):
            raise ValueError(
                f"An edit's positions must be at least one, from 0 on; got {few(self.positions)}. "
                "Leave them out to edit everywhere."
            )

    @property
    def wakes(self) -> bool:
        """Whether a latent that is not active can become active."""
        return bool(self.operation(torch.zeros(1)).item())

    def to_json(self) -> JSON:
        """Return the edit as JSON takes it."""
        positions = asdict(self.positions) if isinstance(self.positions, Span) else self.positions
        operation = {"name": self.operation.name, **asdict(self.operation)}
        return {"latents": self.latents, "operation": operation, "positions": positions}

    @classmethod
    def from_json(cls, value: object) -> "Edit":
        """Return the edit that `to_json` described.

        Raises:
            ValueError: If it describes none.
        """
        try:
            return cls._from_json(cast("Mapping[str, object]", value))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"An edit must be an object as Edit.to_json gives it; got {str(value)[:200]}.") from error

    @classmethod
    def _from_json(cls, value: Mapping[str, object]) -> "Edit":
        described = dict(cast("Mapping[str, float | None]", value["operation"]))
        name = cast("object", described.pop("name"))
        kind = next((kind for kind in OPERATIONS if kind.name == name), None)
        if kind is None or set(value) != {"latents", "operation", "positions"}:
            raise KeyError(name)
        numbers = {key: None if number is None else _number(number) for key, number in described.items()}
        operation = kind(**numbers)  # pyright: ignore[reportArgumentType, reportCallIssue]
        where = value["positions"]
        positions = Span(**cast("dict[str, int]", where)) if isinstance(where, dict) else _whole_or_none(where)
        return cls(latents=_whole(value["latents"]), operation=operation, positions=positions)


def _require_finite(name: str, **numbers: float) -> None:
    for key, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name}'s {key} must be a finite number; got {number}.")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return float(value)


def _whole(value: object) -> tuple[int, ...]:
    numbers = tuple(cast("Sequence[object]", value))
    if not all(type(number) is int for number in numbers):
        raise TypeError(value)
    return cast("tuple[int, ...]", numbers)


def _whole_or_none(value: object) -> tuple[int, ...] | None:
    return None if value is None else _whole(value)


def few(numbers: Sequence[int]) -> str:
    """Return the first of these numbers for a message."""
    return f"{', '.join(map(str, numbers[:8]))}{', …' if len(numbers) > 8 else ''}" or "none"
