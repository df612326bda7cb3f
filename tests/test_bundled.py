import json
from pathlib import Path

import mxd
from mxd.bundled import bundled_model_folder, held_out_modules
from mxd.data.holdout import is_held_out
from mxd.data.stdlib import stdlib_modules
from mxd.data.text import open_text
from mxd.models import num_layers


def test_the_model_is_the_one_that_its_card_describes() -> None:
    model = mxd.load_language_model("bundled").model
    assert model.config.model_type == "gpt2"
    assert num_layers(model) == 6
    assert mxd.find_mlp(model, 3).activation == "gelu"
    assert model.get_input_embeddings().weight.shape == (4096, 256)


def test_it_is_small_and_comes_with_its_licences_and_card() -> None:
    folder = bundled_model_folder()
    assert (folder / "model.safetensors").stat().st_size <= 14e6
    assert {"LICENSE.PSF", "NOTICE", "README.md", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")] == []


def test_its_tokenizer_gives_every_text_back() -> None:
    tokenizer = mxd.load_language_model("bundled").tokenizer
    text = "def f(x):\n\treturn 'é❄'  # \x00 ok\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0


def test_modules_that_the_model_never_saw_are_held_out_of_every_training() -> None:
    listed = held_out_modules()
    assert listed
    assert all(is_held_out(path) for path in listed)
    source = open_text(["stdlib"], held_out_modules=listed)
    trained = {document.identity for document in source.documents(held_out=False)}
    kept = {document.identity for document in source.documents(held_out=True)}
    here = {module.path for module in stdlib_modules()}
    assert trained.isdisjoint(listed)
    assert listed & here <= kept
    assert trained | kept <= here


def test_no_path_of_the_machine_that_made_it_is_in_its_files() -> None:
    for path in bundled_model_folder().glob("*.json"):
        value = json.dumps(json.loads(path.read_text(encoding="utf-8")))
        assert str(Path.home()) not in value
