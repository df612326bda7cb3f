"""What `mxd explore` costs: collecting against its two unavoidable parts, the database's size, and how fast pages open.

    python benchmarks/explorer.py
    python benchmarks/explorer.py --tokens 2M

Collecting: 20,000 latents (a transcoder, k 32, of the bundled model's middle layer, left as it was drawn, so that most
all of them fire and have something to store) on the standard library's text. The same contexts are then run through
the model and the layer alone, chunk by chunk; the ratio is the seconds of `collect` over the sum of the two. Seconds
of this process's own processor time are given too, which other work on the machine disturbs less.

Pages: the collected latents five times over, 100,000 in all, are served by `mxd explore` to a real Chromium. A page has
opened when all of it, with its data, has been drawn: the first frame after the page has put its content in place. Each
time the whole document is loaded anew, in a tab that showed something else of the same server, so that the start of a
process of the browser's own for a new site is not counted. Processor milliseconds are those of the page's process and
of the server together (searches include opening the map first).
"""

import itertools
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import tyro
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from torch import nn

from harness import machine, print_table, write_report
from mxd.bundled import MODEL_NAME
from mxd.cli.numbers import COUNTS
from mxd.data.text import open_text
from mxd.data.tokens import packed_contexts
from mxd.evaluation.opening import load_run_model, read_finished_run
from mxd.evaluation.students import load_students
from mxd.explorer.collect import TOKENS_AT_ONCE, CollectConfig, collect
from mxd.explorer.rows import map_data
from mxd.models import mlp_pairs, vocabulary_size
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan

LAYER, LATENTS, K = 3, 20_000, 32
STUDENT = f"{LAYER}/transcoder-k{K}"
COPIES = 5
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
DRAWN = """
new MutationObserver(() => requestAnimationFrame(() => setTimeout(() => { window.drawnAt ??= performance.now(); })))
  .observe(document, { subtree: true, attributes: true, attributeFilter: ["data-shown"] });
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Time collecting and the pages."""

    tokens: int = 200_000
    """Tokens that are collected over."""
    rounds: int = 15
    """Times that each page is opened."""
    chromium: str = shutil.which("chromium") or ""
    """The browser."""
    keep: Path | None = None
    """Folder to leave the run and its database in; where they are there already, only the pages are timed."""
    name: str = "explorer_cpu"
    """Name of the report in results/."""


def make_run(folder: Path) -> Path:
    """Return a finished run of one student with many latents, hardly changed from how it was drawn."""
    config = TrainConfig(
        model=MODEL_NAME, text=("stdlib",), layer=(LAYER,), kind=("transcoder",), k=(K,), num_latents=LATENTS,
        tokens=8192, batch_tokens=4096, buffer_tokens=8192, eval_tokens=8192, device="cpu", threads=1,
        precision="float32", model_dtype="float32", lr=1e-9,
    )  # fmt: skip
    decompose(make_plan(config), folder / "run")
    return folder / "run"


def unavoidable(run: Path, tokens: int) -> dict[str, tuple[float, float]]:
    """Return wall and processor seconds of the model's pass and of the layer's step on the same contexts."""
    description = read_finished_run(run)
    language_model = load_run_model(run, description, None)
    model = cast("nn.Module", language_model.model)
    (student,) = load_students(run, description["students"])
    source = open_text(["stdlib"])
    documents = itertools.chain(source.documents(held_out=True), source.documents(held_out=False))
    contexts = packed_contexts(
        documents, "stdlib", language_model.tokenizer, context=128, num_tokens=tokens, vocab_size=vocabulary_size(model)
    ).contexts
    seconds = {"model": [0.0, 0.0], "layer": [0.0, 0.0]}
    with torch.no_grad():
        for part in contexts.split(TOKENS_AT_ONCE // contexts.shape[1]):
            clock = time.perf_counter(), time.process_time()
            x = mlp_pairs(model, part, [LAYER])[LAYER].x.flatten(0, 1)
            middle = time.perf_counter(), time.process_time()
            student.candidate.network(x)
            end = time.perf_counter(), time.process_time()
            for place in range(2):
                seconds["model"][place] += middle[place] - clock[place]
                seconds["layer"][place] += end[place] - middle[place]
    return {name: (pair[0], pair[1]) for name, pair in seconds.items()}


def multiply(run: Path) -> None:
    """Make the run's database hold its latents several times over."""
    path = run / "explorer.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(latents)")]
        for copy in range(1, COPIES):
            shifted = ", ".join(f"latent + {copy * LATENTS}" if name == "latent" else name for name in columns)
            connection.execute(f"INSERT INTO latents SELECT {shifted} FROM latents WHERE latent < {LATENTS}")
            for table, own in {"peaks": "context", "token_latents": "token"}.items():
                rest = "position, value" if table == "peaks" else "strength"
                order = f"student, {own}, " + ("" if table == "peaks" else "relation, ") + f"latent + {copy * LATENTS}"
                connection.execute(f"INSERT INTO {table} SELECT {order}, {rest} FROM {table} WHERE latent < {LATENTS}")
        facts: dict[str, Any] = json.loads(connection.execute("SELECT facts FROM students").fetchone()[0])
        facts["num_latents"] *= COPIES
        connection.execute(
            "UPDATE students SET facts = ?, map = ?", (json.dumps(facts), json.dumps(map_data(connection, 0)))
        )


class Opened(NamedTuple):
    """How a page opened, each time."""

    milliseconds: list[float]
    processor: float
    """Milliseconds of a processor that the page's process and the server took, on average."""


