"""Agreement with the numbers of the authors' released layers; tests/reference/SOURCE.md says what they are."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mxd.layers import (
    Activation,
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseLayer,
    Transcoder,
    TranscoderConfig,
)
from mxd.layers.initialization import normalize_rows_
from mxd.losses import distillation_loss
from tests.tensors import assert_near

FOLDER = Path(__file__).parent / "reference"
CASES = {case["kind"]: case for case in json.loads((FOLDER / "cases.json").read_text())}

ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class Case(NamedTuple):
    layer: SparseLayer
    tensors: dict[str, Tensor]
    normalised: bool
    learning_rate: float


def read(name: str) -> Case:
    settings = CASES[name]
    d, k, normalised = settings["d"], settings["K"], settings["normalise"]
    if settings["N"]:
        layer = MixtureOfDecoders(
            MixtureOfDecodersConfig(
                d_in=d,
                d_hidden=settings["H"],
                d_out=d,
                num_experts=settings["N"],
                k=k,
                activation=ACTIVATIONS[settings["activation"]],
                encoder="glu" if "glu" in name else "mlp",
                normalize_experts=normalised,
            )
        )
    elif name.startswith("skip"):
        layer = SkipTranscoder(SkipTranscoderConfig(d_in=d, d_out=d, num_latents=settings["H"], k=k))
    else:
        layer = Transcoder(
            TranscoderConfig(d_in=d, d_out=d, num_latents=settings["H"], k=k, normalize_decoder=normalised)
        )
    layer.double()
    tensors = load_file(FOLDER / f"{name}.safetensors")
    layer.load_state_dict(ours(name, tensors, "weights"))
    return Case(layer, tensors, normalised, settings["lr"])


def ours(name: str, tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return their weights, gradients or later weights by our names and in our axis order."""
    theirs = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
    activated = ("encoder.W_enc_gate", "encoder.b_enc_gate") if "glu" in name else ("encoder.W_enc", "encoder.b_enc")
    W_enc, b_enc = activated if name.startswith("mxd") else ("W_enc", "b_enc")
    names = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_glu.weight": "encoder.W_enc",
        "W_glu.bias": "encoder.b_enc",
        "gate": "W_gate",
        "gate_bias": "b_gate",
        "W_cond": "W_expert",
        "W_dec": "W_dec",
        "b_dec_out": "b_dec",
        "W_skip.weight": "W_skip",
    }
    transposed = {"W_glu.weight", "gate", "W_cond", "W_skip.weight"}
    return {names[key]: value.t() if key in transposed else value for key, value in theirs.items()}


def test_every_case_has_its_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == CASES.keys()
    assert len(CASES) == 5


@pytest.mark.parametrize("name", CASES)
def test_predictions_and_coefficients(name: str) -> None:
    layer, tensors, _, _ = read(name)
    prediction, code = layer(tensors["x"])
    assert_near(prediction, tensors["prediction"], 1e-12)
    assert_near(code.dense(layer.config.num_latents), tensors["coefficients"], 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str) -> None:
    layer, tensors, _, _ = read(name)
    loss = distillation_loss(layer(tensors["x"]).prediction, tensors["target"])
    assert_near(loss[None], tensors["loss"], 1e-7)
    loss.backward()
    expected = ours(name, tensors, "grad")
    assert expected.keys() == dict(layer.named_parameters()).keys()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert_near(parameter.grad, expected[parameter_name], 1e-7)


def project_gradients_(layer: SparseLayer) -> None:
    for table in layer.unit_length_tables():
        assert table.grad is not None
        table.grad -= (table.grad * table.detach()).sum(1, keepdim=True) * table.detach()


@pytest.mark.parametrize("name", CASES)
def test_three_steps(name: str) -> None:
    layer, tensors, normalised, learning_rate = read(name)
    assert len(layer.unit_length_tables()) == normalised
    optimizer = torch.optim.AdamW(layer.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(3):
        for table in layer.unit_length_tables():
            normalize_rows_(table)
        optimizer.zero_grad()
        distillation_loss(layer(tensors["x"]).prediction, tensors["target"]).backward()
        project_gradients_(layer)
        optimizer.step()
    for parameter_name, expected in ours(name, tensors, "after3").items():
        assert_near(layer.get_parameter(parameter_name), expected, 1e-5)
