"""Photograph the explorer's pages for docs/explorer.md, in a real browser.

    mxd demo && python scripts/explorer_pictures.py demo-run --latent 3/mxd-k32/172

Writes docs/images/explorer-*.png; the pages are those that `mxd explore` serves.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from playwright.sync_api import Page, sync_playwright

ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
CODE = """\
def read(self, path):
    '''Return the text of a file.'''
    if not os.path.exists(path):
        raise FileNotFoundError(path)
"""
PROMPT = 'def read(self, path):\n    """Return'


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Photograph the pages of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A finished run."""
    latent: str = "3/mxd-k32/172"
    """The latent to show, as layer/student/number."""
    search: str = "default"
    """What to search for on the map."""
    steered: tuple[int, ...] = field(default=(172,))
    """Latents on the steering bench."""
    out: Path = Path(__file__).parent.parent / "docs" / "images"
    """Where the pictures go."""


def look_at_text(page: Page) -> None:
    page.fill("#text", CODE)
    page.click("form button")
    page.wait_for_selector(".typed [role=button]", timeout=120_000)
    page.locator(".typed [role=button]", has_text="Error").first.click()


def steer(page: Page) -> None:
    page.locator(".sliders input").first.fill("4")
    page.fill("#prompt", PROMPT)
    page.click("button:has-text('Write')")
    page.wait_for_selector("[role=status]:has-text('done')", timeout=120_000)


def shoot(page: Page, url: str, options: Options, name: str, height: int) -> None:
    student, _, number = options.latent.rpartition("/")
    routes = {
        "map": f"#/map/{student}",
        "latent": f"#/latent/{student}/{number}",
        "text": f"#/text/{student}",
        "steer": f"#/steer/{student}/{','.join(map(str, options.steered))}",
        "run": f"#/run/{student}",
    }
    page.goto("about:blank")
    page.goto(url + routes[name])
    page.wait_for_selector("html[data-shown]", timeout=60_000)
    if name == "map":
        page.fill("#query", options.search)
        page.wait_for_selector(".found h2:has-text('found')", timeout=60_000)
    elif name == "text":
        look_at_text(page)
    elif name == "steer":
        steer(page)
    width = page.viewport_size["width"] if page.viewport_size else 1180
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(300)


def main(options: Options) -> None:
    command = [sys.executable, "-m", "mxd", "explore", str(options.run), "--port", "8961"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = next(line for line in server.stderr if line.startswith("Open ")).split()[1]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(ARGUMENTS))
            for scheme, width, pictures in (
                ("light", 1180, {"map": 760, "latent": 900, "text": 760, "steer": 860}),
                ("dark", 1180, {"run": 900}),
                ("dark", 390, {"latent": 844}),
            ):
                page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
                for name, height in pictures.items():
                    shoot(page, url, options, name, height)
                    suffix = "-phone" if width < 600 else "-dark" if scheme == "dark" else ""
                    page.screenshot(path=options.out / f"explorer-{name}{suffix}.png")
                page.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


if __name__ == "__main__":
    main(tyro.cli(Options))
