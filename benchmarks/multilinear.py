"""Time and memory of multilinear mixtures against nn.Linear of as many parameters and a dense mixture with matrices.

    python benchmarks/multilinear.py

Forward and backward of one layer, 256 → 3072, for 256 inputs. CP and tensor-ring mixtures have as many parameters as
the linear layer, gate included; the dense mixture has a matrix for each expert and is measured as long as it has at
most 64. Times are the processor's, of one thread, so that a busy machine changes little. Memory is the peak of a
process of its own that runs two steps, less that of one that builds nothing.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from entmax import entmax15 as package_entmax15
from torch import Tensor, nn

from harness import (
    Timing,
    machine,
    measure,
    number_from_own_process,
    peak_bytes,
    plain_log_ticks,
    print_table,
    write_report,
)
from mxd.evaluation.drawing import add_legend, figure
from mxd.multilinear import (
    CPMixture,
    CPMixtureConfig,
    ExpertGate,
    TRMixture,
    TRMixtureConfig,
    entmax15,
    matched_rank,
    ranks_of,
)

D_IN, D_OUT, INPUTS = 256, 3072, 256
NUM_EXPERTS = (16, 64, 256, 1024, 2048)
MOST_MATRICES = 64
LAYERS = ("linear", "cp", "tr", "matrices")
STYLES = {
    "linear": ("nn.Linear", "#667080", "x"),
    "cp": ("CP", "#0072b2", "o"),
    "tr": ("Tensor ring", "#d55e00", "s"),
    "matrices": ("Dense mixture with matrices", "#cc79a7", "^"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MatrixMixture(nn.Module):
    """The same gate, and a whole matrix for each expert."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.gate = ExpertGate(D_IN, (num_experts,), normalization="layer")
        self.weight = nn.Parameter(torch.empty(num_experts, D_IN, D_OUT).uniform_(-(D_IN**-0.5), D_IN**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self.gate(x)[0].to(self.weight.dtype)
        return (coefficients[:, :, None] * x[:, None]).flatten(1) @ self.weight.flatten(0, 1)


def build(layer: str, num_experts: int) -> nn.Module:
    if layer == "linear":
        return nn.Linear(D_IN, D_OUT)
    if layer == "matrices":
        return MatrixMixture(num_experts)
    if layer == "cp":
        rank = matched_rank("cp", D_IN, D_OUT, (num_experts,)).rank
        return CPMixture(CPMixtureConfig(d_in=D_IN, d_out=D_OUT, num_experts=(num_experts,), rank=rank))
    ranks = ranks_of("tr", matched_rank("tr", D_IN, D_OUT, (num_experts,)).rank, 1)
    return TRMixture(TRMixtureConfig(d_in=D_IN, d_out=D_OUT, num_experts=(num_experts,), ranks=ranks))


def step_of(layer: str, num_experts: int, dtype: torch.dtype) -> Callable[[], object]:
    torch.manual_seed(0)
    module = build(layer, num_experts).to(dtype)
    for name, parameter in module.named_parameters():
        if "W_gate" in name:
            nn.init.normal_(parameter, std=0.02)
    x = torch.randn(INPUTS, D_IN, dtype=dtype)

    def step() -> None:
        module.zero_grad()
        module(x).square().mean().backward()

    return step


def median_cpu(timings: Sequence[Timing]) -> float:
    """Return the median of the processor's seconds."""
    return statistics.median(timing.cpu for timing in timings)


def measured() -> list[tuple[str, int]]:
    cases = [(layer, count) for layer in LAYERS[1:] for count in NUM_EXPERTS]
    return [("linear", 1), *(case for case in cases if case[0] != "matrices" or case[1] <= MOST_MATRICES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", nargs=3, metavar=("LAYER", "EXPERTS", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        layer, count, dtype = args.memory_of
        if layer != "nothing":
            step = step_of(layer, int(count), DTYPES[dtype])
            step()
            step()
        print(peak_bytes())
        sys.exit()
    described = machine()
    floor = number_from_own_process("--memory-of", "nothing", "1", "float32")
    memory = {
        (name, *case): number_from_own_process("--memory-of", case[0], str(case[1]), name) - floor
        for name in DTYPES
        for case in measured()
    }
    rows: list[dict[str, object]] = []
    for name, dtype in DTYPES.items():
        steps = {case: step_of(*case, dtype) for case in measured()}
        timings = measure({f"{layer} {count}": steps[layer, count] for layer, count in steps}, args.rounds)
        linear = median_cpu(timings["linear 1"])
        for layer, count in measured():
            seconds = median_cpu(timings[f"{layer} {count}"])
            with torch.device("meta"):
                parameters = sum(parameter.numel() for parameter in build(layer, count).parameters())
            rows.append(
                {
                    "layer": STYLES[layer][0],
                    "experts": count,
                    "type": name,
                    "parameters": parameters,
                    "forward and backward, ms": 1000 * seconds,
                    "of nn.Linear": seconds / linear,
                    "peak memory, MB": max(0.0, memory[name, layer, count] / 1e6),
                }
            )
    gates = entmax_rows(args.rounds)
    print_table(rows, "multilinear")
    print_table(gates, "gates")
    draw_and_write(rows, gates, described)


def draw_and_write(
    rows: Sequence[Mapping[str, Any]], gates: Sequence[Mapping[str, object]], described: Mapping[str, object]
) -> None:
    title = "One layer, 256 → 3072, for 256 inputs: forward and backward"
    with figure(
        8.6, 3.0, title=title, subtitle="equal parameters but for the matrices; one thread", legend=True
    ) as drawing:
        panels = drawing.subplots(1, 3)
        for panel, (key, dtype, label) in zip(
            panels,
            (
                ("forward and backward, ms", "float32", "float32, ms"),
                ("forward and backward, ms", "bfloat16", "bfloat16, ms"),
                ("peak memory, MB", "float32", "float32, peak MB"),
            ),
            strict=True,
        ):
            for name, colour, marker in STYLES.values():
                chosen = [row for row in rows if row["layer"] == name and row["type"] == dtype]
                if name == "nn.Linear":
                    panel.axhline(chosen[0][key], color=colour, linestyle="--", linewidth=1, label=name)
                    continue
                at = [row["experts"] for row in chosen]
                panel.plot(at, [row[key] for row in chosen], color=colour, marker=marker, markersize=4, label=name)
            panel.set_yscale("log")
            plain_log_ticks(panel, [16, 64, 256, 2048])
            panel.set_xlabel("experts")
            panel.set_ylabel(label)
            panel.yaxis.grid(True)
        add_legend(drawing, list(panels[:1]))
        write_report("multilinear_cpu", title, rows, {**described, "threads": 1}, {"gates": gates}, drawing)


def entmax_rows(rounds: int) -> list[dict[str, object]]:
    """Time the gate's function alone, forward and backward, on 1024 rows of scores."""
    rows: list[dict[str, object]] = []
    for count in (64, 256, 2048):
        scores = torch.randn(1024, count, generator=torch.Generator().manual_seed(0)).requires_grad_()
        calls = {
            "mxd entmax15, ms": lambda scores=scores: entmax15(scores).square().sum().backward(),
            "entmax package, ms": lambda scores=scores: package_entmax15(scores, dim=-1).square().sum().backward(),
            "softmax, ms": lambda scores=scores: scores.softmax(-1).square().sum().backward(),
        }
        found = measure(calls, rounds)
        rows.append({"scores": count} | {name: 1000 * median_cpu(found[name]) for name in calls})
    return rows


if __name__ == "__main__":
    main()
