"""What holds on a CUDA device beyond what the CPU can show: `make bench-gpu` runs these."""

from collections.abc import Callable, Generator
from typing import cast

import pytest
import torch
from torch import Tensor

from mxd.kernels import backends
from mxd.layers import LAYERS, SparseLayer
from mxd.training.student import Student, StudentConfig
from tests.kernel_inputs import LAYER_CONFIGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; `make bench-gpu` runs these there"),
]
every_kind = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Generator[str, None, None]:
    before = backends.chosen_backend()
    backends.set_backend(request.param)
    yield request.param
    backends.set_backend(before)


def trained(kind: str, device: str, steps: int = 3) -> list[Tensor]:
    config = LAYER_CONFIGS[kind]
    layer = cast(Callable[..., SparseLayer], LAYERS[kind].layer)(config, torch.Generator().manual_seed(0))
    student = Student("s", 0, layer.to(device), StudentConfig(lr=1e-3))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(64, config.d_in, generator=generator).to(device)
        target = torch.randn(64, config.d_out, generator=generator).to(device)
        is_content = torch.ones(64, dtype=torch.bool, device=device)
        student.step(step, x, target, is_content, lr_factor=1.0, autocast=None)
    return [parameter.detach().cpu() for parameter in layer.parameters()]


@every_kind
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
def test_a_gpu_learns_what_a_cpu_learns_and_the_same_twice(kind: str, backend: str) -> None:
    first, second = trained(kind, "cuda"), trained(kind, "cuda")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    for one, other in zip(first, trained(kind, "cpu"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "molt"])
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
def test_a_step_waits_for_nothing(kind: str, backend: str) -> None:
    config = LAYER_CONFIGS[kind]
    layer = cast(Callable[..., SparseLayer], LAYERS[kind].layer)(config)
    student = Student("s", 0, layer.cuda(), StudentConfig(lr=1e-3, clip=1.0))
    x, target = torch.randn(64, config.d_in).cuda(), torch.randn(64, config.d_out).cuda()
    is_content = torch.ones(64, dtype=torch.bool, device="cuda")
    student.step(0, x, target, is_content, lr_factor=1.0, autocast=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        student.step(1, x, target, is_content, lr_factor=1.0, autocast=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
