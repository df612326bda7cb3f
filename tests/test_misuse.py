"""What a person gets wrong in Python is one sentence.

The calls are made in a process of their own: in this one, pytest's import hook checks types before mxd does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import nn

import mxd
from mxd.interop import export_layers
from tests.test_models import IDS, model_of


class Batch(dict[str, torch.Tensor]):
    """As a tokenizer returns it."""

    input_ids = IDS


class Pair(NamedTuple):
    """As `mxd.load_language_model` returns it."""

    model: nn.Module


LAYER = mxd.Transcoder(mxd.TranscoderConfig(d_in=32, d_out=32, num_latents=16, k=4))
WIDE = mxd.Transcoder(mxd.TranscoderConfig(d_in=256, d_out=256, num_latents=16, k=4))
SAE = mxd.TopKAutoencoder(mxd.TopKAutoencoderConfig(d_in=32, num_latents=16, k=4))
MXD = mxd.MixtureOfDecoders(mxd.MixtureOfDecodersConfig(d_in=32, d_hidden=8, d_out=32, num_experts=9, k=4))


def enter(context: AbstractContextManager[object]) -> None:
    with context:
        pass


def export(layers: Any, model: Any) -> None:
    export_layers(layers, "out", "sparsify", model=model)


def under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        LAYER.encode(torch.ones(2, 32, dtype=torch.bfloat16))


Wrong = Callable[[Any, Any], object]
"""A call, of everything typed as nobody checks it, and a tiny model."""
CASES: dict[str, tuple[Wrong, str]] = {
    "x too narrow": (
        lambda m, _: m.LAYER.encode(torch.ones(2, 31)),
        "ValueError: x must be 32 wide in its last axis, as the MLP's input that this transcoder encodes; got shape "
        "(2, 31).",
    ),
    "x too wide in forward": (lambda m, _: m.SAE(torch.ones(2, 64)), "ValueError: x must be 32 wide"),
    "x of an autoencoder": (lambda m, _: m.SAE.encode(torch.ones(2, 64)), "the MLP's output that this topk-sae"),
    "x without axes": (lambda m, _: m.MXD.encode(torch.tensor(1.0)), "ValueError: x must be 32 wide"),
    "x of token ids": (lambda m, _: m.MXD(IDS), "TypeError: x must hold activations, of a floating-point type; got"),
    "x of another type": (
        lambda m, _: m.MXD(torch.ones(2, 32).bfloat16()),
        "TypeError: x must have the layer's type, torch.float32; got torch.bfloat16. Convert it",
    ),
    "x of no tensor": (lambda m, _: m.MXD.encode([1.0]), "TypeError: x must be a tensor of activations; got list."),
    "x of another type under autocast": (lambda m, _: m.under_autocast(), "nothing"),
    "a provenance that is none": (
        lambda m, _: setattr(m.SAE, "provenance", {"layer": 1}),
        "TypeError: provenance must be a mxd.Provenance; got dict.",
    ),
    "a model where a loaded one is wanted": (
        lambda m, gpt2: m.mxd.codes(gpt2, m.LAYER, "a"),
        "TypeError: language_model must be a model with its tokenizer; got GPT2LMHeadModel. mxd.load_language_model",
    ),
    "texts of ids": (
        lambda m, gpt2: m.mxd.codes(m.mxd.load_language_model("bundled"), m.WIDE, [[1, 2]], block=3),
        "TypeError: texts must be strings; got list. Decode token ids first.",
    ),
    "one block": (lambda m, gpt2: m.mxd.mlp_pairs(gpt2, IDS, 3), "TypeError: layers must be several blocks' indices"),
    "one block captured": (lambda m, gpt2: m.enter(m.mxd.capture_mlp(gpt2, 3)), "such as [3]; got 3."),
    "a block's name": (lambda m, gpt2: m.mxd.find_mlp(gpt2, "1"), "TypeError: A layer must be the index of a block"),
    "a batch of a tokenizer": (
        lambda m, gpt2: m.mxd.mlp_pairs(gpt2, m.Batch(), [1]),
        "TypeError: input_ids must be a tensor of token ids; got Batch. Give its .input_ids, and its .attention_mask",
    ),
    "lists of ids": (
        lambda m, gpt2: m.mxd.mlp_pairs(gpt2, [[1, 2]], [1]),
        "got list. Ask the tokenizer for return_ten",
    ),
    "ids without a batch": (
        lambda m, gpt2: m.mxd.mlp_pairs(gpt2, IDS[0], [1]),
        "ValueError: input_ids must have shape (batch, seq); got (7,). For one text, give input_ids[None].",
    ),
    "ids that are none": (
        lambda m, gpt2: m.mxd.mlp_pairs(gpt2, IDS.float(), [1]),
        "TypeError: input_ids must be whole",
    ),
    "a model in a tuple": (
        lambda m, gpt2: m.mxd.mlp_pairs(m.Pair(gpt2), IDS, [1]),
        "TypeError: model must be a Hugging Face language model; got Pair. Give its .model.",
    ),
    "a model's name": (
        lambda m, _: m.mxd.find_mlp("gpt2", 1),
        "TypeError: model must be a Hugging Face language model",
    ),
    "a layer without its block": (
        lambda m, gpt2: m.enter(m.mxd.replace_mlp(gpt2, m.LAYER)),
        "TypeError: replacements must be given by block, such as {3: ...}; got Transcoder.",
    ),
    "a folder for a layer": (
        lambda m, gpt2: m.enter(m.mxd.replace_mlp(gpt2, {1: "RUN/layers/1"})),
        "TypeError: What stands in for block 1's MLP must be a sparse layer, an MlpSite, a module or a function of x; "
        "got 'RUN/layers/1'. Load layers with mxd.load.",
    ),
    "one token that passes": (
        lambda m, gpt2: m.enter(m.mxd.replace_mlp(gpt2, {1: m.LAYER}, passthrough=0)),
        "TypeError: passthrough must be several token ids, such as [tokenizer.bos_token_id]; got 0.",
    ),
    "no token that passes": (
        lambda m, gpt2: m.enter(m.mxd.replace_mlp(gpt2, {1: m.LAYER}, passthrough=[None])),
        "TypeError: passthrough must be several token ids",
    ),
    "a model in a tuple to export for": (
        lambda m, gpt2: m.export([m.LAYER], m.Pair(gpt2)),
        "TypeError: model must be a Hugging Face language model; got Pair. Give its .model.",
    ),
    "a layer to export": (
        lambda m, gpt2: m.export(m.LAYER, gpt2),
        "TypeError: layers must be a list of layers, such as [layer]; got Transcoder.",
    ),
    "folders of layers to export": (
        lambda m, gpt2: m.export(["RUN/layers/1"], gpt2),
        "TypeError: layers must be a list of sparse layers; got one with 'RUN/layers/1'. Load layers with mxd.load.",
    ),
    "blocks to ablate": (
        lambda m, gpt2: m.enter(m.mxd.ablate_mlp(gpt2, [1])),
        "TypeError: means must be given by block, such as {3: ...}; got [1].",
    ),
}


def outcome(call: Wrong, model: nn.Module) -> str:
    try:
        call(sys.modules[__name__], model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def report() -> None:
    """Write what becomes of each call."""
    model = model_of("gpt2")
    sys.stdout.write(json.dumps({name: outcome(call, model) for name, (call, _) in CASES.items()}))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", "from tests.test_misuse import report; report()"]
    path = os.pathsep.join([str(root / "src"), str(root)])
    ended = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=root, env={**os.environ, "PYTHONPATH": path}
    )
    return cast("dict[str, str]", json.loads(ended.stdout))


@pytest.mark.parametrize("name", CASES)
def test_what_is_given_wrong_is_said_in_a_sentence(outcomes: dict[str, str], name: str) -> None:
    assert CASES[name][1] in outcomes[name]
    assert "\n" not in outcomes[name]
