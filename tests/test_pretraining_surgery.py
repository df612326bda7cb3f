"""Multilinear MLPs inside real architectures: GPT-2 of transformers, and MLP-Mixers with timm's names."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mxd.models import load_language_model
from mxd.multilinear import MultilinearMLP, matched_block_rank
from mxd.pretraining.artifact import load_model, save_model
from mxd.pretraining.mixer import MixerConfig, MlpMixer
from mxd.pretraining.surgery import MlpChoice, find_mlps, replace_mlps

CHOICES = {
    "cp": MlpChoice(kind="cp", num_experts=(5,)),
    "tr two levels": MlpChoice(kind="tr", num_experts=(3, 2), ring=2, normalize_input=True, gate="softmax"),
    "cp by fraction": MlpChoice(kind="cp", num_experts=(4,), rank_fraction=0.75, normalization="batch"),
}
MIXER = MixerConfig(
    image_size=8, channels=1, patch_size=2, num_blocks=2, d_model=12, d_token=10, d_channel=24, num_classes=3
)


def language_model(folder: Path) -> nn.Module:
    return cast(nn.Module, load_language_model(str(folder)).model).float()


def untied(module: nn.Module) -> None:
    """Give the gates weights, which begin at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "W_gate" in name:
                parameter.normal_(generator=generator)


def outside_mlps(model: nn.Module, paths: list[str]) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(tuple(f"{path}." for path in paths))}


@pytest.mark.parametrize("name", CHOICES)
def test_every_mlp_of_a_gpt2_is_replaced_and_nothing_else(gpt2: Path, name: str) -> None:
    model = language_model(gpt2)
    before = copy.deepcopy(model)
    paths = [found.path for found in find_mlps(model)]
    assert paths == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    configs = replace_mlps(model, CHOICES[name], torch.Generator().manual_seed(0))
    assert list(configs) == paths
    assert [path for path, module in model.named_modules() if isinstance(module, MultilinearMLP)] == paths
    kept, old = outside_mlps(model, paths), outside_mlps(before, paths)
    assert kept.keys() == old.keys()
    assert all(torch.equal(kept[key], old[key]) for key in kept)
    dense = before.get_submodule(paths[0])
    for config in configs.values():
        assert (config.d_in, config.d_hidden, config.d_out, config.activation) == (16, 64, 16, "gelu_tanh")
        if CHOICES[name].rank_fraction is None:
            assert config.ranks[-2 if config.kind == "tr" else 0] == matched_block_rank(config, ring=2).rank
            assert config.num_parameters >= sum(parameter.numel() for parameter in dense.parameters())
        else:
            assert config.ranks == (12,)


