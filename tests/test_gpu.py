"""What holds on a CUDA device: `make bench-gpu` runs the tests marked `gpu`. Their twins on the CPU run everywhere."""

import warnings
from collections.abc import Callable, Generator, Iterator
from typing import cast

import numpy as np
import pytest
import torch
from jaxtyping import Int
from torch import Tensor

from mxd.data.activations import ActivationStream
from mxd.data.prefetch import Prefetch
from mxd.data.tokens import LocalTokens
from mxd.kernels import backends, reference, routing, torch_tables
from mxd.kernels.turned import turned
from mxd.layers import LAYERS, SelectionName, SharedTranscoder, SharedTranscoderConfig, SparseLayer
from mxd.models import MlpPair, mlp_pairs
from mxd.training.student import Student, StudentConfig, read_metrics
from tests.gpu_devices import on_every_device, on_gpu
from tests.kernel_inputs import LAYER_CONFIGS
from tests.test_models import build
from tests.test_student import layer_of

every_kind = pytest.mark.parametrize("kind", LAYERS)
TOKENS = 64
WIDTH = 32
"""Of the language model."""


@pytest.fixture(autouse=True)
def waiting_is_allowed_afterwards() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        allow_waiting("default")


def allow_waiting(mode: str) -> None:
    with warnings.catch_warnings():
        # "Synchronization debug mode is a prototype feature", said once and after the mode has been set.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Generator[str, None, None]:
    before = backends.chosen_backend()
    backends.set_backend(request.param)
    yield request.param
    backends.set_backend(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A model on the CPU rounds by the number of threads, and prefetching has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_student(kind: str, device: str, config: StudentConfig) -> Student:
    new_layer = cast(Callable[..., SparseLayer], LAYERS[kind].layer)
    layer = new_layer(LAYER_CONFIGS[kind], torch.Generator().manual_seed(0))
    return Student("s", 0, layer.to(device), config)


def learn(student: Student, device: str, autocast: torch.dtype | None = None, steps: int = 3) -> list[Tensor]:
    """Return the weights after some steps, on the CPU."""
    config, generator = student.network.config, torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(TOKENS, config.d_in, generator=generator).to(device)
        target = torch.randn(TOKENS, config.d_out, generator=generator).to(device)
        is_content = torch.ones(TOKENS, dtype=torch.bool, device=device)
        student.step(step, x, target, is_content, lr_factor=1.0, autocast=autocast)
    return [parameter.detach().cpu().clone() for parameter in student.network.parameters()]


def trained(kind: str, device: str, autocast: torch.dtype | None = None) -> list[Tensor]:
    return learn(new_student(kind, device, StudentConfig(lr=1e-3)), device, autocast)


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@on_gpu
@every_kind
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
def test_a_gpu_learns_what_a_cpu_learns_and_the_same_twice(kind: str, backend: str, device: str) -> None:
    first = trained(kind, device)
    assert_equal(first, trained(kind, device))
    for one, other in zip(first, trained(kind, "cpu"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@on_gpu
@every_kind
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
def test_bfloat16_gives_the_same_bits_twice(kind: str, backend: str, device: str) -> None:
    assert_equal(trained(kind, device, torch.bfloat16), trained(kind, device, torch.bfloat16))


@on_every_device
@pytest.mark.parametrize("selection", ["topk", "batch-topk", "l1"])
def test_every_selection_and_loss_gives_the_same_bits_twice(selection: SelectionName, device: str) -> None:
    config = StudentConfig(
        lr=1e-2, l1_coefficient=1e-3 if selection == "l1" else 0.0, aux_coefficient=1 / 32, dead_tokens=1, clip=1.0
    )
    runs = [learn(Student("s", 0, layer_of("mxd", selection).to(device), config), device) for _ in range(2)]
    assert_equal(*runs)
    assert all(weight.isfinite().all() for weight in runs[0])


@on_every_device
@pytest.mark.parametrize("kind", ["mxd", "shared-transcoder"])
def test_parts_of_a_batch_random_k_and_shared_energy_give_the_same_bits_twice(kind: str, device: str) -> None:
    config = StudentConfig(lr=1e-2, micro_batch_tokens=24, random_k_seed=3, shared_penalty=0.1)
    assert_equal(*(learn(new_student(kind, device, config), device, torch.bfloat16) for _ in range(2)))


@on_gpu
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "molt"])
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
def test_a_step_waits_for_nothing(kind: str, backend: str, device: str) -> None:
    student = new_student(kind, device, StudentConfig(lr=1e-3, clip=1.0))
    config = student.network.config
    x, target = (torch.randn(TOKENS, size).to(device) for size in (config.d_in, config.d_out))
    is_content = torch.ones(TOKENS, dtype=torch.bool, device=device)
    student.step(0, x, target, is_content, lr_factor=1.0, autocast=torch.bfloat16)
    try:
        allow_waiting("error")
        student.step(1, x, target, is_content, lr_factor=1.0, autocast=torch.bfloat16)
    finally:
        allow_waiting("default")


@on_every_device
def test_metrics_of_all_students_are_those_of_each(device: str) -> None:
    def students() -> list[Student]:
        made = [new_student(kind, device, StudentConfig(lr=1e-3)) for kind in ("mxd", "transcoder")]
        for number, student in enumerate(made):
            student.id = f"s{number}"
            learn(student, device)
        return made

    together, apart = read_metrics(students(), 3 * TOKENS), students()
    assert together == {student.name: student.read_metrics(3 * TOKENS) for student in apart}
    assert all(numbers["l0"] > 0 and numbers["fvu"] > 0 for numbers in together.values())
    assert all(student.is_finite() for student in apart)


@on_every_device
def test_several_blocks_of_scores_give_what_one_gives(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(device) for shape in ((50, 8), (8, 300), (300,)))
    whole = routing.route(x, weight, bias, 4)
    monkeypatch.setitem(routing.BLOCK_BYTES, device, 7 * 300 * 4)
    assert len(list(routing.score_blocks(x, weight, bias))) == 8
    parts = routing.route(x, weight, bias, 4)
    torch.testing.assert_close(parts[0].sort().values, whole[0].sort().values)
    torch.testing.assert_close(parts[1].sort().values, whole[1].sort().values)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gathers_of_popular_rows_equal_the_reference(dtype: torch.dtype, device: str) -> None:
    tokens, k, n, d = 500, 3, 40, 9
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(n - 1, (tokens, k), generator=generator)
    indices[:400, 0] = 5
    values, dense, table = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((tokens, k), (tokens, d), (n, d))
    )
    code = torch.zeros(tokens, n, dtype=torch.float64).scatter_add(1, indices, values.double())
    rtol, atol = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-3), torch.bfloat16: (0.02, 0.1)}[dtype]

    def check(found: Tensor, exact: Tensor) -> None:
        assert found.dtype == dtype
        torch.testing.assert_close(found.cpu().double(), exact, rtol=rtol, atol=atol)

    places, wide = indices.to(device), (dense.double(), table.double())
    here = [tensor.to(device) for tensor in (values, dense, table)]
    check(torch_tables.weighted_rows(here[0], places, here[2]), reference.mix(values.double(), indices, wide[1]))
    check(torch_tables.row_dots(here[1], places, here[2]), reference.dots(wide[0], indices, wide[1]))
    named = turned(places, n)
    runs = torch_tables.sums_by_runs(here[0].flatten()[named.order], named.tokens, named.bounds[:-1], here[1])
    check(runs, code.t() @ wide[0])
    if device == "cuda":
        check(torch_tables.row_sums(here[0], named, here[1]), code.t() @ wide[0])


