import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file

import mxd
from mxd.checkpoint import Provenance, load_checkpoint, load_layer, save_layer
from mxd.layers import (
    LAYERS,
    LinearTransformMixtureConfig,
    LowRankMixtureConfig,
    MixtureOfDecodersConfig,
    SharedTranscoderConfig,
    SkipTranscoderConfig,
    SparseLayer,
    SparseLayerConfig,
    TopKAutoencoderConfig,
    TranscoderConfig,
    require_kind,
)

MIXTURE = MixtureOfDecodersConfig(d_in=6, d_hidden=8, d_out=5, num_experts=12, k=3, activation="silu")
CONFIGS: dict[str, tuple[str, SparseLayerConfig]] = {
    "mxd": ("mxd", MIXTURE),
    "mxd-shared": ("mxd", replace(MIXTURE, shared_expert=True)),
    "mxd-glu": ("mxd", replace(MIXTURE, encoder="glu", normalize_experts=False)),
    "transcoder": ("transcoder", TranscoderConfig(d_in=6, d_out=5, num_latents=12, k=3)),
    "skip-transcoder": ("skip-transcoder", SkipTranscoderConfig(d_in=6, d_out=5, num_latents=12, k=3)),
    "shared-transcoder": (
        "shared-transcoder",
        SharedTranscoderConfig(d_in=6, d_hidden=8, d_out=5, num_latents=12, k=3),
    ),
    "topk-sae": ("topk-sae", TopKAutoencoderConfig(d_in=6, num_latents=12, k=3, normalize_decoder=False)),
    "low-rank": ("low-rank", LowRankMixtureConfig(d_in=6, d_hidden=8, d_out=5, num_experts=12, rank=4, k=3)),
    "molt": ("molt", LinearTransformMixtureConfig(d_in=6, d_out=5, num_latents=12, rank=4, k=3)),
}
KNOWN = Provenance(
    model="openai-community/gpt2",
    revision="607a30d",
    layer=8,
    module_path="transformer.h.8.mlp",
    text="stdlib …",
    tokens_trained=480_000_000,
    seed=3,
    init="paper",
    special_positions="replace",
    mxd_version="0.1.0",
)

Settings = dict[str, object]


def build(name: str, seed: int = 0) -> SparseLayer:
    kind, config = CONFIGS[name]
    layer = cast("Callable[..., SparseLayer]", require_kind(kind).layer)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            # No zeros, so that a tensor that is lost or transposed cannot go unseen.
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_layer(build("mxd"), tmp_path / "layer", KNOWN)
    return tmp_path / "layer"