def test_the_model_computes_with_the_new_mlps(gpt2: Path) -> None:
    model = language_model(gpt2)
    untouched = copy.deepcopy(model)
    replace_mlps(model, CHOICES["cp"], torch.Generator().manual_seed(0))
    untied(model)
    ids = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = cast(Any, model)(ids).logits
    # The same computation by hand: the blocks' forward of the untouched model, with our block in place of its MLP.
    for layer in range(2):
        block = model.get_submodule(f"transformer.h.{layer}.mlp")
        untouched.get_submodule(f"transformer.h.{layer}.mlp").forward = block.forward  # pyright: ignore
    torch.testing.assert_close(cast(Any, untouched)(ids).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", CHOICES)
def test_a_saved_model_is_loaded_bit_for_bit_and_generates(gpt2: Path, tmp_path: Path, name: str) -> None:
    model = language_model(gpt2)
    replace_mlps(model, CHOICES[name], torch.Generator().manual_seed(0))
    untied(model)
    model.eval()
    save_model(model, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    state = torch.random.get_rng_state()
    loaded = load_model(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(cast(Any, loaded)(ids).logits, cast(Any, model)(ids).logits)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = cast(Any, loaded).generate(ids, **arguments)
    assert generated.shape == (1, 10)
    assert torch.equal(generated, cast(Any, model).generate(ids, **arguments))
    save_model(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


def test_transformers_refuses_the_folder_in_place_of_guessing(gpt2: Path, tmp_path: Path) -> None:
    model = language_model(gpt2)
    replace_mlps(model, CHOICES["cp"])
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="model_type"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_every_mlp_of_a_mixer_is_replaced_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MlpMixer(MIXER)
    nn.init.normal_(model.head.weight)
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    configs = replace_mlps(model, replace(CHOICES["cp"], normalization="batch"), torch.Generator().manual_seed(0))
    assert list(configs) == [f"blocks.{n}.{part}" for n in range(2) for part in ("mlp_tokens", "mlp_channels")]
    assert [(c.d_in, c.d_hidden, c.d_out) for c in configs.values()] == [(16, 10, 16), (12, 24, 12)] * 2
    kept = outside_mlps(model, list(configs))
    assert all(torch.equal(kept[key], old[key]) for key in kept)
    untied(model)
    images = torch.randn(5, 1, 8, 8)
    for _ in range(2):
        model.train()(images)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(images), model.eval()(images))


def test_our_mixer_is_the_equations_and_has_timms_names() -> None:
    torch.manual_seed(0)
    model = MlpMixer(MIXER).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    image = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    w = model.state_dict()
    patches = image.reshape(3, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(3, 16, 4)
    x = patches @ w["stem.proj.weight"].reshape(12, 4).T + w["stem.proj.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def mlp(x: Tensor, name: str) -> Tensor:
        hidden = x @ w[f"{name}.fc1.weight"].T + w[f"{name}.fc1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        return hidden @ w[f"{name}.fc2.weight"].T + w[f"{name}.fc2.bias"]

    for n in range(2):
        x = x + mlp(norm(x, f"blocks.{n}.norm1").mT, f"blocks.{n}.mlp_tokens").mT
        x = x + mlp(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp_channels")
    logits = norm(x, "norm").mean(1) @ w["head.weight"].T + w["head.bias"]
    torch.testing.assert_close(model(image), logits, rtol=1e-10, atol=1e-10)
    with torch.device("meta"):
        full = MlpMixer(MixerConfig())
    assert sum(parameter.numel() for parameter in full.parameters()) == 18_528_264
    block = {"norm1", "norm2", "mlp_tokens.fc1", "mlp_tokens.fc2", "mlp_channels.fc1", "mlp_channels.fc2"}
    modules = {"stem.proj", "norm", "head"} | {f"blocks.{n}.{name}" for n in range(8) for name in block}
    assert full.state_dict().keys() == {f"{name}.{part}" for name in modules for part in ("weight", "bias")}


def test_timms_own_mixer_is_replaced_takes_our_weights_and_is_saved(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install 'mxd[vision]')", exc_type=ImportError)
    theirs = timm.create_model("mixer_s16_224", pretrained=False)
    ours = MlpMixer(MixerConfig())
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(theirs.eval()(image), ours.eval()(image))
    choice = MlpChoice(kind="cp", num_experts=(64,), rank_fraction=0.75, normalization="batch")
    assert [config.ranks for config in replace_mlps(theirs, choice).values()] == [(147,), (384,)] * 8
    logits = theirs.eval()(image)
    assert logits.shape == (1, 1000)
    save_model(theirs, tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(image), logits)


class ForeignMixer(nn.Module):
    """Another library's Mixer: the same modules under the same names, and no configuration."""

    def __init__(self, ours: MlpMixer) -> None:
        super().__init__()
        self.stem, self.blocks, self.norm, self.head = ours.stem, ours.blocks, ours.norm, ours.head
        self.forward = ours.forward


@pytest.mark.parametrize("kind", ["dense", "cp"])
def test_a_mixer_of_another_library_is_saved_as_ours(kind: Literal["dense", "cp"], tmp_path: Path) -> None:
    ours = MlpMixer(MIXER)
    foreign = ForeignMixer(ours)
    replace_mlps(foreign, MlpChoice(kind=kind, num_experts=(4,), normalization="batch"))
    for parameter in foreign.parameters():
        nn.init.normal_(parameter)
    images = torch.randn(2, MIXER.channels, MIXER.image_size, MIXER.image_size)
    expected = foreign.eval()(images)
    save_model(foreign, tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(images), expected)
    with pytest.raises(ValueError, match="must be of transformers or an MlpMixer"):
        save_model(nn.Linear(2, 2), tmp_path)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    model = MlpMixer(replace(MIXER, stochastic_depth=0.4))
    drops = [block.get_submodule("drop_path") for block in model.blocks]
    assert [drop.share for drop in drops] == [0.0, 0.4]
    x = torch.ones(4000, 2, 3)
    dropped = drops[1].train()(x)
    assert dropped.flatten(1).unique(dim=0).shape[0] == 2
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert drops[1].eval()(x) is x


def test_models_whose_mlps_are_gated_are_refused(llama: Path) -> None:
    model = language_model(llama)
    with pytest.raises(ValueError, match=r"that of block 0 .* is gated"):
        replace_mlps(model, CHOICES["cp"])
    assert replace_mlps(model, MlpChoice(kind="dense")) == {}


def test_a_model_that_cannot_be_written_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (MlpMixer(replace(MIXER, num_classes=count)) for count in (3, 4))
    save_model(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write, written = Path.write_bytes, [0]

    def full(path: Path, content: bytes) -> int:
        written[0] += 1
        if written[0] == 2:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        save_model(new, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_model(new, tmp_path)
    assert load_model(tmp_path).state_dict().keys() == new.state_dict().keys()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = MlpMixer(MIXER)
    replace_mlps(model, replace(CHOICES["cp"], normalization="batch"))
    save_model(model, tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()

    def refused(error: type[Exception], sentence: str) -> None:
        with pytest.raises(error, match=sentence):
            load_model(tmp_path)
        config.write_text(good_config)
        weights.write_bytes(good_weights)

    changed = json.loads(good_config)
    changed["blocks"]["blocks.0.mlp_tokens"]["num_experts"] = [6]
    config.write_text(json.dumps(changed))
    refused(ValueError, r"differ in name or shape \(blocks\.0\.mlp_tokens")
    changed = json.loads(good_config)
    del changed["blocks"]["blocks.0.mlp_tokens"]["gate"]
    config.write_text(json.dumps(changed))
    refused(ValueError, "gate are missing or unknown")
    for change in ({"model": None}, {"model": {"d_model": "x"}}, {"blocks": {"blocks.9.mlp": changed["blocks"]}}):
        config.write_text(json.dumps(json.loads(good_config) | change))
        refused(ValueError, "must (describe a model|give)")
    config.write_text('{"format": "mxd"}')
    refused(ValueError, "must describe a multilinear model")
    config.write_text("{")
    refused(ValueError, "must be JSON")
    weights.write_bytes(good_weights[:100])
    refused(ValueError, "must be a safetensors file")
    save_file({**load_file(weights), "head.bias": torch.tensor([1.0, float("nan"), 0.0])}, weights)
    refused(ValueError, "finite weights; head.bias has not")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="transformers or an MlpMixer to be saved; got Linear"):
        save_model(nn.Linear(2, 2), tmp_path / "linear")
