"""What a run will take, said before it begins: memory, operations, and roughly how long.

Memory is counted, not measured; it is exact for weights, moments, gradients and the shuffle buffer, and rough for what
comes and goes within a step. Time is operations over the speed of a matrix product on this machine; it is an estimate
and no more.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from mxd.kernels.routing import BLOCK_BYTES, BLOCK_BYTES_ELSEWHERE
from mxd.layers import BatchTopK, SparseLayerConfig, TopK
from mxd.models import MlpSite, resolve_device
from mxd.training.config import TrainConfig
from mxd.training.grid import StudentPlan, plan_students
from mxd.training.machine import product_speed
from mxd.training.plan import Plan, buffer_bytes
from mxd.training.resources import Resources, resolve_resources, resolve_threads
from mxd.training.shapes import ModelShape
from mxd.training.streams import forward_contexts
from mxd.training.student import random_ks

EFFICIENCY = 0.5
"""Share of a plain matrix product's speed that training is taken to reach. It stands for all that is no product
(selection, gathers, AdamW's passes over memory, fetching text); it is a round number, not a measurement."""
FLOAT = 4
"""Bytes of one entry of weights, moments and gradients."""
CUDA_BYTES = 2 * 2**30
"""What a CUDA device's libraries and the allocator's gaps are taken to need; a round number, not a measurement."""


class Memory(NamedTuple):
    """Bytes that a run takes where it trains."""

    weights: int
    """Weights of all students."""
    moments: int
    """AdamW's two moments of every weight."""
    step: int
    """The largest that comes and goes: one student's gradients and activations (students step one after another), or
    the contiguous copies of which a snapshot is written; and what a CUDA device's libraries need."""
    buffer: int
    """The shuffle buffer, the batches drawn from it, and the shard of a cache that is being computed (unless the
    device has memory of its own: a shard is put together in the host's)."""
    model: int
    """Weights of the language model."""
    model_pass: int
    """What one of its forward passes holds."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Operations(NamedTuple):
    """Floating-point operations for one token, two per multiply-add."""

    model: int
    """The language model's pass to the deepest wanted layer; 0 where a cache holds it all."""
    forward: int
    """The forward passes of all students."""
    training: int
    """Forward and backward passes of all students."""


class Duration(NamedTuple):
    """How long training may take."""

    seconds: float
    """The estimate."""
    speed: float
    """Operations a second of a plain product in the students' precision, as measured."""


class StudentCost(NamedTuple):
    """What one student takes."""

    parameters: int
    """Number of parameters."""
    forward: int
    """Operations of one token's forward pass."""
    training: int
    """Operations of one token's forward and backward pass."""
    step_bytes: int
    """Memory that comes and goes within its step."""
    copied_bytes: int
    """Weights that are not contiguous, which a snapshot writes from a copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What a run computes and keeps, whether or not its model is loaded."""

    config: TrainConfig
    """What was asked for."""
    students: Sequence[StudentPlan]
    """What is trained."""
    costs: Sequence[StudentCost]
    """What each of them takes."""
    sites: Mapping[int, MlpSite]
    """Its MLPs, by block."""
    resources: Resources
    """What it computes with."""
    activation_dtype: torch.dtype
    """Type of the activations that students see."""
    shard_bytes: int
    """Memory of the shard that is being computed for a cache."""
    model_bytes: int
    """Bytes of the language model's weights."""
    model_is_loaded: bool
    """Whether they are in memory already."""
    model_flops: int
    """Operations of its pass, for one token."""


def plan_workload(plan: Plan) -> Workload:
    """Return what a checked plan, whose model is loaded, will compute and keep."""
    model = cast(torch.nn.Module, plan.language_model.model)
    deepest = max(plan.sites)
    is_cached = plan.cache is not None and plan.cache.coverage().bytes_missing == 0
    flops = model_flops(
        _parameters_to(model, plan.sites[deepest]), deepest + 1, plan.config.context, plan.sites[deepest].d_in
    )
    return Workload(
        config=plan.config,
        students=plan.students,
        costs=costs_of(plan.students, plan.config, plan.resources.device),
        sites=plan.sites,
        resources=plan.resources,
        activation_dtype=plan.activation_dtype,
        shard_bytes=0 if plan.cache is None or is_cached else plan.cache.shard_bytes,
        model_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        model_is_loaded=True,
        model_flops=0 if is_cached else flops,
    )


def shape_workload(config: TrainConfig, shape: ModelShape) -> Workload:
    """Return what a configuration will compute and keep, for a model of which only the shape is known.

    Neither the model nor the text is read. A cache is taken to be empty.

    Raises:
        ValueError: If the model has no such layer or position, or a size does not fit.
    """
    if config.context > shape.positions:
        raise ValueError(
            f"context must be at most {shape.positions}, the model's number of positions; got {config.context}."
        )
    config = config.of_blocks(shape.num_layers)
    sites = shape.sites(config.layers)
    dtype = torch.float32 if config.model_dtype == "auto" else cast(torch.dtype, getattr(torch, config.model_dtype))
    device = resolve_device(config.device)
    torch.set_num_threads(resolve_threads(config.threads))
    students = plan_students(config, sites)
    blocks = max(config.layers) + 1
    return Workload(
        config=config,
        students=students,
        costs=costs_of(students, config, device),
        sites=sites,
        resources=resolve_resources(config, device, shape.d_model, dtype),
        activation_dtype=dtype,
        shard_bytes=0,
        model_bytes=shape.parameters * dtype.itemsize,
        model_is_loaded=False,
        model_flops=model_flops(blocks * shape.block_parameters, blocks, config.context, shape.d_attention),
    )


def model_flops(parameters: int, blocks: int, context: int, d_attention: int) -> int:
    """Return the operations of one token's pass through these blocks.

    Two for each parameter, and in each block two products of the context's length with the width of all heads: scores
    and mixtures of values, of which a causal mask is not taken to save half. A mixture of experts costs less: all its
    experts are counted.
    """
    return 2 * parameters + 4 * blocks * context * d_attention


def student_cost(student: StudentPlan, config: TrainConfig, device: str) -> StudentCost:
    """Return what one student takes, from its sizes alone.

    A product `x @ W` costs as much again for the gradient in W and, where x needs one, in x. What the MLP gave needs
    none, so maps that read it cost twice their forward pass, and all others three times. The scores are the exception:
    only the k that were kept have a gradient, so that their backward pass touches k rows for each token.
    """
    network, skeleton = student.network, student.skeleton()
    forward: int = network.flops_per_token
    hidden: int = (3 if getattr(network, "encoder", "mlp") == "glu" else 2) * getattr(network, "d_hidden", 0)
    # The first of the maps is the scorer. Kinds that have none all the same are charged for a gradient too many.
    reading_x = 2 * sum(linear.weight.numel() for linear in skeleton.input_maps()[1:])
    scores = 2 * network.num_latents * network.d_in
    weights = list(skeleton.parameters())
    parameters = sum(weight.numel() for weight in weights)
    rows = min(config.micro_batch_tokens or config.batch_tokens, config.batch_tokens)
    active = random_ks(network.k)[-1] if student.random_k else network.k
    # Forward and backward each hold an activation; the last are values and indices of a code, and its transpose.
    widths = 2 * (network.d_in + 3 * network.d_out + hidden) + 8 * active
    block = BLOCK_BYTES.get(torch.device(device).type, BLOCK_BYTES_ELSEWHERE)
    # A block of scores (all of them, and once more to sort, where a whole batch is selected from), and the scorer's
    # weight cast or rearranged for the product.
    scores_held = rows * network.num_latents * FLOAT
    if getattr(network, "selection", TopK.name) == BatchTopK.name:
        block = scores_held = 2 * scores_held
    scoring = min(scores_held, block) + network.num_latents * network.d_in * FLOAT
    return StudentCost(
        parameters=parameters,
        forward=forward,
        training=forward + 2 * network.k * network.d_in + 2 * (forward - scores) - reading_x,
        step_bytes=FLOAT * (parameters + rows * widths) + scoring,
        copied_bytes=FLOAT * sum(weight.numel() for weight in weights if not weight.is_contiguous()),
    )


def costs_of(students: Sequence[StudentPlan], config: TrainConfig, device: str) -> list[StudentCost]:
    """Return what each of these students takes."""
    # Layers and seeds of one kind and k cost the same.
    known: dict[tuple[str, SparseLayerConfig], StudentCost] = {}
    for student in students:
        if (student.kind, student.network) not in known:
            known[student.kind, student.network] = student_cost(student, config, device)
    return [known[student.kind, student.network] for student in students]


def operations(workload: Workload) -> Operations:
    """Return what one token costs."""
    forward, training = (sum(getattr(cost, name) for cost in workload.costs) for name in ("forward", "training"))
    return Operations(workload.model_flops, forward, training)


def duration(workload: Workload) -> Duration:
    """Return how long training may take: its products, at `EFFICIENCY` of the speed that one product reaches now."""
    needed, resources = operations(workload), workload.resources
    speeds = {
        name: product_speed(resources.device, cast(torch.dtype, getattr(torch, name)))
        for name in {resources.precision, resources.model_precision}
    }
    for_one = needed.training / speeds[resources.precision] + needed.model / speeds[resources.model_precision]
    return Duration(workload.config.tokens * for_one / EFFICIENCY, speeds[resources.precision])


def memory(workload: Workload) -> Memory:
    """Return the bytes that a run takes on its device."""
    parameters, copied = (
        sum(getattr(cost, name) for cost in workload.costs) for name in ("parameters", "copied_bytes")
    )
    return memory_of(workload, parameters, max(copied, largest_step(workload)), workload.sites)


def host_memory(workload: Workload) -> int:
    """Return the bytes that a run takes in the host's memory beside a CUDA device's, 0 on any other device.

    A snapshot copies all weights and moments there, and a cache's shard is put together there.
    """
    if not _is_cuda(workload):
        return 0
    return 3 * FLOAT * sum(cost.parameters for cost in workload.costs) + workload.shard_bytes


def _is_cuda(workload: Workload) -> bool:
    return torch.device(workload.resources.device).type == "cuda"


def largest_step(workload: Workload) -> int:
    """Return the memory that comes and goes within the step of the student that needs most."""
    return max(cost.step_bytes for cost in workload.costs)


def memory_of(workload: Workload, parameters: int, step: int, layers: Collection[int]) -> Memory:
    """Return the bytes that students of a workload take with so many parameters in all, on some of its layers.

    Args:
        workload: All that was asked for.
        parameters: Parameters of the students.
        step: What comes and goes within the largest step.
        layers: Their blocks.
    """
    config, item, is_cuda = workload.config, workload.activation_dtype.itemsize, _is_cuda(workload)
    sites = [workload.sites[layer] for layer in layers]
    passed = forward_contexts(config, workload.resources.device) * config.context
    # The residual stream, its norm and its attention in and out, an MLP's hidden units, and what is handed on.
    widest = max(6 * site.d_in + 3 * site.d_hidden for site in sites)
    handed_on = sum(site.d_in + site.d_out for site in sites)
    batches = config.batch_tokens * (3 if workload.resources.prefetch else 1)
    shard = 0 if is_cuda else workload.shard_bytes
    return Memory(
        weights=FLOAT * parameters,
        moments=2 * FLOAT * parameters,
        step=step + (CUDA_BYTES if is_cuda else 0),
        buffer=shard + buffer_bytes(config, sites, item) + batches * handed_on * item,
        model=workload.model_bytes,
        model_pass=passed * (widest + handed_on) * max(item, 4),
    )


def _parameters_to(model: torch.nn.Module, deepest: MlpSite) -> int:
    """Return the number of parameters of the blocks up to this MLP's; of the whole model where they do not show."""
    before, *found = re.split(rf"\.{deepest.layer}(?![0-9])", deepest.path, maxsplit=1)
    blocks = {f"{before}.{layer}." for layer in range(deepest.layer + 1)}
    depth = before.count(".") + 2
    counts = [
        weight.numel()
        for name, weight in model.named_parameters()
        if not found or ".".join(name.split(".")[:depth]) + "." in blocks
    ]
    return sum(counts)