@on_every_device
@pytest.mark.usefixtures("one_thread")
def test_prefetched_batches_of_a_model_are_the_same_bits(device: str) -> None:
    model = build("llama").to(device)

    def pairs(first: int, contexts: Int[Tensor, "n context"]) -> dict[int, MlpPair]:
        del first
        with torch.autocast(device, torch.bfloat16):
            return mlp_pairs(model, contexts.to(device), [1])

    def weights(*, prefetched: bool) -> list[Tensor]:
        stream = ActivationStream(
            pairs,
            LocalTokens(np.random.default_rng(0).integers(30, size=2048), context=8, bos=None, seed=0),
            widths={1: (WIDTH, WIDTH)},
            batch_tokens=TOKENS,
            buffer_tokens=4 * TOKENS,
            total_tokens=12 * TOKENS,
            forward_contexts=4,
            special_ids=(),
            seed=0,
            device=device,
        )
        config = SharedTranscoderConfig(d_in=WIDTH, d_hidden=6, d_out=WIDTH, num_latents=64, k=3)
        layer = SharedTranscoder(config, torch.Generator().manual_seed(0)).to(device)
        student = Student("s", 1, layer, StudentConfig(lr=1e-2, shared_penalty=0.1))
        for step, batch in enumerate(Prefetch(stream) if prefetched else stream):
            rows = batch.layers[1]
            x, target = rows.x.float(), rows.target.float()
            student.step(step, x, target, batch.is_content, lr_factor=1.0, autocast=torch.bfloat16)
        return [parameter.detach().cpu() for parameter in layer.parameters()]

    assert_equal(weights(prefetched=True), weights(prefetched=False))
