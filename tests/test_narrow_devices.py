"""Measurements in float64 on a device that has none, as Apple's GPUs: tensors here say so of themselves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mxd.evaluation.collect import LatentStatistics
from mxd.evaluation.continuations import agreement
from mxd.evaluation.ranks import ranks
from mxd.evaluation.specialisation import specialisation
from mxd.explorer import live
from mxd.explorer.live import shares
from mxd.layers import Transcoder, TranscoderConfig
from mxd.metrics import in_float64, widest_dtype
from mxd.steering.scores import Reference, moved, read_texts

MPS = torch.device("mps")


class Narrow(Tensor):
    """A tensor that is on such a device until it is asked for on the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return MPS
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(Tensor)
        found = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(found, Narrow) and found.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return found


def narrow(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).as_subclass(Narrow)


class Model(nn.Module):
    def forward(self, input_ids: Tensor, **_: object) -> object:
        states = narrow(*input_ids.shape, 6)
        return SimpleNamespace(hidden_states=[states], logits=narrow(*input_ids.shape, 11))


def test_such_a_device_refuses_float64_here_too() -> None:
    with pytest.raises(TypeError, match="MPS"):
        narrow(3).double()
    assert (widest_dtype(MPS), widest_dtype(torch.device("cpu"))) == (torch.float32, torch.float64)
    assert in_float64(narrow(3)).dtype == torch.float64
    assert type(in_float64(narrow(3))) is Tensor


def test_matrices_and_predictions_are_measured_in_float64_all_the_same() -> None:
    matrix, y, q = narrow(5, 4), narrow(40, 6), narrow(6, 40).t()
    assert ranks(matrix) == ranks(matrix.cpu())
    assert specialisation(y, q) == specialisation(y.cpu(), q.cpu())


def test_continuations_and_counts() -> None:
    one = torch.tensor([[1, 2, 3], [4, 5, 6]])
    other = torch.tensor([[1, 2, 0], [4, 5, 6]])
    shared = agreement(one.as_subclass(Narrow), other.as_subclass(Narrow))
    assert shared.tolist() == [1.0, 1.0, 0.5]
    assert shared.dtype == torch.float64
    statistics = LatentStatistics(3)
    statistics.num_tokens, statistics.firings = 4, torch.tensor([2, 0, 1]).as_subclass(Narrow)
    assert statistics.firing_rates.tolist() == [0.5, 0.0, 0.25]
    assert statistics.dead_fraction == pytest.approx(1 / 3)


def test_texts_that_were_sampled() -> None:
    prompt, texts = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5], [6, 7, 8]])
    reading = read_texts(Model(), prompt, texts)
    assert (reading.states.shape, reading.states.dtype, reading.losses.dtype) == ((2, 6), *[torch.float64] * 2)
    reference = Reference(torch.cat([prompt.expand(2, -1), texts], 1), narrow(2, 3, 11))
    assert moved(Model(), _nothing, prompt, reference) > 0


def test_shares_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = TranscoderConfig(d_in=5, d_out=5, num_latents=8, k=2)
    network = Transcoder(layer, torch.Generator().manual_seed(0)).requires_grad_(False)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected, expected_bases = shares(network, x)

    def widest(device: torch.device) -> torch.dtype:
        return torch.float32

    monkeypatch.setattr(live, "widest_dtype", widest)
    parts, bases = shares(network, x)
    assert [[part.latent for part in of] for of in parts] == [[part.latent for part in of] for of in expected]
    for found, exact in zip(parts, expected, strict=True):
        assert [part.share for part in found] == pytest.approx([part.share for part in exact], abs=1e-4)
    assert bases == pytest.approx(expected_bases, abs=1e-4)


def _nothing() -> Any:
    return torch.no_grad()
