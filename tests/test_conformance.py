import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import mxd.checkpoint
import mxd.conformance.saving
from mxd.conformance import (
    CHECKS,
    Check,
    check_bfloat16,
    check_compiles,
    check_expert_rank,
    check_first_step,
    check_layer,
    check_resaving,
    check_saving,
)
from mxd.layers import (
    LAYERS,
    LinearMap,
    LinearTransformMixtureConfig,
    LowRankMixtureConfig,
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    SharedTranscoderConfig,
    SkipTranscoderConfig,
    SparseCode,
    SparseLayer,
    SparseLayerOutput,
    TopKAutoencoderConfig,
    Transcoder,
    TranscoderConfig,
)

MIXTURE = MixtureOfDecodersConfig(d_in=6, d_hidden=9, d_out=5, num_experts=20, k=3)
TRANSCODER = TranscoderConfig(d_in=6, d_out=5, num_latents=20, k=3)
EXAMPLES = {
    "mxd": MIXTURE,
    "mxd, GLU encoder": MixtureOfDecodersConfig(
        d_in=4, d_hidden=3, d_out=7, num_experts=11, k=2, activation="silu", encoder="glu", normalize_experts=False
    ),
    "mxd, all experts active": MixtureOfDecodersConfig(
        d_in=1, d_hidden=1, d_out=1, num_experts=3, k=3, activation="gelu_tanh"
    ),
    "mxd, a shared expert": replace(MIXTURE, shared_expert=True),
    "transcoder": TRANSCODER,
    "transcoder, one latent active": TranscoderConfig(d_in=3, d_out=8, num_latents=13, k=1, normalize_decoder=False),
    "skip-transcoder": SkipTranscoderConfig(d_in=6, d_out=5, num_latents=20, k=3),
    "topk-sae": TopKAutoencoderConfig(d_in=6, num_latents=20, k=3),
    "low-rank": LowRankMixtureConfig(d_in=6, d_hidden=9, d_out=5, num_experts=20, rank=3, k=3),
    "low-rank, GLU encoder": LowRankMixtureConfig(
        d_in=4, d_hidden=3, d_out=7, num_experts=11, rank=6, k=2, encoder="glu", normalize_experts=False
    ),
    "shared-transcoder": SharedTranscoderConfig(d_in=6, d_hidden=9, d_out=5, num_latents=20, k=3),
    "shared-transcoder, GLU": SharedTranscoderConfig(
        d_in=4, d_hidden=3, d_out=7, num_latents=11, k=2, activation="silu", encoder="glu"
    ),
    "molt": LinearTransformMixtureConfig(d_in=6, d_out=5, num_latents=20, rank=4, k=3),
    "mxd, all positive active": replace(MIXTURE, selection="l1", k=20),
    "transcoder, those above a threshold active": replace(TRANSCODER, selection="batch-topk"),
    "molt, those above a threshold active": LinearTransformMixtureConfig(
        d_in=6, d_out=5, num_latents=20, rank=4, k=3, selection="batch-topk"
    ),
    "molt, all transforms active": LinearTransformMixtureConfig(d_in=1, d_out=2, num_latents=3, rank=1, k=3),
}


def build(name: str) -> SparseLayer:
    construct = cast(Callable[[object], SparseLayer], LAYERS[name.partition(",")[0]].layer)
    return construct(EXAMPLES[name])


def test_every_registered_kind_has_an_example() -> None:
    assert {name.partition(",")[0] for name in EXAMPLES} == LAYERS.keys()


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(name, check, id=f"{name}-{check.__name__.removeprefix('check_')}")
        for name in EXAMPLES
        for check in CHECKS
        if check is not check_saving
    ],
)
def test_layer_passes(name: str, check: Check) -> None:
    check(build(name), seed=3)


def test_layers_are_saved_alike_elsewhere() -> None:
    check_resaving([build(name) for name in EXAMPLES], seed=3)


