import math
from pathlib import Path
from typing import Any

import pytest
import torch

import mxd
from mxd.checkpoint import Provenance, save_edits
from mxd.edits import Ablate, Edit
from mxd.evaluation.evaluate import evaluate_run
from mxd.evaluation.record import EVALUATION_FILE, read_record, write_record
from mxd.hub import CARD_FILE, model_card
from tests.tiny_run import change_json, copied, tiny_run


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


def test_the_card_tells_nobody_where_a_model_lay(tmp_path: Path) -> None:
    mxd.save(layer(), tmp_path / "layers/8/transcoder-k2", Provenance(model="/home/someone/models/llama", layer=8))
    card = model_card(tmp_path)
    assert "base_model" not in card
    assert "/home" not in card
    assert "# Sparse replacements for MLPs of llama" in card


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


def test_a_layer_is_pushed_as_it_would_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def __init__(self, token: str | None) -> None: ...

        def create_repo(self, repository: str, **options: Any) -> None:
            assert repository == "someone/layer"

        def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
            copied(folder_path, tmp_path / "pushed")
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    one = layer()
    one.provenance = Provenance(model="openai-community/gpt2", revision="607a", layer=8)
    assert mxd.push_to_hub(one, "someone/layer") == "commit"
    pushed = mxd.from_pretrained(str(tmp_path / "pushed"))
    assert torch.equal(pushed.get_parameter("W_enc"), one.W_enc)
    assert pushed.provenance == one.provenance
    assert "base_model" in (tmp_path / "pushed" / CARD_FILE).read_text()


def test_a_folder_without_a_layer_cannot_be_pushed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold a layer or a finished run"):
        mxd.push_to_hub(tmp_path, "someone/layers")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = copied(tiny_run(tmp_path_factory.getbasetemp()).run, tmp_path_factory.mktemp("hub") / "run")
    evaluation = evaluate_run(run, students=["mxd-k4", "topk-sae-k4"], ks=[2], together=True)
    write_record(run / EVALUATION_FILE, evaluation.record)
    return run


def number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def test_the_card_of_a_run_that_was_evaluated_together_has_a_row_for_each_measurement(evaluated: Path) -> None:
    table = [line for line in model_card(evaluated).splitlines() if line.startswith(("| Layer", "| All"))]
    places = [("Layer 0", (4, 2)), ("Layer 1", (4, 2)), ("All layers", (4,))]
    names = {"mxd-k4": 4, "mxd-k4-at2": 2, "topk-sae-k4": 4, "topk-sae-k4-at2": 2}
    expected = [[f"| {place}, `{name}`", str(k)] for place, ks in places for name, k in names.items() if k in ks]
    assert sorted(line.split(" | ")[:2] for line in table) == sorted(expected)
    assert "None" not in "".join(table)
    assert all(line.count("|") == 11 for line in table)
    row = read_record(evaluated / EVALUATION_FILE).rows[0]
    assert f"| {row.ce_increase:.4g} | {number(row.loss_recovered)} | {row.kl:.4g} |" in table[0]


def test_numbers_of_another_version_or_of_other_edits_are_not_put_on_a_card(evaluated: Path, tmp_path: Path) -> None:
    run = copied(evaluated, tmp_path / "run")
    change_json(run / EVALUATION_FILE, lambda stored: stored["rows"][0].pop("nmse"))  # pyright: ignore
    with pytest.raises(ValueError, match=r"A row must have the keys of `mxd evaluate --json`; nmse missing"):
        model_card(run)
    (run / EVALUATION_FILE).write_bytes((evaluated / EVALUATION_FILE).read_bytes())
    save_edits(run / "layers/0/mxd-k4", [Edit(latents=(0,), operation=Ablate())])
    with pytest.raises(ValueError, match="must be of the edits that are in force"):
        model_card(run)


def test_the_card_says_what_a_layer_is_given(tmp_path: Path) -> None:
    sae = mxd.TopKAutoencoder(mxd.TopKAutoencoderConfig(d_in=6, num_latents=10, k=2))
    mxd.save(layer(), tmp_path / "one/layers/1/transcoder-k2")
    mxd.save(sae, tmp_path / "other/layers/1/topk-sae-k2")
    for run in ("one", "other"):
        mxd.save(layer() if run == "one" else sae, tmp_path / "both/layers/1" / run)
    assert "It is given the MLP's input and stands in the MLP's place." in model_card(tmp_path / "one")
    of_sae = model_card(tmp_path / "other")
    assert "It is given the MLP's own output, and so stands behind the MLP, which stays." in of_sae
    assert "MLP's input" not in of_sae
    assert "but `layers/1/other` is given the MLP's own output" in model_card(tmp_path / "both")
    assert "None" not in of_sae
