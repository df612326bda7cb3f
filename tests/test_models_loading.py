import io
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mxd.models import device_of, digest, fingerprint, load_language_model, load_outline, most_positions, resolve_device
from mxd.pretraining.artifact import load_model, save_model
from mxd.training.decompose import require_context
from tests import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1)
    config.dtype = torch.bfloat16
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_loads_frozen_and_in_evaluation_mode(folder: Path) -> None:
    loaded = load_language_model(str(folder))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.tokenizer("a")["input_ids"] == [1]
    assert (loaded.id, loaded.revision) == (str(folder), None)
    assert load_language_model(str(folder), revision="main").revision is None, "a folder has no branches"
    assert load_language_model(str(folder), dtype=torch.float32).model.dtype == torch.float32


def test_a_model_is_where_it_was_put(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    loaded = load_language_model(str(folder), device="auto")
    assert loaded.device == device_of(loaded.module) == torch.device("cpu")
    assert loaded.module is loaded.model
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"


def test_positions_are_found_where_the_configuration_has_them() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    text = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 24}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    assert not hasattr(config, "max_position_embeddings")
    model = hf.Gemma3ForConditionalGeneration(config)
    assert most_positions(model) == 24
    require_context(model, 24)
    with pytest.raises(ValueError, match="context must be at most 24, the model's number of positions; got 25"):
        require_context(model, 25)


def test_importing_models_does_not_import_transformers() -> None:
    code = "import sys, mxd.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"found none in .*\.bin, \.pt .*refused.*save_pretrained"):
        load_language_model(str(folder))


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_weights_are_named(folder: Path, damage: str) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"no weights at all")
    with pytest.raises(ValueError, match=r"found '.*model\.safetensors' truncated or damaged"):
        load_language_model(str(folder))


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="must include 'model-00001-of-00002"):
        load_language_model(str(folder))
    index.write_text("[]")
    with pytest.raises(ValueError, match="must be JSON with a weight_map"):
        load_language_model(str(folder))


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing \(transformer\.h\.0\.mlp\.c_fc\.bias\)"):
        load_language_model(str(folder))
    edit_config(folder, n_inner=5)
    with pytest.raises(ValueError, match="the shapes that its config"):
        load_language_model(str(folder))


def test_a_missing_tokenizer_is_reported(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="must come with its tokenizer"):
        load_language_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "frobnicator"}, "architecture that transformers .* knows"),
        ({"model_type": "vit"}, "must be a causal language model"),
        ({"model_type": "frob", "auto_map": {"AutoConfig": "conf.C"}}, "trust_remote_code=True"),
    ],
)
def test_unknown_architectures_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_language_model(str(folder))


@pytest.mark.parametrize("load", [load_language_model, load_outline])
def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(
    folder: Path, load: Callable[[str], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_evil_code(folder, folder / "config.json")
    answers = io.StringIO("y\ny\n")
    monkeypatch.setattr(sys, "stdin", answers)
    with pytest.raises(
        ValueError, match=r"^A model must need no code of its own .*found '.*' with Python code\. .*\.$"
    ):
        load(str(folder))
    assert (answers.tell(), capsys.readouterr().out) == (0, "")
    assert not (folder / "ran").exists()


def test_code_that_a_saved_multilinear_model_names_is_not_run_and_nobody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(load_language_model(str(folder)).module, folder / "ours")
    with_evil_code(folder, folder / "ours/config.json", within="model", _name_or_path=str(folder))
    answers = io.StringIO("y\ny\n")
    monkeypatch.setattr(sys, "stdin", answers)
    with pytest.raises(ValueError, match=r"^[^\n]*must describe a model; it does not \([^\n]*\)\. Restore[^\n]*\.$"):
        load_model(folder / "ours")
    assert answers.tell() == 0
    assert not (folder / "ran").exists()


def with_evil_code(folder: Path, config: Path, within: str | None = None, **more: str) -> None:
    """Name code in a configuration, of a model that transformers knows but that continues no text."""
    ran = f"__import__('pathlib').Path({str(folder / 'ran')!r}).touch()"
    (folder / "evil.py").write_text(f"{ran}\nfrom transformers import T5ForConditionalGeneration as Evil\n")
    whole = json.loads(config.read_text())
    part = whole if within is None else whole[within]
    part.clear()
    part.update(model_type="t5", auto_map={"AutoModelForCausalLM": "evil.Evil"}, **more)
    config.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"n_embd": "abc"}, r"Validation error for field 'n_embd': .*expected int, got str.*"),
        ({"n_head": 0}, r"ZeroDivisionError: .*by zero"),
        ({"activation_function": "frob"}, "KeyError: 'frob'"),
        ({"dtype": "frob"}, "AttributeError: .*'frob'"),
    ],
)
def test_values_that_no_model_can_have_are_one_sentence(folder: Path, changes: dict[str, object], found: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"^A model must have .*found '.*' to fail \(.*{found}\)\. Correct .*\.$"):
        load_language_model(str(folder))


