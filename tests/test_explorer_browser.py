"""The pages in a real browser, from a server and from disk."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mxd.explorer.export import export
from mxd.explorer.labels import Label, write_label
from mxd.explorer.rows import map_data
from tests.chromium import NEEDED, SCRIPT, chromium, shoot, unbroken, visit, watched_page
from tests.exploring import STUDENTS, Served, explored, library_of, served
from tests.tiny_run import copied

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

IMAGE = '<img src=x onerror="window.broken = 1">'
STUDENT = STUDENTS[0]

pytestmark = NEEDED


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: "Browser") -> "Iterator[Page]":
    with watched_page(browser) as opened:
        yield opened


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokens, labels and concepts are scripts."""
    run = copied(explored(tmp_path_factory.getbasetemp()), tmp_path_factory.mktemp("hostile") / "run<b>")
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection, connection:
        connection.execute("UPDATE tokens SET text = ? WHERE id % 3 = 0", (SCRIPT,))
        connection.execute("UPDATE tokens SET text = ? WHERE id % 3 = 1", ("</script>" + IMAGE,))
    write_label(run / "explorer.sqlite", Label(STUDENT, loudest(run), SCRIPT, IMAGE, "2026-11-21"))
    named = {"latent": 0, "concept": SCRIPT, "f1_validation": 1.0, "f1": 1.0}
    probing = {"version": 1, "token_level": {"students": {STUDENT: {"latents": [named]}}}}
    (run / "probing.json").write_text(json.dumps(probing), encoding="utf-8")
    return run


def loudest(run: Path) -> int:
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection:
        query = "SELECT latent FROM latents WHERE student = 0 ORDER BY firings DESC, latent LIMIT 1"
        return int(connection.execute(query).fetchone()[0])


@pytest.fixture(scope="module")
def server(hostile: Path) -> Iterator[Served]:
    with served(hostile) as serving:
        yield serving


def test_scripts_in_tokens_labels_and_names_stay_text_on_every_page(
    server: Served, hostile: Path, page: "Page"
) -> None:
    latent = loudest(hostile)
    for route in ("", f"#/latent/{STUDENT}/{latent}", "#/run", f"#/text/{STUDENT}", f"#/steer/{STUDENT}/{latent}"):
        visit(page, server.url + route)
        unbroken(page)
        assert page.locator(".error").count() == 0
    visit(page, f"{server.url}#/latent/{STUDENT}/{latent}")
    assert SCRIPT in page.inner_text("h1")
    assert "window.broken" in page.inner_text(".example >> nth=0")
    assert page.input_value("#note") == IMAGE
    visit(page, f"{server.url}#/map/{STUDENT}")
    page.fill("#query", "<script>")
    page.wait_for_selector(".results .why")
    assert page.locator(".results b").first.inner_text() == SCRIPT
    unbroken(page)
    visit(page, f"{server.url}#/nowhere/%3Cimg%20src=x%3E/{IMAGE}")
    assert page.locator(".error").count() == 1
    unbroken(page)


def test_the_map_is_searched_and_walked_by_keys(server: Served, hostile: Path, page: "Page") -> None:
    visit(page, server.url)
    with closing(sqlite3.connect(hostile / "explorer.sqlite")) as connection:
        alive = connection.execute("SELECT count(*) FROM latents WHERE student = 0 AND firings > 0").fetchone()[0]
    assert page.get_attribute("html", "data-drawn") == str(alive)
    assert page.locator(".results li").count() == min(12, alive)
    page.keyboard.press("/")
    assert page.evaluate("() => document.activeElement.id") == "query"
    page.fill("#query", "1")
    page.wait_for_selector(".found h2:has-text('found')")
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    first = page.inner_text(".tip .tag")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("+")
    page.keyboard.press("0")
    page.select_option("#axis", "label")
    page.select_option("#axis", "distinctness")
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    shown = page.inner_text(".tip .tag")
    page.keyboard.press("Enter")
    page.wait_for_selector("article")
    assert first.isdigit()
    assert page.url.endswith(f"#/latent/{STUDENT}/{shown}")
    page.keyboard.press("j")
    page.wait_for_selector(f"h1 .tag:has-text('{int(shown) + 1}')")
    page.go_back()
    page.wait_for_selector(f"h1 .tag:has-text('{shown}')")
    shoot(page, "tiny-latent")


def a_dot(page: "Page") -> tuple[float, float]:
    """Return where on the page a dot of the map is, and leave the map."""
    box = page.locator("#map").bounding_box()
    assert box is not None
    for down in range(60, int(box["height"]) - 60, 12):
        for across in range(70, int(box["width"]) - 30, 12):
            x, y = box["x"] + across, box["y"] + down
            page.mouse.move(x, y)
            if page.locator(".tip").is_visible():
                page.mouse.move(1, 1)
                page.wait_for_selector(".tip", state="hidden")
                return x, y
    raise AssertionError("no dot")


