"""`mxd explore` on the demo's run, in a real browser."""

import itertools
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from fastapi import FastAPI

from mxd.bundled import held_out_modules
from mxd.cli.demo import DEMO
from mxd.cli.explore import explore
from mxd.data.text import open_text
from mxd.explorer import server as serving_module
from mxd.explorer.collect import CollectConfig
from mxd.models import load_tokenizer
from mxd.training.decompose import decompose, make_plan
from tests.chromium import NEEDED, SCRIPT, chromium, shoot, unbroken, visit, watched_page
from tests.exploring import serving

if TYPE_CHECKING:
    from playwright.sync_api import Page

TOKENS_TRAINED, TOKENS_READ = 4096, 1024
STUDENTS = [f"3/{kind}-k{k}" for kind in DEMO.kind for k in DEMO.k]
STUDENT = STUDENTS[0]
NAMES = {
    "mxd": "MxD",
    "transcoder": "Transcoder",
    "skip-transcoder": "Skip transcoder",
    "shared-transcoder": "Shared transcoder",
}

pytestmark = NEEDED


class Shown(NamedTuple):
    """The demo's run, and where its pages are."""

    run: Path
    url: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """The demo's run, which saw fewer tokens, and what the command serves of it."""
    run = tmp_path_factory.mktemp("demo") / "demo-run"
    decompose(make_plan(replace(DEMO, tokens=TOKENS_TRAINED, threads=1)), run)
    handed: list[tuple[FastAPI, socket.socket]] = []

    def take(app: FastAPI, bound: socket.socket) -> None:
        handed.append((app, bound))

    with pytest.MonkeyPatch.context() as patch:
        # All but the loop that only Ctrl-C ends.
        patch.setattr(serving_module, "serve", take)
        explore(run, CollectConfig(tokens=TOKENS_READ), port=18721)
    [(app, bound)] = handed
    with serving(app, bound) as server:
        yield Shown(run, server.url)


@pytest.fixture(scope="module")
def page(demo: Shown) -> "Iterator[Page]":
    with chromium() as browser, watched_page(browser) as opened:
        yield opened


def fits_a_phone(page: "Page", name: str) -> None:
    shoot(page, f"demo-{name}")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360, name
    shoot(page, f"demo-phone-{name}")
    page.set_viewport_size({"width": 1280, "height": 860})


def one(run: Path, query: str, *values: object) -> int:
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection:
        return int(connection.execute(query, values).fetchone()[0])


def test_the_map_has_the_demos_students_and_a_dot_for_each_latent_that_fires(demo: Shown, page: "Page") -> None:
    visit(page, demo.url)
    choices = page.locator("#student option")
    assert [choices.nth(n).get_attribute("value") for n in range(choices.count())] == STUDENTS
    texts = choices.all_inner_texts()
    assert texts == [f"{NAMES[kind]} · layer 3 · K {k}" for kind in NAMES for k in (8, 32)]
    for number, student in enumerate(STUDENTS):
        visit(page, f"{demo.url}#/map/{student}")
        alive = one(demo.run, "SELECT count(*) FROM latents WHERE student = ? AND firings > 0", number)
        assert page.get_attribute("html", "data-drawn") == str(alive)
        assert alive > 12
        assert page.locator(".results li").count() == 12
    page.fill("#query", "self")
    page.wait_for_selector(".found h2:has-text('found')")
    assert any("self" in text for text in page.locator(".results .why").all_inner_texts())
    fits_a_phone(page, "map")
    unbroken(page)


