"""Agreement of multilinear mixtures with the released layers; tests/reference/SOURCE.md says what the numbers are."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from mxd.multilinear import (
    CPMixture,
    CPMixtureConfig,
    MultilinearMLP,
    MultilinearMLPConfig,
    Normalization,
    TRMixture,
    TRMixtureConfig,
)
from tests.tensors import assert_near

FOLDER = Path(__file__).parent / "reference" / "mumoe"
CASES = {case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text())}


def theirs(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return our layer with a reference case's weights, and the case's tensors."""
    case, tensors = CASES[name], load_file(FOLDER / f"{name}.safetensors")
    d_in, levels = tensors["x"].shape[-1], case["levels"]
    normalization: Normalization = "batch" if case["gate_normalisation"] == "bn" else "layer"
    num_experts, is_cp = tuple(case["experts"]), case["layer"].startswith("CP")
    if case["second_dim"]:
        d_hidden = tensors["weights.MuMoE.factors.2"].shape[0]
        config = MultilinearMLPConfig(
            kind="cp",
            d_in=d_in,
            d_hidden=d_hidden,
            d_out=case["second_dim"],
            num_experts=num_experts,
            ranks=(case["ranks"],),
            normalize_input=case["input_layernorm"],
        )
        module: nn.Module = MultilinearMLP(config)
    elif is_cp:
        d_out = tensors[f"weights.MuMoE.factors.{levels + 1}"].shape[0]
        module = CPMixture(
            CPMixtureConfig(
                d_in=d_in, d_out=d_out, num_experts=num_experts, rank=case["ranks"], normalization=normalization
            )
        )
    else:
        ranks = (*(left for left, _, _ in case["ranks"]), case["ranks"][-1][2])
        module = TRMixture(
            TRMixtureConfig(
                d_in=d_in,
                d_out=case["ranks"][-1][1],
                num_experts=num_experts,
                ranks=ranks,
                normalization=normalization,
            )
        )
    module.double().load_state_dict(module.state_dict() | ours(name, tensors, "weights"))
    return module.eval(), tensors


def ours(name: str, tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return their weights or gradients by our names and in our axis order."""
    levels, is_cp = CASES[name]["levels"], CASES[name]["layer"].startswith("CP")
    block = CASES[name]["second_dim"] > 0
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not key.startswith(f"{part}."):
            continue
        module, *rest = key.removeprefix(f"{part}.").split(".")
        if module == "projs":
            found[f"gate.W_gate.{rest[0]}"] = value
        elif module == "input_ln":
            found[f"input_norm.{rest[0]}"] = value
        else:
            prefix = {"MuMoE": "first", "MuMoE2": "second"}[module] if block else "experts"
            mode = int(rest[1])
            if mode < levels:
                found[f"{prefix}.W_expert.{mode}"] = value if is_cp else value.transpose(0, 1)
            elif mode == levels:
                rows = value if is_cp else value.transpose(0, 1)
                found[f"{prefix}.W_in"], found[f"{prefix}.b_in"] = rows[:-1], rows[-1]
            else:
                found[f"{prefix}.W_out"] = value.t() if is_cp else value.permute(2, 0, 1)
    return found


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_coefficients_are_those_of_the_released_layers(name: str) -> None:
    module, tensors = theirs(name)
    gate = module.get_submodule("gate")
    for level, coefficients in enumerate(gate(tensors["x"])):
        assert (coefficients == 0).any()
        assert_near(coefficients, tensors[f"coefficients.{level}"])
    assert_near(module(tensors["x"]), tensors["output"])


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_released_layers(name: str) -> None:
    module, tensors = theirs(name)
    module(tensors["x"]).square().sum().backward()
    expected = ours(name, tensors, "grad")
    assert expected.keys() == dict(module.named_parameters()).keys()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert_near(parameter.grad, expected[parameter_name], 1e-7)


def test_every_reference_case_has_its_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == CASES.keys()
    assert len(CASES) == 5