class Processors:
    """How much of a processor the page and the server have had."""

    def __init__(self, page: Page, server: int) -> None:
        self._devtools = page.context.new_cdp_session(page)
        self._devtools.send("Performance.enable")
        self._server = Path(f"/proc/{server}/stat")

    def milliseconds(self) -> float:
        found = {entry["name"]: entry["value"] for entry in self._devtools.send("Performance.getMetrics")["metrics"]}
        ticks = self._server.read_text().rpartition(")")[2].split()[11:13] if self._server.exists() else []
        return 1000 * float(found["ProcessTime"]) + 1000 * sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def repeated(processors: Processors, rounds: int, once: Callable[[], float]) -> Opened:
    once()
    before = processors.milliseconds()
    times = [once() for _ in range(rounds)]
    return Opened(times, (processors.milliseconds() - before) / rounds)


def opening_times(options: Options, run: Path) -> dict[str, Opened]:
    """Return how each page opened, the first time left out."""
    command = [sys.executable, "-m", "mxd", "explore", str(run), "--port", "8921"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = next(line for line in server.stderr if line.startswith("Open ")).split()[1]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=options.chromium, args=list(ARGUMENTS))
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            page.add_init_script(DRAWN)
            routes = {
                "map": f"#/map/{STUDENT}",
                "latent": f"#/latent/{STUDENT}/{busiest(run)}",
                "text": f"#/text/{STUDENT}",
                "steering bench": f"#/steer/{STUDENT}/{busiest(run)}",
                "run": f"#/run/{STUDENT}",
            }
            processors = Processors(page, server.pid)
            page.goto(url)
            times = {
                name: repeated(processors, options.rounds, partial(open_once, page, url + route))
                for name, route in routes.items()
            }
            for name, query in {"token": "self", "text": "if not isinst"}.items():
                search = partial(search_once, page, url, query)
                times[f"search on the map ({name})"] = repeated(processors, options.rounds, search)
            browser.close()
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()
    return times


def busiest(run: Path) -> int:
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection:
        query = "SELECT latent FROM latents ORDER BY length(examples) DESC LIMIT 1"
        return int(connection.execute(query).fetchone()[0])


def open_once(page: Page, url: str) -> float:
    page.goto(url.partition("#")[0] + "page/explorer.css")
    page.goto(url)
    return float(page.wait_for_function("() => window.drawnAt").json_value())


def search_once(page: Page, url: str, query: str) -> float:
    """Return the milliseconds from a text in the field to the results, the pause for typing (120 ms) left out."""
    open_once(page, f"{url}#/map/{STUDENT}")
    page.evaluate(
        """(query) => {
          const field = document.getElementById("query"), results = document.querySelector(".results");
          const note = () => { window.foundAt ??= performance.now(); };
          const watcher = new MutationObserver(() => requestAnimationFrame(() => setTimeout(note)));
          watcher.observe(results, { childList: true });
          field.value = query;
          window.typedAt = performance.now() + 120;
          field.dispatchEvent(new Event("input"));
        }""",
        query,
    )
    page.wait_for_function("() => window.foundAt")
    return float(page.evaluate("() => window.foundAt - window.typedAt"))


def time_collecting(options: Options, run: Path) -> None:
    described = machine()
    wall, processor = time.perf_counter(), time.process_time()
    config = CollectConfig(text=("stdlib",), tokens=options.tokens)
    collect(run, run / "explorer.sqlite", config, Console(stderr=True))
    whole = time.perf_counter() - wall, time.process_time() - processor
    size = (run / "explorer.sqlite").stat().st_size
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection:
        text_bytes = connection.execute("SELECT sum(length(tokens) + length(text)) FROM contexts").fetchone()[0]
        fired = connection.execute("SELECT count(*) FROM latents WHERE firings > 0").fetchone()[0]
    parts = unavoidable(run, options.tokens)
    both = [sum(pair[place] for pair in parts.values()) for place in range(2)]
    rows: list[dict[str, object]] = [
        {"what": "model pass, s", "wall": parts["model"][0], "processor": parts["model"][1]},
        {"what": "layer's step, s", "wall": parts["layer"][0], "processor": parts["layer"][1]},
        {"what": "collecting, s", "wall": whole[0], "processor": whole[1]},
        {"what": "collecting / (pass + step)", "wall": whole[0] / both[0], "processor": whole[1] / both[1]},
    ]
    details = {
        "tokens": options.tokens, "latents": LATENTS, "k": K, "latents that fired": fired, "database MB": size / 1e6,
        "of it text MB": text_bytes / 1e6, "load_average_after": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    title = f"mxd explore: {LATENTS:,} latents ({fired:,} fire) over {options.tokens:,} tokens: {size / 1e6:.0f} MB"
    print_table(rows, title)
    write_report(options.name, title, rows, described, details)


def time_pages(options: Options, run: Path) -> None:
    described = machine()
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection:
        counts = connection.execute("SELECT count(*), sum(firings > 0) FROM latents").fetchone()
    times = opening_times(options, run)
    rows: list[dict[str, object]] = [
        {
            "page": name,
            "fastest ms": min(found.milliseconds),
            "median ms": statistics.median(found.milliseconds),
            "slowest ms": max(found.milliseconds),
            "processor ms": found.processor,
        }
        for name, found in times.items()
    ]
    size = (run / "explorer.sqlite").stat().st_size
    each = {name: found.milliseconds for name, found in times.items()}
    details = {
        "rounds": options.rounds, "database MB": size / 1e6, "latents that fired": counts[1], "each": each,
        "load_average_after": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    title = f"mxd explore: opening pages of {counts[0]:,} latents in Chromium"
    print_table(rows, title)
    write_report(f"{options.name}_pages", title, rows, described, details)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) if options.keep is None else options.keep
        if not (run / "run").exists():
            make_run(run)
            time_collecting(options, run / "run")
            multiply(run / "run")
        time_pages(options, run / "run")


if __name__ == "__main__":
    main(tyro.cli(Options, registry=COUNTS))