def test_dragging_the_map_opens_nothing_and_a_click_does(server: Served, page: "Page") -> None:
    visit(page, server.url)
    x, y = a_dot(page)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 50, y + 30, steps=4)
    page.mouse.move(x, y, steps=4)
    page.mouse.up()
    assert page.locator(".tip").is_visible()
    assert page.evaluate("() => location.hash") == ""
    page.mouse.click(x, y)
    page.wait_for_selector("article")


def test_a_tap_shows_a_latent_and_the_second_opens_it(server: Served, browser: "Browser") -> None:
    context = browser.new_context(viewport={"width": 700, "height": 860}, has_touch=True)
    page = context.new_page()
    visit(page, server.url)
    x, y = a_dot(page)
    page.touchscreen.tap(x, y)
    page.wait_for_selector(".tip")
    latent = page.inner_text(".tip .tag")
    assert page.evaluate("() => location.hash") == ""
    page.touchscreen.tap(x, y)
    page.wait_for_selector("article")
    assert page.evaluate("() => location.hash").endswith(f"/{latent}")
    context.close()


def answered(page: "Page", body: str) -> None:
    page.route("**/api/steer", lambda route: route.fulfill(body=body))


def test_continuations_that_end_early_are_not_done(server: Served, page: "Page") -> None:
    lines = [{"side": "beside", "begins": True}, {"side": "beside", "text": " and"}, {"side": "beside", "ends": True}]
    for more, said in (([], "broke off before both"), ([{"error": "no room left"}], "no room left")):
        answered(page, "".join(json.dumps(line) + "\n" for line in [*lines, *more]))
        visit(page, f"{server.url}#/steer/{STUDENT}/3")
        page.fill("#prompt", "the cat")
        page.click("button:has-text('Write')")
        page.wait_for_selector(f"[role=status]:has-text('{said}')")
        assert page.locator(".written").first.inner_text() == "the cat and"
        page.unroute("**/api/steer")


def test_a_label_is_written_and_found(server: Served, page: "Page") -> None:
    visit(page, f"{server.url}#/latent/{STUDENT}/4")
    page.fill("#label", "rivers & <trees>")
    page.click("form.label button")
    page.wait_for_selector("text=saved in the database")
    visit(page, f"{server.url}#/map/{STUDENT}")
    page.fill("#query", "rivers &")
    page.wait_for_selector(".results b")
    assert page.locator(".results b").all_inner_texts() == ["rivers & <trees>"]


def test_what_was_typed_and_not_saved_outlives_a_look_elsewhere(server: Served, page: "Page") -> None:
    visit(page, f"{server.url}#/latent/{STUDENT}/6")
    page.fill("#label", "half a tho")
    page.fill("#note", "and why")
    page.click("[data-key=next]")
    page.wait_for_selector("h1 .tag:has-text('7')")
    assert page.input_value("#label") == ""
    page.go_back()
    page.wait_for_selector("h1 .tag:has-text('6')")
    assert (page.input_value("#label"), page.input_value("#note")) == ("half a tho", "and why")
    assert page.inner_text("[role=status]") == "not saved yet"
    page.fill("#label", "turns \u202e round")
    page.click("form.label button")
    page.wait_for_selector("text=saved in the database")
    # A character that turns the direction of the text is shown and does not act.
    assert "turns ‹202E› round" in page.inner_text("h1")


def test_a_label_changed_elsewhere_is_told_and_kept(server: Served, hostile: Path, page: "Page") -> None:
    visit(page, f"{server.url}#/latent/{STUDENT}/8")
    write_label(hostile / "explorer.sqlite", Label(STUDENT, 8, "theirs", "", "2026-11-21"))
    page.fill("#label", "mine")
    page.click("form.label button")
    page.wait_for_selector("[role=status]:has-text(\"changed elsewhere, to 'theirs'\")")
    page.on("dialog", lambda dialog: dialog.accept())
    visit(page, f"{server.url}#/latent/{STUDENT}/8")
    assert page.input_value("#label") == "theirs"
    for nothing in ("constructor", "__proto__"):
        visit(page, f"{server.url}#/{nothing}/{STUDENT}")
        assert f"There is no page {nothing}" in page.inner_text(".error")


