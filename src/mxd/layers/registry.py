"""Every kind of sparse layer: the one registry."""

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

from mxd.layers.linear_transform_mixture import LinearTransformMixture, LinearTransformMixtureConfig
from mxd.layers.low_rank_mixture import LowRankMixture, LowRankMixtureConfig
from mxd.layers.mixture_of_decoders import MixtureOfDecoders, MixtureOfDecodersConfig
from mxd.layers.request import LayerRequest, RequestedConfig
from mxd.layers.shared_transcoder import SharedTranscoder, SharedTranscoderConfig
from mxd.layers.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from mxd.layers.sparse_layer import SparseLayer, SparseLayerConfig
from mxd.layers.topk_autoencoder import TopKAutoencoder, TopKAutoencoderConfig
from mxd.layers.transcoder import Transcoder, TranscoderConfig

Layer = TypeVar("Layer", bound=SparseLayer)

_ASKED = ("d_in", "d_out", "num_latents", "k", "num_parameters", "flops_per_token", "from_request")
"""What a configuration is asked for."""


class LayerKind(NamedTuple):
    """The two classes that make up a kind of layer."""

    config: type
    """Frozen dataclass of everything that is not a tensor."""
    layer: type[SparseLayer]
    """The layer, built from its configuration."""

    def configure(self, request: LayerRequest) -> SparseLayerConfig:
        """Return the configuration of this kind that was asked for.

        Raises:
            ValueError: If a size does not fit, or something that the kind needs is missing.
        """
        return cast(type[RequestedConfig], self.config).from_request(request)


LAYERS: dict[str, LayerKind] = {
    "mxd": LayerKind(MixtureOfDecodersConfig, MixtureOfDecoders),
    "transcoder": LayerKind(TranscoderConfig, Transcoder),
    "skip-transcoder": LayerKind(SkipTranscoderConfig, SkipTranscoder),
    "shared-transcoder": LayerKind(SharedTranscoderConfig, SharedTranscoder),
    "topk-sae": LayerKind(TopKAutoencoderConfig, TopKAutoencoder),
    "low-rank": LayerKind(LowRankMixtureConfig, LowRankMixture),
    "molt": LayerKind(LinearTransformMixtureConfig, LinearTransformMixture),
}
"""Every kind of sparse layer; `register_kind` adds others."""


def require_kind(kind: str) -> LayerKind:
    """Return the classes of this kind.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in LAYERS:
        raise ValueError(f"kind must be one of {', '.join(LAYERS)}; got {kind!r}.")
    return LAYERS[kind]


def require_kind_of(layer: SparseLayer) -> LayerKind:
    """Return the classes of a layer's kind.

    Raises:
        ValueError: If there is no such kind, or it is another class's.
    """
    known = require_kind(layer.kind)
    if not _same_class(known.layer, type(layer)):
        raise ValueError(
            f"kind must be a class's own to be saved; {layer.kind!r} is that of {_full_name(known.layer)}, and got "
            f"{_full_name(type(layer))}. Give it a kind of its own, and register that with mxd.register_kind."
        )
    return known


def register_kind(config: type) -> Callable[[type[Layer]], type[Layer]]:
    """Return a decorator that registers a class as the kind of layer that its `kind` says, built from such a `config`.

    From then on layers of this kind are sized, trained, saved, loaded and evaluated as any others are, in this process.
    To register a class again, also anew defined, does nothing more.

    Args:
        config: A frozen dataclass that has what `SparseLayerConfig` names, and `from_request`; its fields are numbers,
            strings, booleans and None, which a config.json can hold.

    Raises:
        TypeError: If the two classes do not make up a kind.
        ValueError: If the kind's name is another class's, or cannot be that of a folder.

    Example:
        >>> @register_kind(TiedConfig)  # doctest: +SKIP
        ... class Tied(SparseLayer):
        ...     kind = "tied"
    """
    _require_config(config)

    def register(layer: type[Layer]) -> type[Layer]:
        kind: object = getattr(layer, "kind", None)
        if not (isinstance(layer, type) and issubclass(layer, SparseLayer) and isinstance(kind, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"A kind must be a subclass of SparseLayer with a kind, its name; got {layer!r:.100}.")
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", kind):
            raise ValueError(f"A kind's name must be of lowercase letters, digits and single hyphens; got {kind!r}.")
        if kind in LAYERS and not _same_class(LAYERS[kind].layer, layer):
            raise ValueError(
                f"A kind's name must not be taken; {kind!r} is that of {_full_name(LAYERS[kind].layer)}. "
                f"Give {_full_name(layer)} another one."
            )
        LAYERS[kind] = LayerKind(config, layer)
        return layer

    return register


def field_types(config: type) -> dict[str, object]:
    """Return the type of each field of a dataclass, also of one whose annotations are strings."""
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config)}


def _require_config(config: type) -> None:
    parameters: Any = getattr(config, "__dataclass_params__", None)
    if not (isinstance(config, type) and is_dataclass(config) and parameters.frozen):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"A kind's configuration must be a frozen dataclass; got {config!r:.100}.")
    types = field_types(config)
    missing = [name for name in _ASKED if name not in types and not hasattr(config, name)]
    if missing:
        raise TypeError(f"A kind's configuration must have {', '.join(_ASKED)}; {config.__name__} lacks {missing}.")
    for name, kind in types.items():
        allowed = get_args(kind) or (kind,)
        if get_origin(kind) is not Literal and not all(one in (int, float, bool, str, NoneType) for one in allowed):
            raise TypeError(
                f"A configuration's fields must be int, float, bool, str, None or a Literal, to be saved as JSON; "
                f"{config.__name__}.{name} is {kind!r:.60}."
            )


def _same_class(one: type, other: type) -> bool:
    """Whether two classes are one, or the same lines run twice, as in a notebook."""
    return _full_name(one) == _full_name(other)


def _full_name(one: type) -> str:
    return f"{one.__module__}.{one.__qualname__}"
