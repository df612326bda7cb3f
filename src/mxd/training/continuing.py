"""What a run that goes on takes from its run.json, and what may differ from it."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple, cast

from mxd.atomic import JSON
from mxd.bundled import MODEL_NAME
from mxd.data.text import STDLIB
from mxd.kernels.backends import VARIABLE, chosen_backend
from mxd.runs.places import WORKING_FOLDER, recorded_place
from mxd.runs.run import require_command
from mxd.training.config import TrainConfig
from mxd.training.resources import Resources

KEPT_ON_RESUME = ("precision", "model_precision", "kernels", "threads")
"""What a resumed run computes with as it began, whatever this machine would choose now."""
_PLACES = ("config.model", "config.text", "config.init_from", "config.cache", WORKING_FOLDER)
"""Names of what may have moved: fingerprint, digest and checksums say whether it is the same."""
MAY_DIFFER = (
    *(f"resources.{name}" for name in KEPT_ON_RESUME),
    *_PLACES,
    *("resources.prefetch", "cache", "command", "model.id", "model.revision", "text.names"),
)
"""What run.json says that a run may be resumed with another value of: model, text and activations may have moved, say,
and an earlier version wrote no `command`; `require_command` looks at that."""


class Commits(NamedTuple):
    """Revisions of what is read from the hub."""

    model: str | None
    """Of the language model."""
    text: str | None
    """Of the text."""


def recorded_config(stored: Mapping[str, JSON]) -> TrainConfig:
    """Return what was asked for when a run was begun; options that its version of mxd did not have are as by default.

    Args:
        stored: The run.json of a run of `mxd train`.

    Raises:
        ValueError: If it is another command's, or its `config` is none that this version of mxd can read.
    """
    require_command(stored, "train")
    config = stored.get("config")
    known = {field.name for field in fields(TrainConfig)}
    given = {name: value for name, value in cast("Mapping[str, Any]", config or {}).items() if name in known}
    try:
        return TrainConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"run.json must hold the options of mxd train under config; it does not ({str(error).rstrip('.')}). "
            "Restore it from a copy, or continue with the version of mxd that wrote it."
        ) from error


def is_as_recorded(config: TrainConfig, stored: Mapping[str, JSON]) -> bool:
    """Whether a configuration can be compared with a run's by its values alone, without the model and the text."""
    return config.layer != "all" and not any(is_renamed(config, stored, name) for name in ("model", "text"))


def is_renamed(config: TrainConfig, stored: Mapping[str, JSON], name: str) -> bool:
    """Whether a setting that names files has another value than when the run was begun."""
    asked = getattr(config, name)
    return _recorded(stored).get(name) != (list(asked) if isinstance(asked, tuple) else asked)


def with_places(config: TrainConfig, stored: Mapping[str, JSON]) -> TrainConfig:
    """Return a configuration with the files that the run named where they are now; other names stay."""
    placed: dict[str, Any] = {}
    for name, alias in {"model": MODEL_NAME, "init_from": "", "cache": ""}.items():
        if getattr(config, name) is not None and not is_renamed(config, stored, name):
            placed[name] = recorded_place(getattr(config, name), stored, alias=alias)
    if not is_renamed(config, stored, "text"):
        placed["text"] = tuple(recorded_place(name, stored, alias=STDLIB) for name in config.text)
    return replace(config, **placed)


def stored_commits(config: TrainConfig, stored: Mapping[str, JSON]) -> Commits:
    """Return the commits that the run began with; of what is named anew, none or the one that is asked for."""
    model, text = (cast(Mapping[str, Any], stored[name]) for name in ("model", "text"))
    return Commits(
        model=config.revision if is_renamed(config, stored, "model") else model["revision"],
        text=None if is_renamed(config, stored, "text") else text["revision"],
    )


def stored_resources(resources: Resources, stored: Mapping[str, JSON]) -> Resources:
    """Return what the run computes with, from what this machine would choose and what the run began with.

    Raises:
        ValueError: If the environment asks for other kernels.
    """
    known = cast(Mapping[str, Any], stored["resources"])
    kernels = known.get("kernels", resources.kernels)
    if chosen_backend() not in ("auto", kernels):
        raise ValueError(
            f"{VARIABLE} must be {kernels} or unset to continue a run that began so; got {chosen_backend()}. "
            "Unset it, or train anew with another --out."
        )
    return replace(resources, **{name: known[name] for name in KEPT_ON_RESUME if name in known})


def _recorded(stored: Mapping[str, JSON]) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", stored.get("config", {}))
