"""report.html and the page of mekd watch in a real browser, without a window."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mekd import page as pages_of_runs
from test_page import EVIL, facts_of
from test_watch import begun, watching

pytestmark = pytest.mark.slow
SIZES = {"desktop": (1200, 900), "phone": (390, 844)}
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'mekd[browser]'")
    path = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or CHROME=/path/of/one in the environment")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Seen:
    """A tab, and what went wrong in it: messages, errors, dialogs, and what it asked for besides its own address."""

    def __init__(self, browser: Any, url: str, size: str = "desktop", scheme: str = "light") -> None:
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.tab, self.wrong, self.asked = context.new_page(), [], []
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(url)

    def outside(self, url: str) -> list[str]:
        return [one for one in self.asked if not one.startswith(("data:", url))]


def address(folder: Path) -> str:
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_shows_and_loads_nothing(size: str, scheme: str, finished: Path, browser: Any) -> None:
    seen = Seen(browser, address(finished), size, scheme)
    tab = seen.tab
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the screen"
    broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
    assert tab.evaluate("document.images.length") > 0 and tab.evaluate(broken) == 0
    for svg in tab.locator("svg[data-lines]:visible").all():
        svg.hover()
        lines = json.loads(svg.get_attribute("data-lines"))
        first, *rest = tab.locator(".tip").inner_text().splitlines()
        across = first.partition(" ")[0].replace(",", "")
        assert float(across) in [x for line in lines for x in line["x"]] and len(rest) == len(lines)
        for row, line in zip(rest, lines, strict=True):
            name, value = row.rsplit(": ", 1)
            assert name == line["name"] and float(value.split()[0]) in line["y"]
    assert tab.locator(".tip").bounding_box()["x"] >= 0
    tab.locator("summary").click()
    assert tab.get_by_text("distill.replay", exact=True).is_visible()
    assert seen.wrong == [] and seen.outside(address(finished)) == []
    tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing(size: str, scheme: str, finished: Path, browser: Any) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed: pip install 'mekd[browser]'"
    )
    seen = Seen(browser, address(finished), size, scheme)
    seen.tab.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    seen.tab.locator("svg[data-lines]:visible").first.hover()
    result = axe.Axe().run(seen.tab)
    assert result.violations_count == 0, result.generate_report()
    seen.tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_the_matrix_can_be_read(scheme: str, finished: Path, browser: Any, tmp_path: Path) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed: pip install 'mekd[browser]'"
    )
    counts = np.array([[100 - 11 * (9 - i), 11 * (9 - i)] + [0] * 8 for i in range(10)])
    shown = facts_of(finished)
    confusion = shown.confusion._replace(counts=counts)  # type: ignore[union-attr]
    html = pages_of_runs.document(pages_of_runs.fitting(dataclasses.replace(shown, confusion=confusion), []))
    assert all(f'class="s{level}"' in html for level in range(1, 10))
    (tmp_path / "report.html").write_text(html, "utf-8")
    seen = Seen(browser, address(tmp_path), scheme=scheme)
    result = axe.Axe().run(seen.tab)
    assert result.violations_count == 0, result.generate_report()
    seen.tab.context.close()


def test_curves_by_keys_and_against_queries(finished: Path, browser: Any) -> None:
    seen = Seen(browser, address(finished))
    tab = seen.tab
    agreement = tab.locator("#chart-0 svg:visible")
    agreement.focus()
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.keyboard.press(key)
        said.append(tab.locator(".tip").inner_text().split()[0])
    assert said == ["3", "6", "9", "9", "6"]
    tab.keyboard.press("Escape")
    assert tab.locator(".tip").count() == 0
    gan = tab.locator("#chart-2 svg:visible")  # step 1 asks about 8 images a step; the answers of step 2 are kept
    assert gan.get_attribute("data-across") == "steps"
    tab.get_by_label("queries paid").check()
    assert gan.get_attribute("data-across") == "queries" and agreement.get_attribute("data-across") == "steps"
    assert json.loads(gan.get_attribute("data-lines"))[0]["x"] == [16, 32, 48, 64, 72]
    assert seen.wrong == []
    tab.context.close()


def test_on_paper_nothing_stays_folded(finished: Path, browser: Any) -> None:
    seen = Seen(browser, address(finished), scheme="dark")
    assert len(seen.tab.pdf()) > 20_000 and seen.tab.locator("details[open]").count() == 0
    seen.tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert seen.tab.get_by_text("distill.replay", exact=True).is_visible()
    seen.tab.emulate_media(media="print")
    assert seen.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not seen.tab.locator("fieldset").is_visible()
    seen.tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert seen.tab.locator("details[open]").count() == 0
    seen.tab.context.close()


def test_names_from_outside_run_nothing(finished: Path, browser: Any, tmp_path: Path) -> None:
    shown = dataclasses.replace(facts_of(finished, names=EVIL), log=["<img src=x onerror=alert(2)>"])
    html = pages_of_runs.document(pages_of_runs.fitting(shown, ["| a | b | c |", "- <script>alert(3)</script>"]))
    (tmp_path / "report.html").write_text(html, "utf-8")
    seen = Seen(browser, address(tmp_path))
    assert seen.tab.get_by_text(EVIL[0]).count() > 0
    assert seen.wrong == [] and seen.outside(address(tmp_path)) == []
    # The policy stops what the escaping would let through.
    seen.tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(4)>')")
    seen.tab.wait_for_timeout(200)
    assert any("Content Security Policy" in message for message in seen.wrong) and "4" not in seen.wrong
    seen.tab.context.close()


def test_a_run_is_watched_and_the_page_keeps_its_state(finished: Path, browser: Any, tmp_path: Path) -> None:
    folder = begun(finished, tmp_path / "run")
    with watching(folder) as url:
        seen = Seen(browser, url)
        tab = seen.tab
        tab.get_by_text("2 of 9 steps").wait_for()
        assert tab.locator("#classes img").count() == 40
        tab.locator("summary").click()
        tab.get_by_label("queries paid").check()
        gan = tab.locator("#chart-2 svg:visible")
        gan.hover()
        assert tab.locator(".tip").inner_text().startswith("16 queries")
        tab.evaluate("scrollTo(0, 300)")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('deprivatize", "step": 4, "loss_d": 1.2, "loss_g": 0.8}\n')
        tab.get_by_text("4 of 9 steps").wait_for(timeout=15_000)
        assert tab.locator("details[open]").count() == 1 and tab.get_by_label("queries paid").is_checked()
        assert tab.locator(".tip").inner_text().startswith("16 queries") and tab.evaluate("scrollY") == 300
        assert tab.locator("#status").inner_text() == "at work"
        settings = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(settings.replace("price: 0.01", "price: 0.02"))
        tab.get_by_text("0.02 a query").wait_for(timeout=15_000)
        assert tab.locator("details[open] td", has_text="0.02").count() == 1
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        tab.get_by_text("finished; report.html").wait_for(timeout=15_000)
        tab.get_by_text("How to go on").wait_for()
        assert not tab.get_by_text("9 of 9 steps").count()
        assert seen.wrong == [] and seen.outside(url) == []
    until = time.monotonic() + 20
    while "does not answer" not in tab.locator("#status").inner_text():
        assert time.monotonic() < until
        tab.wait_for_timeout(200)
    assert "Function." in tab.locator("#audit").inner_text()  # what stood there stands
    tab.context.close()
