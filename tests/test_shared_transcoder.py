import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.data.activations import ActivationBatch
from mxd.evaluation.specialisation import specialisation
from mxd.kernels import mix
from mxd.layers import (
    Encoder,
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    MlpWeights,
    SharedTranscoder,
    SharedTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from mxd.losses import SharedMoments, distillation_loss, shared_energy, shared_energy_of_part
from mxd.training.student import Student, StudentConfig
from tests.tensors import normal
from tests.train_command import STEPS, Trainer, nothing

CONFIG = SharedTranscoderConfig(d_in=5, d_hidden=7, d_out=4, num_latents=13, k=3, activation="silu", encoder="glu")


def built(config: SharedTranscoderConfig = CONFIG, seed: int = 0) -> SharedTranscoder:
    layer = SharedTranscoder(config).double()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 * seed + number))
    return layer


def glu_weights(seed: int = 5) -> MlpWeights:
    shapes = ((5, 7), (7,), (5, 7), (7,), (7, 4), (4,))
    return MlpWeights(*(normal(*shape, seed=seed + number) for number, shape in enumerate(shapes)))


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(0, 6), k=st.integers(1, 13), encoder=st.sampled_from(["mlp", "glu"]), seed=st.integers(0, 99))
def test_is_a_transcoder_plus_a_dense_mlp(tokens: int, k: int, encoder: Any, seed: int) -> None:
    config = SharedTranscoderConfig(
        d_in=5, d_hidden=7, d_out=4, num_latents=13, k=k, activation="relu", encoder=encoder
    )
    layer, x = built(config, seed), normal(tokens, 5, seed=seed)
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}
    for row, prediction in zip(x, layer(x).prediction, strict=True):
        scores = row @ weights["W_enc"] + weights["b_enc"]
        chosen = sorted(range(13), key=lambda n: -float(scores[n]))[:k]
        expected = weights["b_dec"].clone()
        for n in chosen:
            expected = expected + max(float(scores[n]), 0.0) * weights["W_dec"][n]
        hidden = row @ weights["encoder.W_enc"] + weights["encoder.b_enc"]
        if encoder == "glu":
            hidden = (row @ weights["encoder.W_enc_gate"] + weights["encoder.b_enc_gate"]).relu() * hidden
        else:
            hidden = hidden.relu()
        torch.testing.assert_close(prediction, expected + hidden @ weights["W_shared"], rtol=1e-12, atol=1e-12)


