from pathlib import Path
from typing import Any

import pytest
import torch

import mxd
from mxd.checkpoint import Provenance
from mxd.hub import CARD_FILE, model_card


def layer() -> mxd.Transcoder:
    config = mxd.TranscoderConfig(d_in=4, d_out=6, num_latents=10, k=2)
    return mxd.Transcoder(config, torch.Generator().manual_seed(0))


def test_a_local_folder_in_the_hubs_layout_loads_like_a_repository(tmp_path: Path) -> None:
    mxd.save(layer(), tmp_path / "layers/1/transcoder-k2")
    loaded = mxd.from_pretrained(str(tmp_path), subfolder="layers/1/transcoder-k2")
    assert torch.equal(loaded.get_parameter("W_enc"), layer().W_enc)
    assert torch.equal(mxd.from_pretrained(str(tmp_path)).get_parameter("W_enc"), layer().W_enc)


def test_what_the_hub_hands_out_is_loaded_from_the_layers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mxd.save(layer(), tmp_path / "layers/1/a")
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = mxd.from_pretrained("someone/layers", subfolder="layers/1/a", revision="v1")
    assert torch.equal(loaded.get_parameter("W_dec"), layer().W_dec)
    assert (asked["repository"], asked["revision"]) == ("someone/layers", "v1")
    assert "layers/1/a/model.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_repository_that_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"'someone/missing' is no folder here and could not be fetched"):
        mxd.from_pretrained("someone/missing")


def test_the_card_names_model_layers_and_how_to_load_them(tmp_path: Path) -> None:
    provenance = Provenance(model="openai-community/gpt2", layer=8, text="openwebtext", tokens_trained=1000)
    mxd.save(layer(), tmp_path / "layers/8/transcoder-k2", provenance)
    card = model_card(tmp_path)
    assert card.startswith("---\n")
    assert "base_model: openai-community/gpt2" in card.replace("base_model:\n- ", "base_model: ")
    assert "| `layers/8/transcoder-k2` | transcoder | 8 | 10 | 2 | openwebtext | 1000 |" in card
    assert 'subfolder="layers/8/transcoder-k2"' in card


def test_pushing_uploads_layers_and_card_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repository: str, **options: Any) -> None:
            calls.append((repository, options))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options))
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    mxd.save(layer(), tmp_path)
    assert mxd.push_to_hub(tmp_path, "someone/layers", private=True, token="secret") == "commit"
    assert calls[0] == ("someone/layers", {"private": True, "exist_ok": True})
    assert calls[1][1]["repo_id"] == "someone/layers"
    assert "snapshots" not in " ".join(calls[1][1]["allow_patterns"])
    assert (tmp_path / CARD_FILE).is_file()


def test_a_folder_without_a_layer_cannot_be_pushed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold a layer or a finished run"):
        mxd.push_to_hub(tmp_path, "someone/layers")
