"""A certificate: what is promised, every constant it rests on, and why it is none where it is none.

What (ε, δ) says, and what it does not, is in docs/privacy_certificate.md: for the given data, no set of weights is more
than e^ε times as probable, give or take δ, under N(w̃, σ²I) as under N(w_θ, σ²I) or the reverse, where w̃ is what was
computed and w_θ the exact minimiser of M_θ. It is no differential privacy, and does not say that w_θ itself is
uncertain on the protected examples.
"""

import decimal
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

from mxd.atomic import JSON
from mxd.privacy.gaussian import check_budget, noise_scale

Origin: TypeAlias = Literal["given", "computed", "derived", "estimated"]
"""Where a constant came from.

- `given`: chosen by the user.
- `computed`: evaluated on the data, in float64.
- `derived`: follows from a proof, with computed numbers in it.
- `estimated`: found by sampling or at single points; no proof says that it holds elsewhere, so nothing that rests on it
  is a guarantee.
"""

Noise: TypeAlias = Literal["secret", "seeded"]
"""Whether nobody knows the noise, or whoever knows or guesses a seed can take it off."""


class Constant(NamedTuple):
    """A number that a certificate rests on."""

    value: float
    """Its value."""
    origin: Origin
    """Where it came from."""
    meaning: str
    """What it is, and how it was found."""
    public: bool = False
    """Whether it depends on data and settings alone. If not, it tells of the weights without noise."""