def test_begun_as_an_mlp_the_shared_expert_is_exact() -> None:
    layer, mlp, x = built(), glu_weights(), normal(20, 5, seed=1)
    layer.begin_from(mlp)
    assert mlp.W_enc_gate is not None
    hidden = torch.nn.functional.silu(x @ mlp.W_enc_gate + cast(Tensor, mlp.b_enc_gate)) * (x @ mlp.W_enc + mlp.b_enc)
    torch.testing.assert_close(layer.base(x), hidden @ mlp.W_dec + mlp.b_dec, rtol=1e-12, atol=1e-12)
    output = layer(x)
    torch.testing.assert_close(output.prediction, layer.base(x) + layer.carried(x, output.code), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("encoder", ["glu", "mlp"])
def test_a_shared_expert_wider_than_the_mlp_begins_as_it_all_the_same(encoder: Encoder) -> None:
    config = replace(CONFIG, encoder=encoder, activation="silu", d_hidden=12)
    layer, mlp, x = SharedTranscoder(config, torch.Generator().manual_seed(0)).double(), glu_weights(), normal(20, 5)
    mlp = mlp if encoder == "glu" else mlp._replace(W_enc_gate=None, b_enc_gate=None)
    drawn = layer.get_parameter("encoder.W_enc").detach().clone()
    torch.nn.init.ones_(layer.W_shared)
    layer.begin_from(mlp)
    hidden = x @ mlp.W_enc + mlp.b_enc
    gate = hidden if mlp.W_enc_gate is None else x @ mlp.W_enc_gate + cast(Tensor, mlp.b_enc_gate)
    units = torch.nn.functional.silu(gate) * (1 if mlp.W_enc_gate is None else hidden)
    torch.testing.assert_close(layer.base(x), units @ mlp.W_dec + mlp.b_dec, rtol=1e-12, atol=1e-12)
    begun = layer.get_parameter("encoder.W_enc").detach()
    torch.testing.assert_close(begun[:, 7:], drawn[:, 7:], rtol=0, atol=0)
    assert begun[:, 7:].any()


def test_a_mixture_of_decoders_takes_the_hidden_units_only() -> None:
    config = MixtureOfDecodersConfig(d_in=5, d_hidden=7, d_out=4, num_experts=9, k=2, activation="silu", encoder="glu")
    layer = MixtureOfDecoders(config).double()
    layer.begin_from(glu_weights())
    torch.testing.assert_close(layer.get_parameter("encoder.W_enc").detach(), glu_weights().W_enc, rtol=0, atol=0)
    assert not layer.W_dec.any()


def test_what_has_no_place_for_an_mlp_says_so() -> None:
    with pytest.raises(ValueError, match="init must be paper for transcoder"):
        Transcoder(TranscoderConfig(d_in=5, d_out=4, num_latents=9, k=2)).begin_from(glu_weights())
    narrow = SharedTranscoder(SharedTranscoderConfig(d_in=5, d_hidden=3, d_out=4, num_latents=9, k=2, encoder="glu"))
    with pytest.raises(ValueError, match=r"must be .* own, glu, and at least 7 wide to begin as it; got glu, 3 wide"):
        narrow.begin_from(glu_weights())
    with pytest.raises(ValueError, match="glu, and at least 7 wide to begin as it; got mlp, 7 wide"):
        SharedTranscoder(SharedTranscoderConfig(d_in=5, d_hidden=7, d_out=4, num_latents=9, k=2)).begin_from(
            glu_weights()
        )


def test_shared_energy_is_the_variance_over_the_targets_length() -> None:
    shared, target = normal(6, 3), normal(6, 3, seed=1)
    mean = shared.mean(0)
    expected = sum(float((shared[b] - mean).square().sum() / target[b].norm()) for b in range(6)) / 18
    assert shared_energy(shared, target).item() == pytest.approx(expected, rel=1e-12)
    assert shared_energy(shared + normal(3, seed=2), target).item() == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_charges_of_a_batchs_parts_add_up_to_that_of_the_whole_and_so_do_gradients(size: int, seed: int) -> None:
    shared, target = normal(9, 3, seed=seed).requires_grad_(), normal(9, 3, seed=seed + 1)
    target[seed % 9] *= seed % 2  # A target of zeros counts nothing.
    whole = SharedMoments.of(shared.detach(), target)
    parts = zip(shared.split(size), target.split(size), strict=True)
    loss = torch.stack([shared_energy_of_part(*part, whole) * (len(part[0]) / 9) for part in parts]).sum()
    expected = shared_energy(shared, target)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(of, shared)[0] for of in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@settings(deadline=None, max_examples=20)
@given(penalty=st.floats(0.01, 3.0), seed=st.integers(0, 99))
def test_the_charge_shrinks_the_best_shared_part_by_one_plus_the_penalty(penalty: float, seed: int) -> None:
    # docs/method.md: with latents held fixed, s minimises the sum where it is (t − latents) / (1 + penalty), centred.
    target, latents = normal(40, 3, seed=seed), 0.5 * normal(40, 3, seed=seed + 1)
    target = torch.nn.functional.normalize(target, dim=1)
    rest = (target - latents) - (target - latents).mean(0)
    bias = (target - latents).mean(0)
    best = (rest / (1 + penalty)).requires_grad_()
    loss = distillation_loss(latents + best + bias, target) + penalty * shared_energy(best, target)
    (gradient,) = torch.autograd.grad(loss, best)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_specialisation_leaves_the_base_where_it_is() -> None:
    base, carried, ones = normal(200, 6), normal(200, 6, seed=1), torch.ones(200, 6, dtype=torch.float64)
    total = (base + carried - (base + carried).mean(0)).square().sum()
    own = specialisation(carried, ones).scalar_gain * (carried - carried.mean(0)).square().sum() / total
    assert specialisation(base + carried, ones, base).scalar_gain == pytest.approx(float(own), rel=1e-9)
    assert specialisation(base + 1e-3, ones, base).scalar_gain < 1e-12


def test_a_charge_moves_variance_from_the_shared_expert_to_the_latents() -> None:
    def share(penalty: float) -> float:
        layer = SharedTranscoder(CONFIG, torch.Generator().manual_seed(0))
        layer.begin_from(MlpWeights(*(0.5 * cast(Tensor, weight) for weight in glu_weights())))
        student = Student("s", 0, layer, StudentConfig(lr=1e-2, inherits=True, shared_penalty=penalty))
        x = normal(256, 5).float()
        target = layer.base(x).detach().clone()
        for step in range(60):
            student.step(step, x, target, torch.ones(256, dtype=torch.bool), lr_factor=1.0, autocast=None)
        shared = layer.base(x).detach()
        return float((shared - shared.mean(0)).square().sum() / (target - target.mean(0)).square().sum())

    assert share(1.0) < 0.6 * share(0.0)


@pytest.mark.parametrize("micro_batch_tokens", [None, 4])
def test_a_step_sums_the_latents_rows_once_for_each_token(
    micro_batch_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []

    def counted(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        tokens.append(len(values))
        return mix(values, indices, table)

    monkeypatch.setattr("mxd.layers.shared_transcoder.mix", counted)
    config = StudentConfig(lr=1e-2, shared_penalty=0.3, micro_batch_tokens=micro_batch_tokens)
    layer = SharedTranscoder(SharedTranscoderConfig(d_in=4, d_hidden=6, d_out=5, num_latents=8, k=2))
    student = Student("s", 0, layer, config)
    x, target, is_content = normal(12, 4).float(), normal(12, 5, seed=1).float(), torch.ones(12, dtype=torch.bool)
    student.step(0, x, target, is_content, lr_factor=1.0, autocast=None)
    assert sum(tokens) == 12


GRID = ["--kind", "shared-transcoder", "mxd", "--init", "auto", "paper", "model", "--shared-penalty", "0.1", "1"]


def students_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "run.json").read_text())["students"]


def test_beginnings_and_charges_are_axes_of_the_grid(trainer: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert trainer(run, "--layer", "0", "--tokens", "64", *GRID).status == 0
    found = {student["id"]: (student["init"], student["shared_penalty"]) for student in students_of(run)}
    assert found == {
        "shared-transcoder-k4-model-p0.1": ("model", 0.1),
        "shared-transcoder-k4-model-p1": ("model", 1.0),
        "shared-transcoder-k4-paper-p0.1": ("paper", 0.1),
        "shared-transcoder-k4-paper-p1": ("paper", 1.0),
        "mxd-k4-paper": ("paper", None),
        "mxd-k4-model": ("model", None),
    }
    begun = json.loads((run / "layers" / "0" / "mxd-k4-model" / "config.json").read_text())["provenance"]["init"]
    assert begun == "model"


def test_interrupted_and_resumed_it_ends_bit_for_bit_the_same(trainer: Trainer, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    only = ["--kind", "shared-transcoder", "--snapshot-every", "600"]
    assert trainer(whole, *only).status == 0

    def interrupt(step: int, batch: ActivationBatch) -> None:
        if step == STEPS // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.before_batch = interrupt
    assert trainer(parts, *only).status == 130
    trainer.before_batch = nothing
    assert trainer(parts, *only, "--resume").status == 0
    assert trainer.steps[0] >= STEPS // 2
    weights = [path.relative_to(whole) for path in (whole / "layers").rglob("*.safetensors")]
    assert len(weights) == 2
    assert all((whole / path).read_bytes() == (parts / path).read_bytes() for path in weights)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hidden", "12"], "glu, and at least 40 wide to begin as it; got glu, 12 wide"),
        (
            ["--activation", "relu"],
            "activation must be the model's own, silu, for shared-transcoder to begin as its MLP",
        ),
        (["--output-bias", "mean"], "output-bias must be zeros where shared-transcoder begins with init model"),
        (["--shared-penalty", "-1"], "shared-penalty must be finite numbers of at least 0; got -1.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    arguments: list[str], sentence: str, trainer: Trainer, tmp_path: Path
) -> None:
    ended = trainer(tmp_path / "run", "--kind", "shared-transcoder", *arguments)
    assert ended.status == 2
    assert sentence in trainer.last_line(ended)
    assert not (tmp_path / "run").exists()
