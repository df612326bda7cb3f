"""Layers in sparsify's files, read back; what sparsify itself wrote is in test_export_peers."""

from pathlib import Path

import pytest
import torch

from mxd.interop import export_layers, load_sparsify
from tests.exported_layers import FITTING, a_layer, inputs, outline
from tests.tiny_run import change_json, copied

GPT2 = outline()


@pytest.mark.parametrize("kind", FITTING["sparsify"])
def test_what_was_written_for_sparsify_comes_back(kind: str, tmp_path: Path) -> None:
    layer, x = a_layer(kind, block=2), inputs()
    export_layers([layer], tmp_path / "out", "sparsify", model=GPT2)
    back = load_sparsify(tmp_path / "out/h.2.mlp")
    assert type(back) is type(layer)
    assert (back.provenance.layer, back.training) == (2, False)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    assert torch.equal(back(x).prediction, layer(x).prediction)
    assert load_sparsify(tmp_path / "out/h.2.mlp", block=7).provenance.layer == 7


def test_coders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    export_layers([a_layer("skip-transcoder")], tmp_path / "good", "sparsify", model=GPT2)
    for name in ("layers.0", "layers.0.attn"):
        folder = copied(tmp_path / "good/h.0.mlp", tmp_path / name)
        with pytest.raises(ValueError, match=f"in a folder such as h.8.mlp; this one is in '{name}'"):
            load_sparsify(folder)
        assert load_sparsify(folder, block=0).provenance.layer == 0
    changes: list[tuple[dict[str, object], str]] = [
        ({"activation": "groupmax"}, "must have activation topk"),
        ({"transcode": False}, "must be a transcoder where it has a skip map"),
        ({"skip_connection": False}, "as cfg.json says; it holds W_dec, W_skip"),
        ({"k": "many"}, "must say k"),
        ({"k": 99}, r"k must lie in \[1, 24\]"),
    ]
    for number, (change, words) in enumerate(changes):
        folder = copied(tmp_path / "good/h.0.mlp", tmp_path / f"changed.{number}.mlp")
        change_json(folder / "cfg.json", lambda found, change=change: found.update(change))
        with pytest.raises(ValueError, match=words):
            load_sparsify(folder)
    with pytest.raises(FileNotFoundError, match=r"has no cfg\.json"):
        load_sparsify(tmp_path)
    damaged = copied(tmp_path / "good/h.0.mlp", tmp_path / "1.mlp")
    (damaged / "sae.safetensors").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="must be safetensors"):
        load_sparsify(damaged)
    (damaged / "cfg.json").write_text("[")
    with pytest.raises(ValueError, match="must be JSON"):
        load_sparsify(damaged)
