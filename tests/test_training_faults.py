from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxd.data.activations import ActivationBatch
from tests.train_command import Trainer, kept


def tensors_of(run: Path) -> list[torch.Tensor]:
    return [t for path in (run / "snapshots").glob("*/tensors.safetensors") for t in load_file(path).values()]


def poison(batch: ActivationBatch, what: str, value: float) -> ActivationBatch:
    rows = batch.layers[1]
    changed = (rows.x if what == "x" else rows.target).clone()
    changed[3, 2] = value
    return batch._replace(layers={**batch.layers, 1: rows._replace(**{what: changed})})


@pytest.mark.parametrize(("what", "value"), [("x", float("nan")), ("target", float("inf"))])
@pytest.mark.parametrize("snapshot_every", ["0", "600"])
def test_an_activation_that_is_not_finite_is_named_with_its_step(
    trainer: Trainer, tmp_path: Path, what: str, value: float, snapshot_every: str
) -> None:
    trainer.before_batch = lambda step, batch: poison(batch, what, value) if step == 10 else None
    ended = trainer(tmp_path / "run", "--snapshot-every", snapshot_every)
    assert ended.status == 3
    line = trainer.last_line(ended)
    assert "1/mxd-k4 must have finite numbers; an activation of layer 1 was NaN or infinite at step 11." in line
    if snapshot_every == "0":
        assert "The snapshot of step 10 in" in line
        assert "snapshots is from before it: run the model in a wider type" in line
        assert kept(tmp_path / "run") == [9, 10]
        assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path / "run"))
    else:
        assert "No snapshot was due before it: " in line
        assert kept(tmp_path / "run") == []


def test_a_learning_rate_that_is_too_high_ends_in_a_fault_and_keeps_no_weight_that_is_not_finite(
    trainer: Trainer, tmp_path: Path
) -> None:
    for name, more in {"loss": ["1e30"], "gradient": ["1e38"]}.items():
        ended = trainer(tmp_path / name, "--lr", *more)
        assert ended.status == 3
        assert "lower its learning rate" in trainer.last_line(ended)
        assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path / name))
        assert not list((tmp_path / name).glob("layers"))


def test_a_model_with_an_infinite_weight_ends_in_a_fault_at_the_first_step(
    trainer: Trainer, llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"][0, 0] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ended = trainer(tmp_path / "run", "--model", str(folder))
    assert ended.status == 3
    assert "an activation of layer 1 was NaN or infinite at step 1. No snapshot was due" in trainer.last_line(ended)
