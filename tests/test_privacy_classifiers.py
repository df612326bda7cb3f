"""Classifiers on disk: they come back as they were, and broken ones are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxd.privacy.classifiers import (
    ClassifierConfig,
    LogisticRegressionConfig,
    MlpConfig,
    SlimResNetConfig,
    is_classifier,
    load_classifier,
    save_classifier,
)
from mxd.privacy.workflow import PrivacyFiles, read_request
from tests.privacy_examples import save_table

CONFIGS: list[ClassifierConfig] = [
    LogisticRegressionConfig(d_in=16, num_classes=3),
    MlpConfig(d_in=16, num_classes=3, hidden=(8, 5)),
    SlimResNetConfig(num_classes=3, widths=(4, 6), blocks=2),
    SlimResNetConfig(num_classes=3, channels=3, widths=(4,), mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_a_classifier_comes_back_as_it_was_saved(config: ClassifierConfig, tmp_path: Path) -> None:
    channels = config.channels if isinstance(config, SlimResNetConfig) else 1
    model, x = config.build().eval(), torch.rand(2, channels, 4, 4)
    save_classifier(tmp_path / "model", config, model)
    loaded = load_classifier(tmp_path / "model")
    assert loaded.config == config
    assert is_classifier(tmp_path / "model")
    assert torch.equal(loaded.model(x), model(x))
    assert loaded.model(x).shape == (2, 3)


def test_names_of_classes_are_kept_and_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LogisticRegressionConfig(d_in=1, num_classes=3)
    save_classifier(tmp_path / "named", config, config.build(), ("one", "two", "three"))
    save_classifier(tmp_path / "plain", config, config.build())
    first = save_table(tmp_path / "a.csv", {"x": [1.0], "label": ["two"]})
    second = save_table(tmp_path / "b.csv", {"x": [2.0, 3.0], "label": ["one", "two"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    request = read_request(PrivacyFiles(model=str(tmp_path / "named"), protected=first, retained=second))
    assert request.device == "cpu"
    assert request.protected.labels.tolist() == [1]
    request.saved.write(tmp_path / "again", request.saved.model)
    assert load_classifier(tmp_path / "again").class_names == ("one", "two", "three")
    with pytest.raises(ValueError, match="must know the order of its 3 classes where labels are names"):
        read_request(PrivacyFiles(model=str(tmp_path / "plain"), protected=first, retained=second))
    with pytest.raises(ValueError, match="retained and test sets must have no row in common; 2 test rows are also"):
        read_request(PrivacyFiles(model=str(tmp_path / "named"), protected=first, retained=second, test=second))


def test_a_classifier_that_cannot_be_written_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_classifier(tmp_path, CONFIGS[0], CONFIGS[0].build())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write, written = Path.write_bytes, [0]

    def full(path: Path, content: bytes) -> int:
        written[0] += 1
        if written[0] == 2:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        save_classifier(tmp_path, CONFIGS[1], CONFIGS[1].build())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_classifier_that_was_written_before_settings_were_renamed_is_read(tmp_path: Path) -> None:
    save_classifier(tmp_path, CONFIGS[2], CONFIGS[2].build())
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["settings"]["classes"] = content["settings"].pop("num_classes")
    path.write_text(json.dumps(content))
    assert load_classifier(tmp_path).config == CONFIGS[2]


def test_the_slim_network_has_about_a_fifth_of_a_million_weights_in_standard_blocks() -> None:
    model = SlimResNetConfig().build()
    assert sum(parameter.numel() for parameter in model.parameters()) == 209_850
    assert model(torch.rand(1, 1, 28, 28)).shape == (1, 10)


def test_broken_classifiers_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        load_classifier(folder)
    save_classifier(folder, CONFIGS[0], CONFIGS[0].build())
    with pytest.raises(
        ValueError, match=r"1 differ in name or shape \(1.weight is \(3, 16\) and should be \(3, 15\)\)"
    ):
        save_classifier(tmp_path / "other", LogisticRegressionConfig(d_in=15, num_classes=3), CONFIGS[0].build())
    assert not (tmp_path / "other").exists()
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "1.bias": torch.tensor([0.0, float("nan"), 0.0])}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"must hold finite weights; 1\.bias has not"):
        load_classifier(folder)
    (folder / "model.safetensors").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_classifier(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"architecture": "resnet-9000"}))
    with pytest.raises(ValueError, match="one of logistic-regression, mlp, slim-resnet"):
        load_classifier(folder)
    with pytest.raises(ValueError, match="a number for each of the 3 channels"):
        SlimResNetConfig(channels=3)
