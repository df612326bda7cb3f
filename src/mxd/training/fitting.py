"""Whether a run fits into memory, and if it does not, which options would make it fit."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch

from mxd.memory import available_memory
from mxd.quantities import gib
from mxd.training.config import TrainConfig, values_of
from mxd.training.estimate import Workload, costs_of, host_memory, largest_step, memory, memory_of
from mxd.training.grid import plan_students

_SMALLER = ("buffer_tokens", "micro_batch_tokens", "batch_tokens", "num_latents", "expansion")
"""Settings that make a run smaller whatever its grid, the ones first that change least of what is learnt."""
_SMALLEST_BATCH = 64
"""Tokens below which no batch is proposed."""


class Grid(NamedTuple):
    """A part of what was asked for: the first layers, kinds, ks and seeds of each list, with all settings."""

    layers: tuple[int, ...]
    """Blocks."""
    kinds: tuple[str, ...]
    """Kinds of layer."""
    ks: tuple[int, ...]
    """Active latents."""
    seeds: int
    """Number of seeds."""
    students: int
    """How many students these are."""
    total: int
    """Bytes that they take, with everything beside them."""


def largest_grid(workload: Workload, available: int) -> Grid | None:
    """Return the largest grid that fits into so many bytes, or None where none does.

    It has the first layers, kinds, ks and seeds of those that were asked for. Every kind stays if any grid with every
    kind fits, since kinds are what is compared; then the number of students decides, then the number of ks.
    """
    config = workload.config
    held = workload.model_bytes if workload.model_is_loaded else 0
    sizes, step = (len(config.layers), len(config.kind), len(config.k), config.seeds), largest_step(workload)
    # Students, parameters and copied bytes of every part, as sums over its first layers, kinds, ks and seeds.
    sums = torch.zeros(*sizes, 3, dtype=torch.int64)
    for student, cost in zip(workload.students, workload.costs, strict=True):
        # With selection l1 there is one student for all ks, whose k is the number of its latents.
        k = 0 if student.l1_coefficient else config.k.index(student.network.k)
        place = config.layers.index(student.layer), config.kind.index(student.kind), k, student.seed - config.seed
        sums[place] += torch.tensor([1, cost.parameters, cost.copied_bytes])
    for axis in range(len(sizes)):
        sums = sums.cumsum(axis)
    best: tuple[tuple[bool, int, int], Grid] | None = None
    for layers, kinds, ks, seeds in product(*(range(1, size + 1) for size in sizes)):
        students, parameters, copied = sums[layers - 1, kinds - 1, ks - 1, seeds - 1].tolist()
        total = memory_of(workload, parameters, max(copied, step), config.layers[:layers]).total
        rank = (kinds == len(config.kind), students, ks)
        if total - held <= available and (best is None or rank > best[0]):
            best = rank, Grid(config.layers[:layers], config.kind[:kinds], config.k[:ks], seeds, students, total)
    return None if best is None else best[1]


def require_memory(workload: Workload) -> int | None:
    """Check that a run fits into the memory that is available now, and return that; None where it cannot be told.

    What is returned is the device's; with a CUDA device the host's is checked too.

    Raises:
        ValueError: If it does not fit; the sentence has the estimate, the largest grid that fits, and the options with
            which all of it would.
    """
    _require_host_memory(workload)
    available = available_memory(workload.resources.device)
    needed = memory(workload)
    still_needed = needed.total - (workload.model_bytes if workload.model_is_loaded else 0)
    if available is None or still_needed <= available:
        return available
    remedies = [_smaller_grid(workload, available), _smaller_settings(workload, available)]
    remedy = "; or ".join(words for words in remedies if words) or (
        "not even one student of them fits, nor does all of it with one smaller setting: lower several of "
        "--batch-tokens, --buffer-tokens, --expansion and --num-latents, or run the model in a narrower type "
        "(--model-dtype bfloat16)"
    )
    raise ValueError(
        f"what was asked for must fit in memory; an estimated {gib(still_needed)} are needed"
        f"{' beside the model' if workload.model_is_loaded else ''} and {gib(available)} are available on "
        f"{workload.resources.device}; {remedy}."
    )


def _smaller_grid(workload: Workload, available: int) -> str:
    grid = largest_grid(workload, available)
    if grid is None:
        return ""
    words = [f"--{name} {' '.join(map(str, values))}" for name, values in _options(grid).items()]
    return (
        f"the largest grid of them that fits is {' '.join(words)} ({grid.students} of {len(workload.students)} "
        "students): ask for that and the rest in further runs"
    )


def _options(grid: Grid) -> dict[str, tuple[object, ...]]:
    return {"layer": grid.layers, "kind": grid.kinds, "k": grid.ks, "seeds": (grid.seeds,)}


def _smaller_settings(workload: Workload, available: int) -> str:
    """Return which of the options of `_SMALLER` make all that was asked for fit, each alone, with the largest value."""
    fitting = [words for name in _SMALLER if (words := _fitting_value(workload, available, name)) is not None]
    return f"all of it fits with {', or with '.join(fitting)}" if fitting else ""


def _fitting_value(workload: Workload, available: int, name: str) -> str | None:
    """Return an option with its largest value, halved and halved again, with which all fits; None where none does."""
    held = workload.model_bytes if workload.model_is_loaded else 0
    for value in _smaller_values(workload.config, name):
        try:
            smaller = _with_setting(workload, name, value)
        except ValueError:
            # Fewer latents than k, say.
            return None
        if memory(smaller).total - held <= available:
            return f"--{name.replace('_', '-')} {' '.join(map(str, value if isinstance(value, tuple) else (value,)))}"
    return None


def _smaller_values(config: TrainConfig, name: str) -> Iterator[int | tuple[int, ...]]:
    given = [value for value in values_of(config.num_latents) if value is not None]
    if name == "num_latents":
        # Where some are matched to parameters, it is the expansion that makes those smaller.
        if given and len(given) == len(values_of(config.num_latents)):
            yield from (tuple(value >> halved for value in given) for halved in range(1, min(given).bit_length()))
        return
    least = {"buffer_tokens": config.batch_tokens, "expansion": 1}.get(name, _SMALLEST_BATCH)
    starts = {"micro_batch_tokens": config.micro_batch_tokens or config.batch_tokens}
    start: int = starts.get(name) or getattr(config, name)
    if (name == "expansion" and given) or (name == "batch_tokens" and config.micro_batch_tokens is not None):
        return
    yield from (start >> halved for halved in range(1, start.bit_length()) if start >> halved >= least)


def _with_setting(workload: Workload, name: str, value: int | tuple[int, ...]) -> Workload:
    config = replace(workload.config, **{name: value})
    students = plan_students(config, workload.sites) if name in ("num_latents", "expansion") else workload.students
    costs = costs_of(students, config, workload.resources.device)
    return replace(workload, config=config, students=students, costs=costs)


def _require_host_memory(workload: Workload) -> None:
    needed = host_memory(workload)
    available = available_memory("cpu") if needed else None
    if available is not None and needed > available:
        raise ValueError(
            f"what was asked for must fit in the host's memory too, which holds the copy of which a snapshot is written"
            f"{' and a shard of the cache' if workload.shard_bytes else ''}: an estimated {gib(needed)} are needed and "
            f"{gib(available)} are available; ask for fewer layers, kinds, ks or seeds and the rest in further runs."
        )
