"""The steps that gpu.py times: ours of each kind, the same mathematics written densely, bare products, and peers'.

Each is a variant of `variants.py` on the GPU, with weights and optimiser of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from agreement import agreement
from mxd.evaluation.drawing import GRID, INK, MUTED, figure
from mxd.kernels import backends
from mxd.kernels.backends import Backend
from variants import (
    COLOURS,
    OTHER_COLOUR,
    PEERS,
    VARIANTS,
    Dtype,
    Kind,
    Shape,
    Step,
    is_installed,
    make_batch,
    sparsify_dtype,
)

KINDS: tuple[Kind, ...] = ("mxd", "shared-transcoder", "transcoder")
KERNELS: tuple[Backend, ...] = ("torch", "triton")
TOLERANCE = 1e-2
"""Largest relative error of a gradient in float32: the products of blocks and of whole matrices differ in their last
bits, so that a few of a batch's latents are chosen otherwise among equals."""


class GpuStep(NamedTuple):
    """One step: a row of the table."""

    kind: Kind
    variant: str
    dtype: Dtype
    kernels: Backend | None = None
    """Kernels of mxd's own step."""
    remark: str = ""
    """Who chose the type, where that was another library."""

    @property
    def name(self) -> str:
        kernels = "" if self.kernels is None else f", {self.kernels} kernels"
        return f"{self.kind}: {'ours' if self.variant == 'mxd' else self.variant}, {self.dtype}{self.remark}{kernels}"


def planned_steps(device: str) -> list[GpuStep]:
    """Return what is timed, and say what is left out.

    Ours, dense and products are in bfloat16. Other libraries have steps as wide as our transcoder's and run in the type
    that they choose themselves; beside those that choose float32, ours runs in it too.
    """
    steps: list[GpuStep] = []
    for kind in KINDS:
        steps += [GpuStep(kind, "mxd", "bfloat16", kernels) for kernels in KERNELS]
        steps += [GpuStep(kind, name, "bfloat16") for name in ("dense", "products")]
    steps += [GpuStep("transcoder", "mxd", "float32", kernels) for kernels in KERNELS]
    peers = [
        GpuStep("transcoder", "sparsify", sparsify_dtype(device), remark=" (its own choice)"),
        GpuStep("transcoder", "sae-lens SAE", "float32", remark=" (its default)"),
        GpuStep("transcoder", "sae-lens SAE", "bfloat16", remark=" (its option autocast)"),
        GpuStep("transcoder", "sae-lens sparse SAE", "float32", remark=" (its default)"),
    ]
    missing = [name for name, variant in PEERS.items() if not is_installed(variant)]
    if missing:
        print(f'Left out, since not installed: {", ".join(missing)}. To have them: pip install -e ".[bench]"')
    return steps + [step for step in peers if step.variant not in missing]


def make_step(planned: GpuStep, shape: Shape) -> Step:
    """Return a step with weights, batch and optimiser of its own."""
    variant = VARIANTS[planned.kind][planned.variant]
    step = variant.step(variant.weights(shape), make_batch(shape), planned.dtype)
    kernels = planned.kernels
    if kernels is None:
        return step

    def with_kernels() -> None:
        with backends.using_backend(kernels):
            step()

    return with_kernels


def make_steps(planned: Sequence[GpuStep], shapes: Mapping[Kind, Shape]) -> dict[GpuStep, Step]:
    """Return the steps, without those of other libraries that do not run here, of which a line says why."""
    steps: dict[GpuStep, Step] = {}
    for one in planned:
        step = make_step(one, shapes[one.kind])
        try:
            step()
        # Whatever another library raises on a device that nobody tried it on must not cost the other results.
        except Exception as error:
            if VARIANTS[one.kind][one.variant].package is None:
                raise
            print(f"Left out: {one.name}, which ends with {type(error).__name__}: {error}")
            continue
        steps[one] = step
    return steps


def complaints(shapes: Mapping[Kind, Shape]) -> list[str]:
    """Return a sentence for each of our gradients, by either kernels, that is not the dense one's in float32."""
    found: list[str] = []
    for kind, shape in shapes.items():
        for kernels in KERNELS:
            with backends.using_backend(kernels):
                errors = agreement(shape, ("float32",), tolerance=TOLERANCE).complaints
            found += [f"{kind}, {kernels} kernels: {error}" for error in errors]
    return found


def ratios(seconds: Mapping[str, Sequence[float]], steps: Sequence[GpuStep]) -> dict[str, float]:
    """Return the medians over rounds of ratios within a round, of our faster kernels and what is beside them."""
    found: dict[str, float] = {}
    for other in steps:
        if other.variant == "mxd":
            continue
        ours = [step for step in steps if step[:3] == (other.kind, "mxd", other.dtype)]
        if ours:
            best = min(ours, key=lambda step: median(seconds[step.name]))
            pairs = zip(seconds[best.name], seconds[other.name], strict=True)
            found[f"{best.name} / {other.name}"] = median(mine / its for mine, its in pairs)
    return found


def draw(seconds: Mapping[str, Sequence[float]], variant_of: Callable[[str], str], title: str, subtitle: str) -> Figure:
    """Draw each as a bar; a lighter one is bfloat16, a thin line spans the rounds."""
    with figure(10, 0.3 * len(seconds) + 0.9, title=title, subtitle=subtitle) as drawing:
        panel = drawing.subplots()
        for place, (name, rounds) in enumerate(seconds.items()):
            milliseconds = [1000 * taken for taken in rounds]
            share = 1.0 if "float32" in name else 0.5
            colour = [1 - share * (1 - part) for part in to_rgb(COLOURS.get(variant_of(name), OTHER_COLOUR))]
            panel.barh(place, median(milliseconds), height=0.66, color=colour)
            panel.plot([min(milliseconds), max(milliseconds)], [place, place], color=INK, lw=1.1)
            panel.annotate(
                f"{median(milliseconds):,.2f} ms",
                (max(milliseconds), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        panel.set_yticks(range(len(seconds)), list(seconds))
        panel.set_ylim(len(seconds) - 0.4, -0.6)
        panel.set_title("Time of a step (median; the line spans all rounds; pale: bfloat16)")
        panel.set_xlim(0, 1.12 * panel.dataLim.x1)
        panel.set_xlabel("milliseconds", color=MUTED)
        panel.grid(axis="x", color=GRID)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        return drawing