def test_a_latents_contexts_are_of_the_standard_library_and_a_script_as_its_label_stays_text(
    demo: Shown, page: "Page"
) -> None:
    latent = one(demo.run, "SELECT latent FROM latents WHERE student = 0 ORDER BY firings DESC LIMIT 1")
    visit(page, f"{demo.url}#/latent/{STUDENT}/{latent}")
    source = open_text(["stdlib"], held_out_modules=held_out_modules())
    # As many documents as were read, and some more.
    text = "\n".join(document.text for document in itertools.islice(source.documents(held_out=True), 40))
    contexts = page.evaluate(
        """() => [...document.querySelectorAll(".example pre")].map((shown) => [...shown.children]
          .filter((token) => !token.matches(".cut")).map((token) => token.textContent.replaceAll("⏎", "")).join(""))"""
    )
    bos = load_tokenizer("bundled").bos_token
    within = [context for context in contexts if str(bos) not in context]
    assert len(within) >= 4
    for context in within:
        assert context in text
    assert page.locator(".example mark").count() == len(contexts)
    page.fill("#label", SCRIPT)
    page.click("form.label button")
    page.wait_for_selector("text=saved in the database")
    assert SCRIPT in page.inner_text("h1")
    fits_a_phone(page, "latent")
    visit(page, f"{demo.url}#/map/{STUDENT}")
    page.fill("#query", "<script>document")
    page.wait_for_selector(".results b")
    assert page.locator(".results b").all_inner_texts() == [SCRIPT]
    unbroken(page)


def test_a_typed_text_gives_the_experts_of_each_token_and_a_script_stays_text(demo: Shown, page: "Page") -> None:
    text = f"def read(self):\n    {SCRIPT}"
    tokenizer = load_tokenizer("bundled")
    for student, k in ((STUDENTS[0], 8), (STUDENTS[3], 32)):
        visit(page, f"{demo.url}#/text/{student}")
        page.fill("#text", text)
        page.click("form button")
        page.wait_for_selector(".typed [role=button]")
        assert page.inner_text(".typed").replace("⏎", "") == f"{tokenizer.bos_token}{text}"
        count = page.locator(".typed [role=button]").count()
        assert count == 1 + len(tokenizer.encode(text, add_special_tokens=False))
        page.locator(".typed [role=button]").nth(1).click()
        experts: set[str] = set()
        for _ in range(1, count):
            page.keyboard.press("ArrowRight")
            found = page.locator(".token-panel .latent-link").all_text_contents()
            assert 1 <= len(found) <= k
            assert "base" in page.inner_text(".token-panel ol >> nth=0")
            experts |= set(found)
        assert len(experts) > k
        unbroken(page)
    fits_a_phone(page, "text")


def test_the_bench_writes_both_continuations(demo: Shown, page: "Page") -> None:
    latent = one(demo.run, "SELECT latent FROM latents WHERE student = 0 ORDER BY firings DESC LIMIT 1")
    visit(page, f"{demo.url}#/steer/{STUDENT}/{latent}")
    assert page.locator(".sliders li").count() == 1
    page.fill("#prompt", f"def read(self):\n    {SCRIPT}")
    page.locator(".options input").first.fill("8")
    page.click("button:has-text('Write')")
    page.wait_for_selector("[role=status]:has-text('done')")
    for pane in page.locator(".written").all():
        assert pane.inner_text().startswith(f"def read(self):\n    {SCRIPT}")
        assert len(pane.inner_text()) > len(f"def read(self):\n    {SCRIPT}")
    fits_a_phone(page, "steer")
    unbroken(page)


def test_the_runs_page_tells_the_model_the_text_and_each_student(demo: Shown, page: "Page") -> None:
    visit(page, f"{demo.url}#/run/{STUDENT}")
    rows = [row.inner_text().split() for row in page.locator("tbody tr").all()]
    assert [row[0] for row in rows] == STUDENTS
    assert [row[2] for row in rows] == ["8", "32"] * len(DEMO.kind)
    facts = page.inner_text(".facts")
    assert "bundled" in facts
    assert "held-out documents" in facts
    assert f"{TOKENS_READ:,}" in facts
    assert f"{TOKENS_TRAINED:,}" in facts
    assert page.locator("svg.lines").count() == 1
    fits_a_phone(page, "run")
    unbroken(page)