class Bound(NamedTuple):
    """An upper bound on the distance from the computed weights w̃ to the exact minimiser w_θ."""

    value: float | None
    """Its value; None where the conditions of its proof are not met."""
    formula: str
    """How it follows from the constants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """An (ε, δ) certificate of a computed minimiser, or the reasons why there is none.

    The noise σ is no field: it is always computed from ε, δ and the smallest bound, by the analytic Gaussian mechanism.

    (ε, δ) covers the released weights and σ, nothing else. Bounds and constants that are not public are exact functions
    of the weights without noise: they stay with the owner, and `public()` is what may go with the weights.
    """

    epsilon: float
    """ε, above 0."""
    delta: float
    """δ, strictly between 0 and 1."""
    constants: Mapping[str, Constant]
    """By name, all that the bounds rest on."""
    bounds: Mapping[str, Bound]
    """By name, the bounds on ‖w̃ − w_θ‖: those before the step (a priori), often vacuous, and those after it."""
    noise: Noise
    """How the noise is drawn; what is seeded hides nothing, and is never certified."""
    unmet: tuple[str, ...] = ()
    """Assumptions that are not met, each a sentence."""

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta)
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {get_args(Noise)}; got {self.noise!r}.")
        for name, constant in self.constants.items():
            if constant.origin not in get_args(Origin):
                raise ValueError(f"the origin of {name} must be one of {get_args(Origin)}; got {constant.origin!r}.")
            if not math.isfinite(constant.value):
                raise ValueError(f"{name} must be a finite number; got {constant.value}.")
        for name, bound in self.bounds.items():
            if bound.value is not None and not (math.isfinite(bound.value) and bound.value >= 0):
                raise ValueError(f"the bound {name} must be a finite number of at least 0; got {bound.value}.")

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why this is no certificate; nothing where it is one."""
        seeded = "the noise is seeded: whoever knows or guesses the seed takes it off; it must be drawn without one."
        return self._unproved + ((seeded,) if self.noise == "seeded" else ())

    @property
    def _unproved(self) -> tuple[str, ...]:
        estimated = [name for name, constant in self.constants.items() if constant.origin == "estimated"]
        guesses = (f"estimated, not proved: {', '.join(estimated)}.",) if estimated else ()
        none = () if self.sensitivity is not None else ("no bound on the distance to the minimiser holds.",)
        return self.unmet + guesses + none

    @property
    def certified(self) -> bool:
        """Whether every assumption is met, every constant proved, and the noise secret."""
        return not self.reasons

    @property
    def sensitivity(self) -> float | None:
        """Δ, the smallest of the bounds; None where none holds."""
        return min((bound.value for bound in self.bounds.values() if bound.value is not None), default=None)

    @property
    def sigma(self) -> float | None:
        """σ, the standard deviation of the noise on each weight; None where there is no certificate."""
        return self.experimental_sigma if self.certified else None

    @property
    def experimental_sigma(self) -> float | None:
        """σ even where the noise is seeded, to measure what it costs; None where no bound is proved."""
        if self._unproved or self.sensitivity is None:
            return None
        return noise_scale(epsilon=self.epsilon, delta=self.delta, sensitivity=self.sensitivity)

    def statement(self) -> str:
        """Return in words what is promised, or why nothing is."""
        if self.sigma is None or self.sensitivity is None:
            return "No certificate: " + " ".join(self.reasons)
        return (
            f"Certificate: weights released as w + N(0, σ²I) with σ = {rounded_up(self.sigma)} are "
            f"({self.epsilon:g}, {self.delta:g})-indistinguishable from the exact minimiser of the objective with the "
            f"same noise, from which w is at most {rounded_up(self.sensitivity)} away."
        )

    def public(self) -> "Certificate":
        """Return what may be published with the released weights: the same promise without what it was computed from.

        Left are Δ, and so σ, and the constants that depend on data and settings alone.

        Raises:
            ValueError: If it is no certificate.
        """
        if not self.certified:
            raise ValueError(f"only a certificate may be published; got: {self.statement()}")
        meaning = "the smallest of the bounds; which one, and the others, would tell of the weights without noise"
        return replace(
            self,
            constants={name: constant for name, constant in self.constants.items() if constant.public},
            bounds={"smallest": Bound(self.sensitivity, meaning)},
        )

    def public_json(self) -> dict[str, JSON]:
        """Return `public()` as JSON, which `from_json` reads.

        Raises:
            ValueError: If it is no certificate.
        """
        return self.public().to_json()

    def to_json(self) -> dict[str, JSON]:
        """Return everything as JSON, with what follows from it: Δ, σ, and whether it is a certificate.

        For the owner alone: it tells of the weights without noise. `public_json` is the one to publish.
        """
        return {
            "certified": self.certified,
            "statement": self.statement(),
            "epsilon": self.epsilon,
            "delta": self.delta,
            "noise": self.noise,
            "sensitivity": self.sensitivity,
            "sigma": self.sigma,
            "unmet": list(self.unmet),
            "constants": {name: constant._asdict() for name, constant in self.constants.items()},
            "bounds": {name: bound._asdict() for name, bound in self.bounds.items()},
        }

    @classmethod
    def from_json(cls, text: str) -> "Certificate":
        """Read what `to_json` or `public_json` gave, and work out anew what follows; the constants are believed.

        Raises:
            ValueError: If the text is no certificate, or claims what its own constants do not give.
        """
        try:
            read = cast("dict[str, Any]", json.loads(text))
            certificate = cls(
                epsilon=float(read["epsilon"]),
                delta=float(read["delta"]),
                constants={name: Constant(**fields) for name, fields in read["constants"].items()},
                bounds={name: Bound(**fields) for name, fields in read["bounds"].items()},
                noise=read["noise"],
                unmet=tuple(str(reason) for reason in read["unmet"]),
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no certificate in JSON ({type(error).__name__}: {error}).") from error
        for name in ("certified", "sensitivity", "sigma"):
            found, expected = read.get(name), getattr(certificate, name)
            if isinstance(found, float) and isinstance(expected, float):
                agree = math.isclose(found, expected, rel_tol=1e-9)
            else:
                agree = found == expected
            if not agree:
                raise ValueError(f"the certificate claims {name} = {found}, but its own constants give {expected}.")
        return certificate


def rounded_up(value: float) -> str:
    """Return a number in six significant digits, never less than it is."""
    digits = decimal.Context(prec=6, rounding=decimal.ROUND_CEILING).create_decimal(decimal.Decimal(value))
    return f"{float(digits):.6g}"
