"""Kinds of layers that are not part of the library."""

import json
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import mxd
from mxd.layers import LayerKind, LayerRequest, SparseLayer, Transcoder, TranscoderConfig

Kinds = dict[str, LayerKind]


@dataclass(frozen=True, kw_only=True)
class MineConfig(TranscoderConfig):
    scale: float = 1.0
    sort: Literal["plain", "odd"] = "plain"
    note: str | None = None


def defined(kind: str = "mine") -> type[Transcoder]:
    """Return the same class, defined anew."""

    class Mine(Transcoder):
        pass

    Mine.kind = kind
    return Mine


def make(layer: type[Transcoder], **fields: Any) -> SparseLayer:
    return layer(MineConfig(d_in=6, d_out=5, num_latents=12, k=3, **fields), torch.Generator().manual_seed(0))


def test_a_kind_of_ones_own_is_saved_and_loaded(kinds: Kinds, tmp_path: Path) -> None:
    mine = mxd.register_kind(MineConfig)(defined())
    assert kinds["mine"] == LayerKind(MineConfig, mine)
    mxd.save(make(mine, scale=2, note="a"), tmp_path)
    loaded = mxd.load(tmp_path)
    assert type(loaded) is mine
    assert loaded.config == MineConfig(d_in=6, d_out=5, num_latents=12, k=3, scale=2.0, note="a")
    torch.testing.assert_close(loaded.get_parameter("W_dec"), make(mine).get_parameter("W_dec"), rtol=0, atol=0)


def test_a_class_may_be_registered_again_and_defined_anew(kinds: Kinds, tmp_path: Path) -> None:
    old = mxd.register_kind(MineConfig)(mxd.register_kind(MineConfig)(defined()))
    new = mxd.register_kind(MineConfig)(defined())
    assert kinds["mine"].layer is new is not old
    mxd.save(make(old), tmp_path)
    assert type(mxd.load(tmp_path)) is new


def test_what_is_not_registered_is_neither_saved_nor_loaded(kinds: Kinds, tmp_path: Path) -> None:
    mine = mxd.register_kind(MineConfig)(defined())
    mxd.save(make(mine), tmp_path / "mine")
    del kinds["mine"]
    with pytest.raises(
        ValueError, match=r"config\.json must be of a kind that is registered, mxd, .*; it is of 'mine'\. Import what"
    ):
        mxd.load(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"kind must be one of mxd, .*; got 'mine'"):
        mxd.save(make(mine), tmp_path / "again")


def test_a_class_is_not_saved_as_another(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'transcoder' is that of mxd\.layers\.transcoder\.Transcoder, and got .*Mine"
    ):
        mxd.save(make(defined("transcoder")), tmp_path / "layer")
    assert not (tmp_path / "layer").exists()


def config_lacking(name: str) -> type:
    def fill(names: dict[str, Any]) -> None:
        names["__annotations__"] = {part: int for part in ("d_in", "d_out", "num_latents", "k") if part != name}
        for part in ("num_parameters", "flops_per_token", "from_request"):
            if part != name:
                names[part] = property(lambda _: 1)

    return dataclass(frozen=True, kw_only=True)(types.new_class("Lacking", (), {}, fill))


@dataclass(frozen=True, kw_only=True)
class Listing(TranscoderConfig):
    ranks: tuple[int, ...] = ()


@dataclass(kw_only=True)
class Loose:
    d_in: int


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a name that is taken": (
        lambda: mxd.register_kind(MineConfig)(defined("molt")),
        ValueError,
        r"'molt' is that of mxd\.layers\.linear_transform_mixture\.LinearTransformMixture\. Give .*Mine another one",
    ),
    "a subclass with its parent's name": (
        lambda: mxd.register_kind(TranscoderConfig)(defined("transcoder")),
        ValueError,
        "must not be taken",
    ),
    "a name for no folder": (lambda: mxd.register_kind(MineConfig)(defined("../x")), ValueError, r"got '\.\./x'"),
    "a name with a point": (lambda: mxd.register_kind(MineConfig)(defined("Mine_2")), ValueError, "lowercase letters"),
    "a class without a name": (
        lambda: mxd.register_kind(MineConfig)(type("Nameless", (SparseLayer,), {})),
        TypeError,
        "must be a subclass of SparseLayer with a kind",
    ),
    "a configuration that changes": (lambda: mxd.register_kind(Loose), TypeError, "must be a frozen dataclass"),
    "no configuration": (lambda: mxd.register_kind(int), TypeError, "must be a frozen dataclass"),
    "a configuration of lists": (lambda: mxd.register_kind(Listing), TypeError, r"Listing\.ranks is tuple\[int"),
    "no sizes": (lambda: mxd.register_kind(config_lacking("k")), TypeError, r"Lacking lacks \['k'\]"),
    "no request": (lambda: mxd.register_kind(config_lacking("from_request")), TypeError, r"lacks \['from_request'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_kind_is_refused(kinds: Kinds, case: str) -> None:
    before = dict(kinds)
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
    assert kinds == before


def test_a_configuration_may_be_annotated_in_strings(kinds: Kinds, tmp_path: Path) -> None:
    lines = "\n".join(
        [
            "from __future__ import annotations",
            "from dataclasses import dataclass",
            "from mxd.layers import TranscoderConfig",
            "@dataclass(frozen=True, kw_only=True)",
            "class Written(TranscoderConfig):",
            "    depth: int | None = None",
        ]
    )
    names: dict[str, Any] = {}
    exec(lines, names)
    mine = mxd.register_kind(names["Written"])(defined())
    mxd.save(mine(names["Written"](d_in=6, d_out=5, num_latents=12, depth=2, k=3)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layer"]["depth"] == 2
    assert mxd.load(tmp_path).config == names["Written"](d_in=6, d_out=5, num_latents=12, depth=2, k=3)
    config["layer"]["depth"] = "2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"must give depth as one of int, NoneType; got '2'"):
        mxd.load(tmp_path)


def test_what_is_asked_for_becomes_its_configuration(kinds: Kinds) -> None:
    mxd.register_kind(MineConfig)(defined())
    request = LayerRequest(d_in=6, d_out=5, num_latents=12, k=3)
    assert kinds["mine"].configure(request) == MineConfig(d_in=6, d_out=5, num_latents=12, k=3)
