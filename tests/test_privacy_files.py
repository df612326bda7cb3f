"""Models and examples in files, in every form that `mxd privacy` reads, and transformers models end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from mxd.models.loading import load_tokenizer
from mxd.privacy.data_files import read_sets
from mxd.privacy.examples import IGNORED, Examples, predict, predict_all, require_usable
from mxd.privacy.inducing import induce_uncertainty
from mxd.privacy.measures import measure_set
from mxd.privacy.objective import ObjectiveConfig
from mxd.privacy.saved_models import load_model
from mxd.privacy.text_examples import TextReader, continuation_examples, sequence_examples, word_examples
from mxd.privacy.tuning import InduceConfig
from mxd.privacy.workflow import PrivacyFiles, read_request
from tests.privacy_examples import save_table

TUNE = InduceConfig(
    objective=ObjectiveConfig(theta=0.5, weight_decay=0.0),
    steps=20,
    optimizer="adam",
    lr=5e-3,
    check_every=5,
    min_accuracy=0.0,
    validation_fraction=0.3,
)


def save_npz(path: Path, **arrays: Any) -> Path:
    numpy.savez(path, **arrays)
    return path


def test_images_in_class_folders_become_pixels_and_classes_are_numbered_alike(tmp_path: Path) -> None:
    grey = numpy.arange(16, dtype=numpy.uint8).reshape(4, 4) * 16
    for name, shown in (("one/cat", 1), ("one/dog", 2), ("two/dog", 3), ("two/bee", 4)):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(grey + shown).save(tmp_path / name / "a.png")
    (tmp_path / "one" / "cat" / "notes.txt").write_text("no image")
    found = read_sets({"protected": tmp_path / "one", "retained": tmp_path / "two"})
    assert found.class_names == ("bee", "cat", "dog")
    assert found.sets["protected"].labels.tolist() == [1, 2]
    assert found.sets["retained"].labels.tolist() == [0, 2]
    inputs = found.sets["protected"].inputs
    assert isinstance(inputs, Tensor)
    torch.testing.assert_close(inputs[0, 0], torch.from_numpy(grey + 1).float() / 255)
    named = read_sets({"protected": tmp_path / "one"}, class_names=("dog", "cat"))
    assert named.sets["protected"].labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"among the model's classes \(dog\); got cat"):
        read_sets({"protected": tmp_path / "one"}, class_names=("dog",))
    Image.fromarray(numpy.zeros((4, 5, 3), dtype=numpy.uint8)).save(tmp_path / "one" / "dog" / "b.png")
    with pytest.raises(ValueError, match=r"has \(1, 4, 4\) and .*b\.png has \(3, 4, 5\)"):
        read_sets({"protected": tmp_path / "one"})
    (tmp_path / "one" / "dog" / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png must be an image"):
        read_sets({"protected": tmp_path / "one"})
    with pytest.raises(ValueError, match="must hold a folder of images for each class"):
        read_sets({"protected": tmp_path / "one" / "cat"})


def test_numbered_class_folders_keep_their_numbers(tmp_path: Path) -> None:
    for name in ("3", "7"):
        (tmp_path / name).mkdir()
        Image.fromarray(numpy.zeros((4, 4), dtype=numpy.uint8)).save(tmp_path / name / "a.png")
    assert read_sets({"protected": tmp_path}).sets["protected"].labels.tolist() == [3, 7]


def test_npz_bytes_are_pixels_and_other_numbers_are_themselves(tmp_path: Path) -> None:
    images = numpy.arange(2 * 4 * 4 * 3, dtype=numpy.uint8).reshape(2, 4, 4, 3)
    colour = read_sets({"x": save_npz(tmp_path / "a.npz", images=images, labels=[0, 1])}).sets["x"].inputs
    assert isinstance(colour, Tensor)
    assert colour.shape == (2, 3, 4, 4)
    assert colour[1, 2, 0, 3] == images[1, 0, 3, 2] / 255
    numbers = read_sets({"x": save_npz(tmp_path / "b.npz", x=numpy.ones((2, 3)) * 7, y=[1, 0])}).sets["x"].inputs
    assert isinstance(numbers, Tensor)
    assert torch.equal(numbers, torch.full((2, 3), 7.0))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": numpy.ones((2, 3)), "y": [1]}, "must hold one label an example"),
        ({"x": numpy.ones((0, 3)), "y": []}, "it is empty"),
        ({"pictures": numpy.ones((2, 3)), "y": [1, 2]}, "named images or inputs or x or X; got pictures, y"),
        ({"x": numpy.array([object(), object()]), "y": [1, 2]}, "npz file of plain arrays"),
        ({"x": numpy.ones(2), "y": [1, 2]}, r"a row of numbers for each example; got inputs of shape \(2,\)"),
        ({"x": numpy.ones((2, 3, 3), dtype=numpy.int32), "y": [1, 2]}, r"must be bytes \(uint8\); got int32"),
        ({"x": numpy.ones((2, 3)), "y": [0.5, 1.0]}, r"whole numbers or names; got 0\.5, 1\.0"),
    ],
)
def test_wrong_arrays_are_refused_and_nothing_is_unpickled(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        read_sets({"x": save_npz(tmp_path / "a.npz", **arrays)})


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_of_numbers(ending: str, tmp_path: Path) -> None:
    first = save_table(tmp_path / f"a.{ending}", {"age": [30, 40], "label": ["no", "yes"], "pay": [1.5, 2.5]})
    second = save_table(tmp_path / f"b.{ending}", {"age": [50], "label": ["no"], "pay": [3.5]})
    found = read_sets({"protected": first, "retained": second})
    assert found.class_names == ("no", "yes")
    inputs = found.sets["protected"].inputs
    assert isinstance(inputs, Tensor)
    assert inputs.tolist() == [[30.0, 1.5], [40.0, 2.5]]
    other = save_table(tmp_path / f"c.{ending}", {"age": [50], "label": ["no"]})
    with pytest.raises(ValueError, match="must have the same columns of numbers"):
        read_sets({"protected": first, "retained": other})
    wrong = save_table(tmp_path / f"d.{ending}", {"age": ["old"], "label": [1]})
    with pytest.raises(ValueError, match="but 'label' must hold numbers"):
        read_sets({"protected": wrong})
    unlabelled = save_table(tmp_path / f"e.{ending}", {"age": [1]})
    with pytest.raises(ValueError, match="must have a column 'label'; got age"):
        read_sets({"protected": unlabelled})


def test_files_under_a_wrong_name_or_with_strange_labels_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        numpy.save(file, numpy.ones(3))
    with pytest.raises(ValueError, match=r"must be an \.npz file of plain arrays"):
        read_sets({"x": tmp_path / "a.npz"})
    (tmp_path / "a.csv").write_text("age,label\n3,2020-01-01\n")
    with pytest.raises(ValueError, match="whole numbers or names; got 2020-01-01"):
        read_sets({"x": tmp_path / "a.csv"})


def test_missing_and_unknown_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_sets({"protected": tmp_path / "nothing.npz"})
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"\.npz, \.csv or \.parquet"):
        read_sets({"protected": tmp_path / "a.txt"})
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"must be a \.parquet file"):
        read_sets({"protected": tmp_path / "a.parquet"})


TEXTS = ["def one(x):", "class Two:", "import three", "return four", "x = 5", "for six in y:", "pass", "while True:"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("bundled")


def tiny(kind: str, vocab: int) -> Any:
    """A transformers model with new weights."""
    import transformers

    torch.manual_seed(0)
    if kind == "causal":
        config = transformers.GPT2Config(
            vocab_size=vocab,
            n_positions=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            initializer_range=0.5,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config: Any = cast(Any, transformers.BertConfig)(vocab_size=vocab, num_labels=3, initializer_range=0.5, **sizes)
    if kind == "sequence":
        return transformers.BertForSequenceClassification(config)
    return transformers.BertForTokenClassification(config)


@pytest.mark.parametrize("kind", ["sequence", "token", "causal"])
def test_transformers_models_of_each_kind_become_uncertain_from_files(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    tiny(kind, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    columns: dict[str, list[Any]] = {
        "sequence": {"text": TEXTS, "label": [0, 1, 2, 0, 1, 2, 0, 1]},
        "token": {"tokens": [text.split() for text in TEXTS], "tags": [[1] * len(text.split()) for text in TEXTS]},
        "causal": {"prompt": ["# ", None] * 4, "text": TEXTS},
    }[kind]
    protected = save_table(tmp_path / "a.parquet", {name: values[:2] for name, values in columns.items()})
    retained = save_table(tmp_path / "b.parquet", {name: values[2:] for name, values in columns.items()})
    request = read_request(PrivacyFiles(model=str(tmp_path / "model"), protected=protected, retained=retained))
    tune = replace(TUNE, objective=ObjectiveConfig(theta=0.9, weight_decay=0.0))
    found = induce_uncertainty(request.saved.model, request.protected, request.retained, tune)
    before, after = (measure_set(model, request.protected) for model in (request.saved.model, found.model))
    assert after.confidence_distance < 0.7 * before.confidence_distance
    request.saved.write(tmp_path / "tuned", found.model)
    again = load_model(str(tmp_path / "tuned"))
    told = [predict_all(model, request.protected).logits for model in (found.model, again.model)]
    torch.testing.assert_close(told[0], told[1])
    assert request.data.shown["protected"][0].endswith(TEXTS[0] if kind != "token" else "one(x):")


def test_a_continuation_counts_and_its_prompt_does_not(tokenizer: Any) -> None:
    reader = TextReader(tokenizer, "causal", 32)
    examples = continuation_examples(["def one", ""], ["(x):", "pass"], reader)
    prompt, text = (tokenizer("def one")["input_ids"], tokenizer("(x):", add_special_tokens=False)["input_ids"])
    assert isinstance(examples.inputs, dict)
    row = examples.inputs["input_ids"][0].tolist()
    assert row[: len(prompt) + len(text)] == prompt + text
    counted = [label for label in examples.labels[0].tolist() if label != IGNORED]
    assert counted == text
    model = tiny("causal", len(tokenizer)).eval()
    found = predict(model, examples)
    assert len(found.labels) == examples.num_counted
    whole = model(input_ids=torch.tensor([prompt + text])).logits[0]
    torch.testing.assert_close(found.logits[: len(text)], whole[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-5)
    assert found.labels[: len(text)].tolist() == text


def test_the_first_token_of_a_word_carries_its_tag(tokenizer: Any) -> None:
    reader = TextReader(tokenizer, "token", 32)
    examples = word_examples([["import", "three"], ["x"]], [[2, 1], [0]], reader)
    for row, tags in enumerate(([2, 1], [0])):
        assert [label for label in examples.labels[row].tolist() if label != IGNORED] == tags
    with pytest.raises(ValueError, match="row 0 has 1 words and 2 tags"):
        word_examples([["import"]], [[2, 1]], reader)


def test_padding_does_not_change_what_a_decoder_says_of_a_sequence(tokenizer: Any, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=1, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = load_model(str(tmp_path))
    assert saved.reader is not None
    assert saved.reader.pad == 1
    alone = sequence_examples(["x = 5"], [0], saved.reader)
    beside = sequence_examples(["x = 5", "for six in y: pass and more"], [0, 1], saved.reader)
    assert isinstance(beside.inputs, dict)
    assert isinstance(alone.inputs, dict)
    assert beside.inputs["input_ids"].shape[1] > alone.inputs["input_ids"].shape[1]
    told = [predict_all(saved.model, examples).logits[0] for examples in (alone, beside)]
    torch.testing.assert_close(told[0], told[1])


def test_protected_text_is_never_cut_and_always_counts(tokenizer: Any, tmp_path: Path) -> None:
    reader = TextReader(tokenizer, "causal", 3)
    long = save_table(tmp_path / "a.parquet", {"text": ["for six in y: pass"]})
    assert read_sets({"retained": long}, reader=reader).sets["retained"].labels.shape == (1, 3)
    with pytest.raises(ValueError, match="1 of 1 rows are longer than 3 tokens"):
        read_sets({"protected": long}, reader=reader)
    for other in ("sequence", "token"):
        table = {"text": ["for six in y: pass"], "label": [1], "tokens": [["for", "six", "in", "y"]], "tags": [[1] * 4]}
        path = save_table(tmp_path / f"{other}.parquet", table)
        with pytest.raises(ValueError, match="what is cut off would not be protected"):
            read_sets({"protected": path}, reader=reader._replace(task=cast(Any, other)))
    mute = Examples(
        inputs={"input_ids": torch.ones(2, 1).long()}, labels=torch.ones(2, 1).long(), labels_of="next-token"
    )
    both = Examples(
        inputs={"input_ids": torch.ones(2, 3).long()},
        labels=torch.tensor([[IGNORED, 2, 3], [1, IGNORED, IGNORED]]),
        labels_of="next-token",
    )
    assert (mute.num_uncounted_rows, both.num_uncounted_rows) == (2, 1)
    with pytest.raises(ValueError, match="1 of 2 have none"):
        require_usable("protected", both)


def test_padding_makes_no_row_another(tokenizer: Any) -> None:
    reader = TextReader(tokenizer, "causal", 32)
    alone = continuation_examples([""], ["x = 5"], reader)
    beside = continuation_examples(["", ""], ["x = 5", "for six in y: pass"], reader)
    assert alone.digests()[0] == beside.digests()[0] != beside.digests()[1]


def test_images_for_a_transformers_model_are_normalised_inside(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config: Any = cast(Any, transformers.ViTConfig)(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]})
    )
    saved = load_model(str(tmp_path / "model"))
    assert saved.class_names == ("cat", "dog")
    x = torch.rand(2, 3, 8, 8)
    expected = model((x - 0.5) / 0.25).logits
    torch.testing.assert_close(saved.model(x).logits, expected)
    examples = Examples(inputs=torch.rand(12, 3, 8, 8), labels=torch.arange(12) % 2)
    few = replace(TUNE, steps=2)
    found = induce_uncertainty(saved.model, examples.take(slice(0, 2)), examples.take(slice(2, 12)), few)
    saved.write(tmp_path / "tuned", found.model)
    assert (tmp_path / "tuned" / "preprocessor_config.json").is_file()
    assert load_model(str(tmp_path / "tuned")).model(x).logits.shape == (2, 2)


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="is BertModel"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(ValueError, match="must hold a model that transformers can load from safetensors"):
        load_model(str(tmp_path))
