"""A real browser for tests of pages, and what is asked of every page in it."""

import importlib.util
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
SCRIPT = "<script>document.title = 'broken'; window.broken = 1</script>"

NEEDED = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine's path"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
]
"""Marks of a test that opens a browser."""


@contextmanager
def chromium() -> "Generator[Browser, None, None]":
    """Open a browser for as long as this is open."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield opened
        opened.close()


@contextmanager
def watched_page(browser: "Browser") -> "Generator[Page, None, None]":
    """Open a page, and assert at its end that nothing went wrong on it and that it asked for nothing elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if _is_wrong(message) else None)
    context.on("request", lambda sent: complaints.append(sent.url) if _is_elsewhere(sent.url) else None)
    yield opened
    context.close()
    assert not complaints, complaints


def _is_elsewhere(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "file:///", "data:,"))


def _is_wrong(message: "ConsoleMessage") -> bool:
    # The browser itself reports an answer that says what does not fit.
    return message.type == "error" and "status of 400" not in message.text


def visit(page: "Page", url: str) -> None:
    """Open an address as if nothing had been open, and wait until it is drawn."""
    page.goto("about:blank")
    page.goto(url)
    page.wait_for_selector("html[data-shown]")


def shoot(page: "Page", name: str) -> None:
    """Keep a picture where somebody asked for them: MXD_SCREENSHOTS names the folder."""
    folder = os.environ.get("MXD_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def unbroken(page: "Page") -> None:
    """Assert that no text of a model, a corpus or a person has become more than text."""
    assert page.evaluate("() => window.broken") is None
    assert page.title().endswith("mxd explorer")
    assert page.locator("main img, main script, main b b").count() == 0
