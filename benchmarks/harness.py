"""What the benchmarks share: interleaved timing, memory in a process of its own, and reports that say where and when.

Scripts in this folder import it by its plain name, since Python puts a script's own folder on its path.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.table import Table

from mxd.allocator import keep_freed_memory

# As every command of `mxd` does, before PyTorch first allocates; for whoever's tensors.
keep_freed_memory()

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
REPORTED_VERSIONS = ("mxd", "torch", "transformers", "triton", "eai-sparsify", "sae-lens")


class Timing(NamedTuple):
    """Seconds of one call."""

    wall: float
    cpu: float


def synchronize() -> None:
    """Wait until an accelerator has done what it was asked to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measure(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[Timing]]:
    """Call each in turn, round after round, so that a machine that is busy is busy for all of them.

    The first `warmup` rounds, in which optimisers allocate their state, are not counted.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in calls}
    for round_ in range(rounds + warmup):
        for name, call in calls.items():
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            synchronize()
            if round_ >= warmup:
                timings[name].append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return timings


def median_wall(timings: Sequence[Timing]) -> float:
    """Return the median of the clock's seconds."""
    return statistics.median(timing.wall for timing in timings)


def peak_bytes() -> int:
    """Return the most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def number_from_own_process(*extra_arguments: str) -> int:
    """Run this very command again with more arguments, and return the number that it prints.

    Ask for memory before anything large is built: on Linux a process inherits the peak of the one that started it.
    """
    command = [sys.executable, *sys.argv, *extra_arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def machine() -> dict[str, object]:
    """Describe what this runs on and when, without a name that only this machine has."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    described: dict[str, object] = {"date": datetime.date.today().isoformat()}
    commit = _commit()
    if commit is not None:
        described["commit"] = commit
    described |= {
        "cpu": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
        described["driver"] = _driver()
    for package in REPORTED_VERSIONS:
        try:
            described[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return described


def _commit() -> str | None:
    """Return the commit of the mxd that is measured, with a `+` where more than results differs from it.

    None where git or the repository is not there, or mxd was installed from elsewhere.
    """
    measured = importlib.util.find_spec("mxd")
    is_ours = measured is not None and Path(measured.origin or "").resolve().is_relative_to(REPOSITORY)
    # An unpacked archive, within whatever other repository, has no commit of its own.
    if not is_ours or not (REPOSITORY / ".git").exists():
        return None
    git = ["git", "--no-optional-locks", "-C", str(REPOSITORY)]
    try:
        commit, changes = (
            subprocess.run([*git, *arguments], check=True, capture_output=True, text=True).stdout.strip()
            for arguments in (
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if changes else commit


def _driver() -> str:
    """Return the version of NVIDIA's driver, or `unknown`."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def print_table(rows: Sequence[Mapping[str, object]], title: str) -> None:
    """Print rows of equal keys as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)


def write_report(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, object]],
    described: Mapping[str, object],
    details: Mapping[str, object],
    figure: Figure | None = None,
    folder: Path = RESULTS,
) -> None:
    """Write `<name>.json` (everything), `<name>.md` (the table) and, where there is a figure, `<name>.png`.

    Args:
        name: Name of the files, which a later run replaces.
        title: What was measured.
        rows: The table; all rows have the same keys.
        described: `machine()`, taken before the measurement.
        details: Whatever else a reader needs to judge the table.
        figure: The plot.
        folder: Where the files go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *arguments])
    content = {"title": title, "command": command, "machine": described, **details, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    header = list(rows[0])
    lines = [
        f"# {title}",
        "",
        f"    {command}",
        "",
        ", ".join(f"{key} {value}" for key, value in described.items()),
        "",
        "| " + " | ".join(header) + " |",
        "|" + "|".join("---" if isinstance(value, str) else "---:" for value in rows[0].values()) + "|",
        *("| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows),
    ]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    if figure is not None:
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")


def plain_log_ticks(panel: Axes, experts: Sequence[int]) -> None:
    """Give a panel a logarithmic x-axis with these ticks and y-labels without powers, which our style does not set."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(experts, [str(count) for count in experts], size=8)
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