def edit(folder: Path, change: Callable[[Settings], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors in the file, and the checksum with them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    digest = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda config: config.update(weights_sha256=digest))


def part(config: Settings, name: str) -> Settings:
    return cast("Settings", config[name])


def test_every_kind_is_tested() -> None:
    assert {kind for kind, _ in CONFIGS.values()} == set(LAYERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_comes_back_as_it_was_saved(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    layer = build(name).to(dtype).train()
    save_layer(layer, tmp_path)
    loaded = load_layer(str(tmp_path))
    assert type(loaded) is type(layer)
    assert loaded.config == layer.config
    assert not loaded.training
    assert layer.training
    assert loaded.state_dict().keys() == layer.state_dict().keys()
    for tensor_name, tensor in layer.state_dict().items():
        found = loaded.state_dict()[tensor_name]
        assert found.dtype == dtype
        assert torch.equal(found, tensor)
        assert found.stride() == tensor.stride()
    x = torch.randn(7, 6, dtype=dtype)
    assert torch.equal(loaded(x).prediction, layer(x).prediction)


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    load_layer(folder)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_layers_give_equal_bytes(tmp_path: Path, name: str) -> None:
    save_layer(build(name), tmp_path / "a", KNOWN)
    save_layer(load_layer(tmp_path / "a"), tmp_path / "b", KNOWN)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_folder_holds_two_files_and_no_more_rights_than_the_umask_gives(tmp_path: Path) -> None:
    for umask, rights in {0o022: 0o644, 0o027: 0o640}.items():
        before = os.umask(umask)
        try:
            save_layer(build("mxd"), tmp_path / str(umask))
        finally:
            os.umask(before)
        files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / str(umask)).iterdir()}
        assert files == {"config.json": rights, "model.safetensors": rights}


def test_where_a_layer_belongs_comes_back(folder: Path, tmp_path: Path) -> None:
    assert load_checkpoint(folder).provenance == KNOWN
    save_layer(build("mxd"), tmp_path / "unknown")
    assert load_checkpoint(tmp_path / "unknown").provenance == Provenance()


def test_a_layer_saved_before_a_setting_existed_loads_and_does_what_it_did(folder: Path) -> None:
    expected = load_layer(folder)
    edit(folder, lambda config: [part(config, "layer").pop(name) for name in ("selection", "shared_expert")])
    assert load_layer(folder).config == expected.config


def test_saving_again_replaces_the_layer(folder: Path) -> None:
    save_layer(build("transcoder"), folder)
    assert load_layer(folder).kind == "transcoder"
    assert len(list(folder.iterdir())) == 2


def test_a_run_with_one_layer_loads_and_one_with_several_names_them(tmp_path: Path) -> None:
    save_layer(build("mxd"), tmp_path / "layers" / "3" / "mxd-k3")
    assert load_layer(tmp_path).kind == "mxd"
    save_layer(build("transcoder"), tmp_path / "layers" / "4" / "transcoder-k3")
    with pytest.raises(ValueError, match=r"several layers; name one of them: layers/3/mxd-k3, layers/4/transcoder-k3"):
        load_layer(tmp_path)
    assert mxd.from_pretrained(str(tmp_path), subfolder="layers/4/transcoder-k3").kind == "transcoder"
    save_layer(build("transcoder"), tmp_path / "layers" / "3" / "transcoder-k3")
    with pytest.raises(ValueError, match=r"layers/3 holds several layers; name one of them: mxd-k3, transcoder-k3"):
        load_layer(tmp_path / "layers" / "3")


@pytest.mark.parametrize("repository", ["nobody-at-all/nothing-at-all", "no such thing", "./nothing"])
def test_a_hub_id_that_cannot_be_fetched_is_a_file_not_found(repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"is no folder here and could not be fetched .*Check the spelling"):
        mxd.from_pretrained(repository)


def test_pickles_beside_the_weights_are_not_looked_at(folder: Path) -> None:
    # Unpickling this calls os.abort.
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors.pkl"):
        (folder / name).write_bytes(b"cos\nabort\n(tR.")
    assert load_layer(folder).kind == "mxd"
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors must lie beside config\.json; it is missing"):
        load_layer(folder)


CHANGES: dict[str, tuple[Callable[[Settings], object], str]] = {
    "unknown key": (lambda c: c.update(extra=1), r"unknown keys in the top level: extra; .*remove them or upgrade"),
    "unknown key of the layer": (lambda c: part(c, "layer").update(rank=2), r"unknown keys in layer: rank; known are"),
    "unknown key of the origin": (lambda c: part(c, "provenance").update(by="me"), r"unknown keys in provenance: by"),
    "missing key": (lambda c: c.pop("weights_sha256"), r"every key in the top level; weights_sha256 are missing"),
    "missing key of the layer": (lambda c: part(c, "layer").pop("k"), r"every key in layer; k are missing"),
    "missing key of the origin": (lambda c: part(c, "provenance").pop("seed"), r"every key in provenance; seed are"),
    "number as text": (lambda c: part(c, "layer").update(k="3"), r"must give k as int; got '3'"),
    "number as truth": (lambda c: part(c, "layer").update(k=True), r"must give k as int; got True"),
    "truth as number": (lambda c: part(c, "layer").update(normalize_experts=1), r"normalize_experts as bool; got 1"),
    "unknown activation": (
        lambda c: part(c, "layer").update(activation="mish"),
        r"activation as one of 'relu', .*mish",
    ),
    "activation as list": (
        lambda c: part(c, "layer").update(activation=[]),
        r"activation as one of 'relu', .*got \[\]",
    ),
    "unknown encoder": (lambda c: part(c, "layer").update(encoder="moe"), r"encoder as one of 'mlp', 'glu'; got 'moe'"),
    "origin of another type": (
        lambda c: part(c, "provenance").update(layer="8"),
        r"layer as one of int, NoneType; got",
    ),
    "k above the latents": (lambda c: part(c, "layer").update(k=13), r"k must lie in \[1, 12\]"),
    "layer that is no object": (lambda c: c.update(layer=[1]), r"must give layer as dict; got \[1\]"),
    "kind that is no text": (lambda c: c.update(kind=["mxd"]), r"must give kind as str; got \['mxd'\]"),
    "unknown kind": (
        lambda c: c.update(kind="crosscoder"),
        r"kind that is registered, mxd, .*of 'crosscoder'. Import what registers",
    ),
    "other kind": (lambda c: c.update(kind="transcoder"), r"unknown keys in layer: .*activation"),
    "other format version": (lambda c: c.update(format_version=2), r"must have format version 1; it has 2"),
    "other format": (lambda c: c.update(format="sae"), r"must describe an mxd layer .*some other configuration"),
    "other checksum": (lambda c: c.update(weights_sha256="0" * 64), r"must have the checksum that config\.json names"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_config_that_is_not_what_save_writes_is_refused(folder: Path, case: str) -> None:
    change, message = CHANGES[case]
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        load_layer(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '"mxd"', "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json must (be JSON|describe an mxd layer)"):
        load_layer(folder)


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "NaN": (lambda t: t["W_gate"].view(-1)[3].fill_(float("nan")), r"finite weights; W_gate has NaN or infinite"),
    "infinity": (lambda t: t["b_dec"].fill_(float("-inf")), r"finite weights; b_dec has NaN or infinite"),
    "missing tensor": (lambda t: t.pop("b_gate"), r"tensors that config\.json describes; b_gate differ"),
    "unknown tensor": (lambda t: t.update(W_skip=torch.ones(2)), r"tensors that config\.json describes; W_skip differ"),
    "transposed tensor": (lambda t: t.update(W_gate=t["W_gate"].t()), r"describes; W_gate differ in name or shape"),
    "no tensor": (lambda t: t.clear(), r"b_dec, b_gate, .*differ in name or shape"),
    "several types": (lambda t: t.update(b_dec=t["b_dec"].half()), r"one floating-point type; got torch\.float16, "),
    "whole numbers": (lambda t: t.update({n: v.int() for n, v in t.items()}), r"floating-point type; got torch\.int32"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_weights_that_are_not_the_layers_are_refused(folder: Path, case: str) -> None:
    change, message = TENSORS[case]
    rewrite_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        load_layer(folder)


@pytest.mark.parametrize("kept", [-1, 10, 0])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"must have the checksum .*truncated or was altered\. Restore it"):
        load_layer(folder)


def test_altered_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ValueError, match=r"must have the checksum .*truncated or was altered\. Restore it"):
        load_layer(folder)


def test_bytes_that_are_no_safetensors_are_refused_even_with_their_checksum(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"cos\nabort\n(tR.")
    digest = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda config: config.update(weights_sha256=digest))
    with pytest.raises(ValueError, match="must be a safetensors file; it does not parse"):
        load_layer(folder)


def test_missing_folders_and_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is none at .*nothing"):
        load_layer(tmp_path / "nothing")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        load_layer(folder)
    with pytest.raises(FileNotFoundError, match="there is none at"):
        load_layer(folder / "model.safetensors")


@pytest.mark.parametrize("failing", range(2))
@pytest.mark.parametrize("method", ["write_bytes", "open"])
def test_a_failed_save_leaves_the_old_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int, method: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    original = getattr(Path, method)
    calls: list[Path] = []

    def full_disk(path: Path, *args: object, **kwargs: object) -> object:
        if path.suffix == ".partial":
            calls.append(path)
            if len(calls) == failing + 1:
                raise OSError(28, "No space left on device")
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_layer(build("transcoder"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_layer(folder).kind == "mxd"


def test_an_interrupted_save_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.replace

    def die(path: Path, target: Path) -> Path:
        if target.name == "config.json":
            raise KeyboardInterrupt
        return original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_layer(build("mxd", seed=1), folder)
    with pytest.raises(ValueError, match="must have the checksum"):
        load_layer(folder)
    save_layer(build("mxd", seed=1), folder)
    assert load_layer(folder).kind == "mxd"


def test_a_layer_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    layer = build("mxd")
    layer.get_parameter("b_dec").data = layer.get_parameter("b_dec").data.half()
    with pytest.raises(ValueError, match="one floating-point type"):
        save_layer(layer, tmp_path / "layer")
    layer = build("transcoder")
    layer.kind = "mine"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="kind must be one of"):
        save_layer(layer, tmp_path / "layer")
    assert not (tmp_path / "layer").exists()


def test_a_layer_may_be_moved(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    assert load_layer(tmp_path / "elsewhere").config == MIXTURE