def test_llamas_that_the_config_itself_refuses(folder: Path) -> None:
    config = hf.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    for changes, found in (
        ({"hidden_size": "abc"}, "field 'hidden_size': .*expected int"),
        ({"num_attention_heads": 0}, "ZeroDivisionError: "),
    ):
        (folder / "config.json").write_text(json.dumps({**config.to_dict(), **changes}))
        with pytest.raises(ValueError, match=rf"^A model must have .*found '.*' to fail \(.*{found}.*\)\. Correct "):
            load_language_model(str(folder))


@pytest.mark.parametrize("stage", ["AutoConfig", "AutoModelForCausalLM"])
def test_a_library_that_a_model_needs_is_named_with_the_hint(
    folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("\nLoading this requires frob\n(`pip install frob`).")

    monkeypatch.setattr(getattr(hf, stage), "from_pretrained", fail)
    with pytest.raises(
        ValueError,
        match=r"^A model must need no library .*\(Loading this requires frob \(`pip install frob`\)\)\. Install",
    ):
        load_language_model(str(folder))


@pytest.mark.skipif(find_spec("optimum") is not None, reason="optimum is installed")
def test_a_quantized_model_without_its_library_is_one_sentence(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"^A model must need no library .*optimum.*\. Install it"):
        load_language_model(str(folder))


def test_not_every_runtime_error_is_about_shapes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("No GPU found.\nMore.")

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"to fail \(RuntimeError: No GPU found\)\. Correct"):
        load_language_model(str(folder))


def test_a_broken_config_is_reported(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        load_language_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json; found .*model\.safetensors"):
        load_language_model(str(folder))


def test_ids_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found no folder"):
        load_language_model(str(tmp_path / "nothing"))
    for model_id in ("nobody-at-all/nothing-at-all", "no such thing"):
        with pytest.raises(ValueError, match=f"found no '{model_id}'"):
            load_language_model(model_id)


def test_a_digest_tells_apart_what_a_fingerprint_may_not() -> None:
    def model(**settings: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40, **settings))

    base, same, other_settings, other_entry = model(), model(), model(rms_norm_eps=1e-3), model()
    with torch.no_grad():
        other_entry.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 3] += 1
    assert digest(base) == digest(same)
    assert len({digest(base), digest(other_settings), digest(other_entry)}) == 3
    assert fingerprint(base) == fingerprint(same) == fingerprint(other_entry)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"layer_norm_epsilon": 1e-4}),
        ("gpt2", {"scale_attn_weights": False}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ],
)
def test_another_setting_is_another_model(tmp_path: Path, family: tiny_model.Family, settings: dict[str, Any]) -> None:
    folder = tiny_model.write_model(tmp_path / "model", family)
    before = load_language_model(str(folder)).model
    edit_config(folder, **settings)
    after = load_language_model(str(folder)).model
    assert fingerprint(before) != fingerprint(after)
    assert digest(before) != digest(after)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_model_elsewhere_and_of_another_version_is_the_same(tmp_path: Path, family: tiny_model.Family) -> None:
    folder = tiny_model.write_model(tmp_path / "model", family)
    before = load_language_model(str(folder)).model
    moved = folder.rename(tmp_path / "moved")
    edit_config(moved, transformers_version="5.0.0", _name_or_path="nobody/nothing", use_cache=False, eos_token_id=3)
    after = load_language_model(str(moved)).model
    assert fingerprint(before) == fingerprint(after)
    assert digest(before) == digest(after)


def test_a_setting_that_a_version_adds_with_its_usual_value_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11))
    before, plain = fingerprint(model), hf.GPT2Config.to_dict

    def with_one_more(config: hf.GPT2Config) -> dict[str, Any]:
        return plain(config) | {"one_more": getattr(config, "one_more", "as ever")}

    monkeypatch.setattr(hf.GPT2Config, "to_dict", with_one_more)
    assert fingerprint(model) == before
    model.config.one_more = "now otherwise"
    assert fingerprint(model) != before


def test_a_buffer_that_is_saved_counts_and_one_that_is_computed_does_not() -> None:
    def module(saved: float, computed: float) -> torch.nn.Module:
        module = torch.nn.Linear(2, 2)
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
        module.register_buffer("saved", torch.tensor([saved]))
        module.register_buffer("computed", torch.tensor([computed]), persistent=False)
        return module

    assert fingerprint(module(1, 1)) == fingerprint(module(1, 2)) != fingerprint(module(2, 1))
    assert digest(module(1, 1)) != digest(module(1, 2))