def test_a_typed_text_and_the_bench(server: Served, page: "Page") -> None:
    visit(page, f"{server.url}#/text/{STUDENT}")
    page.fill("#text", f"the cat {SCRIPT[:20]}")
    page.click("form button")
    page.wait_for_selector(".typed [role=button]")
    assert page.inner_text(".typed") == f"<bos>the cat {SCRIPT[:20]}"
    page.locator(".typed [role=button]").nth(3).click()
    page.keyboard.press("ArrowRight")
    assert page.locator(".typed [aria-pressed=true]").text_content() == " "
    assert page.locator(".token-panel li").count() >= 2
    page.locator(".token-panel .follow").first.click()
    assert "Shaded by what expert" in page.inner_text("#legend")
    page.fill("#text", "a " * 99)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("[role=status]:has-text('must fit the model')")
    visit(page, f"{server.url}#/steer/{STUDENT}/3,5")
    assert page.locator(".sliders li").count() == 2
    page.locator(".sliders input").first.fill("4")
    page.fill("#prompt", "the cat")
    page.locator(".options input").first.fill("8")
    page.click("button:has-text('Write')")
    page.wait_for_selector("[role=status]:has-text('done')")
    both = [pane.inner_text() for pane in page.locator(".written").all()]
    assert all(text.startswith("the cat") and len(text) > 7 for text in both)
    shoot(page, "tiny-steer")
    unbroken(page)


def test_the_map_draws_and_finds_tens_of_thousands_of_dots(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, page: "Page"
) -> None:
    run, count = copied(explored(tmp_path_factory.getbasetemp()), tmp_path / "large"), 30_000
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection, connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(latents)")]
        shifted = ", ".join("number" if name == "latent" else name for name in columns)
        connection.execute(
            f"WITH RECURSIVE numbers(number) AS (SELECT 1000 UNION ALL SELECT number + 1 FROM numbers WHERE number < "
            f"{count + 999}) INSERT INTO latents SELECT {shifted} FROM numbers, latents WHERE student = 0 AND latent = "
            f"{loudest(run)}"
        )
        connection.execute("UPDATE students SET map = ?", (json.dumps(map_data(connection, 0)),))
        alive = connection.execute("SELECT count(*) FROM latents WHERE student = 0 AND firings > 0").fetchone()[0]
    with served(run) as server:
        visit(page, server.url)
        assert page.get_attribute("html", "data-drawn") == str(alive)
        drawn = """() => {
          const canvas = document.getElementById("map"), context = canvas.getContext("2d");
          const { data } = context.getImageData(canvas.width / 2, 0, canvas.width / 2 - 20, canvas.height - 60);
          let blue = 0;
          for (let place = 0; place < data.length; place += 4) blue += data[place + 2] > data[place] + 40;
          return blue;
        }"""
        assert page.evaluate(drawn) > 0
        page.locator(".results a").first.click()
        page.wait_for_selector("article .example")


def test_every_page_fits_a_phone(server: Served, hostile: Path, browser: "Browser") -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    for name, route in {"map": "", "latent": f"#/latent/{STUDENT}/{loudest(hostile)}", "run": "#/run"}.items():
        visit(page, server.url + route)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        shoot(page, f"tiny-phone-{name}")
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 23, 27)"
    context.close()


def test_an_export_opens_from_disk_and_has_no_live_parts(hostile: Path, tmp_path: Path, page: "Page") -> None:
    folder = tmp_path / "pages"
    files = export(library_of(hostile), folder)
    assert files == sum(path.is_file() for path in folder.rglob("*"))
    assert export(library_of(hostile), folder) == files
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="must not exist, be empty or be an earlier export"):
        export(library_of(hostile), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").is_file()
    for script in (folder / "data").iterdir():
        assert "<" not in script.read_text(encoding="utf-8")
    url, latent = (folder / "index.html").as_uri(), loudest(hostile)
    visit(page, url)
    assert page.inner_text("nav").split() == ["Map", "Run"]
    assert int(page.get_attribute("html", "data-drawn") or 0) > 0
    page.fill("#query", "window.broken")
    page.wait_for_selector(".results b")
    assert page.locator(".results b").first.inner_text() == SCRIPT
    unbroken(page)
    page.locator(".results a").first.click()
    page.wait_for_selector("article")
    unbroken(page)
    visit(page, f"{url}#/latent/{STUDENT}/{latent}")
    live = shown(page)
    assert SCRIPT in live["heading"]
    assert live["examples"] > 3
    assert page.locator("form").count() == 0
    visit(page, f"{url}#/run")
    assert page.locator("svg.lines").count() > 0
    visit(page, f"{url}#/text/{STUDENT}")
    assert "mxd explore" in page.inner_text("main")
    unbroken(page)


def shown(page: "Page") -> dict[str, Any]:
    return {"heading": page.inner_text("h1"), "examples": page.locator(".example").count()}