@pytest.mark.compile
@pytest.mark.parametrize("name", [name for name in EXAMPLES if build(name).selection.name == "topk"])
def test_layer_compiles(name: str) -> None:
    check_compiles(build(name))


class TiedTranscoder(SparseLayer):
    """A layer that this library does not have: its decoder is its encoder's transpose, times a gain."""

    kind = "tied-transcoder"
    fixed_atoms = True

    def __init__(self, config: TranscoderConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.d_in, config.num_latents))
        self.bias = nn.Parameter(torch.zeros(config.num_latents))
        self.gain = nn.Parameter(torch.ones(()))

    @property
    def scorer(self) -> LinearMap:
        return LinearMap(self.weight, self.bias)

    def decode(self, x: Tensor, code: SparseCode) -> Tensor:
        return self.gain * (code.values[..., None] * self.weight.t()[code.indices]).sum(-2)

    def base(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def atoms(self, x: Tensor, indices: Tensor) -> Tensor:
        return self.gain * self.weight.t()[indices]

    def input_maps(self) -> tuple[LinearMap, ...]:
        return ()


def test_a_layer_of_somebody_elses_passes() -> None:
    check_layer(TiedTranscoder(TranscoderConfig(d_in=6, d_out=6, num_latents=20, k=3)))


def test_the_given_layer_and_the_random_state_stay_as_they_are() -> None:
    layer = MixtureOfDecoders(MIXTURE).bfloat16().requires_grad_(False).eval()
    layer.b_dec.grad = torch.ones_like(layer.b_dec)
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    for check in CHECKS:
        if check is not check_saving:
            check(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert layer.b_dec.grad.sum() == 5
    assert not any(parameter.requires_grad or parameter.dtype != torch.bfloat16 for parameter in layer.parameters())
    assert not layer.training


class Renormalised(Transcoder):
    def encode(self, x: Tensor) -> SparseCode:
        code = super().encode(x)
        return SparseCode(code.values / code.values.sum(-1, keepdim=True).clamp_min(1e-9), code.indices)


class Signed(Transcoder):
    def encode(self, x: Tensor) -> SparseCode:
        scores = self.pre_activations(x).topk(self.config.k)
        return SparseCode(scores.values, scores.indices)


class Twice(Transcoder):
    def encode(self, x: Tensor) -> SparseCode:
        code = super().encode(x)
        return SparseCode(code.values, code.indices[..., :1].expand_as(code.indices).contiguous())


class Wide(Transcoder):
    def encode(self, x: Tensor) -> SparseCode:
        scores = self.pre_activations(x).relu().topk(self.config.k + 1)
        return SparseCode(scores.values, scores.indices)


class AddsOne(Transcoder):
    def forward(self, x: Tensor) -> SparseLayerOutput:
        prediction, code = super().forward(x)
        return SparseLayerOutput(prediction + 1, code)


class ForgetsTheBias(Transcoder):
    def base(self, x: Tensor) -> Tensor:
        return torch.zeros_like(super().base(x))


class Squares(Transcoder):
    def decode(self, x: Tensor, code: SparseCode) -> Tensor:
        return super().decode(x, SparseCode(code.values.clamp_min(0), code.indices))


class Detached(Transcoder):
    def decode(self, x: Tensor, code: SparseCode) -> Tensor:
        return super().decode(x, SparseCode(code.values.detach(), code.indices))


class AmongAll(Transcoder):
    def encode_among(self, x: Tensor, latents: Tensor, k: int) -> SparseCode:
        return self.encode(x)


class AmongWithoutGradient(Transcoder):
    def encode_among(self, x: Tensor, latents: Tensor, k: int) -> SparseCode:
        code = super().encode_among(x, latents, k)
        return SparseCode(code.values.detach() + 0 * self.b_dec.sum(), code.indices)


class MixesTokens(Transcoder):
    def scorer_input(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if x.ndim > 1 else x


class BranchOfTheInput(Transcoder):
    def dense_branch(self, x: Tensor) -> Tensor:
        return x[..., : self.config.d_out]


class SaysItsAtomsAreFixed(MixtureOfDecoders):
    fixed_atoms = True


class HidesItsEncoder(MixtureOfDecoders):
    def input_maps(self) -> tuple[LinearMap, ...]:
        return (self.scorer,)


class InFloat32(Transcoder):
    def decode(self, x: Tensor, code: SparseCode) -> Tensor:
        prediction = super().decode(x, code)
        return prediction if prediction.dtype == torch.float64 else prediction.float()


class WrongExperts(MixtureOfDecoders):
    def expert_weight(self, n: int) -> Tensor:
        return self.W_dec + self.W_expert[n]


class BiasInside(MixtureOfDecoders):
    def dense_branch(self, x: Tensor) -> Tensor:
        return super().dense_branch(x) + 1


class LowRank(MixtureOfDecoders):
    def expert_weight(self, n: int) -> Tensor:
        weight = super().expert_weight(n)
        return weight[:, :1] * weight[:1]


class MovesTheGate(MixtureOfDecoders):
    def base(self, x: Tensor) -> Tensor:
        return super().base(x) + self.b_gate.sum()

    def decode(self, x: Tensor, code: SparseCode) -> Tensor:
        return super().decode(x, code) + self.b_gate.sum()


class DriftsInBfloat16(Transcoder):
    def decode(self, x: Tensor, code: SparseCode) -> Tensor:
        return super().decode(x, code) + (x.dtype == torch.bfloat16)


@dataclass(frozen=True)
class Fault:
    layer: type[SparseLayer]
    sentence: str
    check: Check = check_layer


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Renormalised, "must keep what topk selects with k 3, rectified; it is off by"),
        Fault(Signed, "values must be nonnegative"),
        Fault(Twice, "indices must be distinct"),
        Fault(Wide, r"values must have shape \(8, 3\); got \(8, 4\)"),
        Fault(AddsOne, r"prediction must be decode\(x, encode\(x\)\)"),
        Fault(ForgetsTheBias, "base \\+ Σ value · atom for the input's own code"),
        Fault(Squares, "base \\+ Σ value · atom for a code with scaled values"),
        Fault(Detached, "gradient of the input must be that of the dense restatement"),
        Fault(AmongAll, "among the given latents only"),
        Fault(AmongWithoutGradient, "gradients must reach the scorer"),
        Fault(MixesTokens, "no leading dimensions must give the same prediction"),
        Fault(BranchOfTheInput, "every atom must be the dense branch times a vector"),
        Fault(SaysItsAtomsAreFixed, "fixed_atoms must be False where inputs change the atoms; it is True"),
        Fault(HidesItsEncoder, "input_maps must name every map of the input"),
        Fault(InFloat32, "a bfloat16 layer must predict in bfloat16"),
        Fault(WrongExperts, "prediction must be Σ_n a_n W_nᵀ z"),
        Fault(BiasInside, "prediction must be Σ_n a_n W_nᵀ z"),
        Fault(LowRank, "over a decoder of rank 5 must have rank 5; got 1", check_expert_rank),
        Fault(MovesTheGate, "must move W_dec and b_dec only; it moved W_dec, b_dec, b_gate", check_first_step),
        Fault(DriftsInBfloat16, "predictions in bfloat16 must be near the exact", check_bfloat16),
    ],
    ids=lambda fault: cast(Fault, fault).layer.__name__,
)
def test_a_fault_is_named(fault: Fault) -> None:
    config = MIXTURE if issubclass(fault.layer, MixtureOfDecoders) else TRANSCODER
    with pytest.raises(AssertionError, match=fault.sentence):
        fault.check(cast(Callable[[object], SparseLayer], fault.layer)(config))


def test_a_checkpoint_that_loses_a_digit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_in_float32(folder: Path) -> SparseLayer:
        return mxd.checkpoint.load_layer(folder).float()

    monkeypatch.setattr(mxd.conformance.saving, "load_layer", load_in_float32)
    with pytest.raises(AssertionError, match="same weights, bit for bit"):
        check_saving(build("transcoder"))
