"""What a step of one student must keep to: the same weights each time, and each loss in its own place."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mxd.kernels import dots
from mxd.layers import LAYERS, LayerRequest, SelectionName, SparseLayer, SparseLayerOutput, Transcoder, TranscoderConfig
from mxd.training.optimizer import project_gradients_
from mxd.training.student import Student, StudentConfig, distillation

WIDTH, LATENTS, TOKENS = 8, 128, 1024


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def layer_of(kind: str, selection: SelectionName = "topk") -> SparseLayer:
    request = LayerRequest(
        d_in=WIDTH,
        d_out=WIDTH,
        d_hidden=24,
        activation="gelu",
        encoder="mlp",
        rank=4,
        num_latents=LATENTS,
        k=LATENTS // 4,
        selection=selection,
        site="a test",
    )
    entry, generator = LAYERS[kind], torch.Generator().manual_seed(0)
    layer = entry.layer(entry.configure(request), generator)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        for name in ("W_dec", "W_shared"):
            if (table := getattr(layer, name, None)) is not None and not table.any():
                table.normal_(generator=generator)
    return layer


def trained(kind: str, selection: SelectionName, config: StudentConfig) -> dict[str, Tensor]:
    student, generator = Student("s", 0, layer_of(kind, selection), config), torch.Generator().manual_seed(1)
    for step in range(2):
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        student.step(
            step, x, x.roll(1, 1).sigmoid(), torch.ones(TOKENS, dtype=torch.bool), lr_factor=1.0, autocast=None
        )
    return student.network.state_dict()


@pytest.mark.parametrize("selection", ["topk", "batch-topk", "l1"])
@pytest.mark.usefixtures("two_threads")
def test_two_threads_train_the_same_bytes_each_time(selection: SelectionName) -> None:
    # An auxiliary loss where there can be one: latents of an l1 layer hardly ever die.
    config = StudentConfig(
        lr=1e-2, l1_coefficient=1e-3 if selection == "l1" else 0.0, aux_coefficient=1 / 32, dead_tokens=1
    )
    first = trained("mxd", selection, config)
    for _ in range(2):
        again = trained("mxd", selection, config)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.mark.parametrize("kind", LAYERS)
def test_the_loss_on_dead_latents_teaches_nothing_that_latents_share(kind: str) -> None:
    def gradients(aux_coefficient: float) -> dict[str, Tensor]:
        layer, generator = layer_of(kind), torch.Generator().manual_seed(2)
        config = StudentConfig(lr=1e-3, aux_coefficient=aux_coefficient, dead_tokens=1)
        student = Student("s", 0, layer, config)
        x, target = (torch.randn(64, WIDTH, generator=generator) for _ in range(2))
        dead = torch.arange(5) if aux_coefficient else None
        student._add_gradients(x, target, layer.config.k, len(x), dead, None)
        return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}

    plain, revived = gradients(0.0), gradients(1.0)
    learns = {name for name in plain if not torch.equal(plain[name], revived[name])}
    own = {
        "mxd": {"W_gate", "b_gate", "W_expert"},
        "low-rank": {"W_gate", "b_gate", "W_expert"},
        "molt": {"W_gate", "b_gate", "W_down", "W_dec"},
    }
    assert learns == own.get(kind, {"W_enc", "b_enc", "W_dec"})
    for name in ("W_gate", "W_enc"):
        if name in plain:
            changed = (revived[name] != plain[name]).any(0).nonzero().flatten()
            assert set(changed.tolist()) <= set(range(5))


def test_a_thread_that_leaves_autocast_changes_no_gradient() -> None:
    """Threads share the cache of cast weights, of which each use here finds what the one before it has left."""

    def leave_autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            pass

    def gradients(*, visited: bool) -> list[Tensor]:
        layer, generator = layer_of("mxd"), torch.Generator().manual_seed(2)
        x, target = (torch.randn(64, WIDTH, generator=generator) for _ in range(2))

        def twice(output: SparseLayerOutput, target: Tensor) -> Tensor:
            if visited:
                thread = threading.Thread(target=leave_autocast)
                thread.start()
                thread.join()
            return distillation(output, target) + 0.3 * distillation(layer(x), target)

        student = Student("s", 0, layer, StudentConfig(lr=1e-3), loss=twice)
        student._add_gradients(x, target, layer.config.k, len(x), None, torch.bfloat16)
        return [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]

    alone, beside = gradients(visited=False), gradients(visited=True)
    assert len(alone) >= 5
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


@pytest.mark.parametrize("selection", ["topk", "batch-topk", "l1"])
def test_a_float32_layer_reads_bfloat16_under_autocast(selection: SelectionName) -> None:
    config = TranscoderConfig(d_in=8, d_out=8, num_latents=64, k=4, selection=selection)
    layer = Transcoder(config, torch.Generator().manual_seed(0))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.bfloat16())
        expected = layer(x.bfloat16().float())
    assert found.code.values.dtype == torch.float32
    torch.testing.assert_close(found.prediction, expected.prediction, rtol=0.05, atol=0.02)
    found.prediction.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_dot_products_of_two_types_are_taken_in_the_tables_and_returned_in_the_inputs() -> None:
    table, dense = torch.randn(9, 4), torch.randn(3, 4).bfloat16()
    indices = torch.tensor([[0, 8], [3, 3], [1, 2]])
    expected = torch.einsum("td,tkd->tk", dense.float(), table[indices]).bfloat16()
    found = dots(dense, indices, table)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


class Counted(TorchDispatchMode):
    """Counts how often an operator runs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func.overloadpacket.__name__ == self.name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 4), ("meta", 1)])
def test_gradients_are_projected_in_blocks_on_a_cpu_and_at_once_elsewhere(device: str, blocks: int) -> None:
    table = torch.nn.Parameter(torch.zeros(2000, 3, device=device))
    table.grad = torch.zeros_like(table)
    with Counted("addcmul_") as counted:
        project_gradients_([table])
    assert counted.count == blocks
