"""The documentation builds as a site without a warning, fetches nothing, and every link in it leads somewhere."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from follow_page import ROOT

#: What is no page and nothing that a page is made of.
LEFT_OUT = (
    ".venv*",
    ".git",
    ".cache",
    "build",
    "site",
    "runs",
    "dist",
    "*.so",
    "__pycache__",
    ".*_cache",
    "*.egg-info",
)
#: The attributes by which a browser fetches something as it shows a page.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


class Page(HTMLParser):
    """What a page fetches, where it leads, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if FETCHED.get(tag) in given:
            self.fetched.append(given[FETCHED[tag]])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("zensical", "mkdocstrings_handlers", "nbconvert"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'mekd[docs]'")
    copy = tmp_path_factory.mktemp("site") / "mekd"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    # Nothing outside can be reached: whoever downloads ends here.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "docs/build.py"], cwd=copy, env=os.environ | nowhere, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return copy / "site"


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 25
    elsewhere = {(path.name, url) for path, page in pages.items() for url in page.fetched if urlsplit(url).netloc}
    assert not elsewhere
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']+", styles)


@pytest.mark.slow
def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    broken = set()
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its addresses are those of the server's root
        for url in (*page.links, *page.fetched):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = target.is_file() or (target / "index.html").is_file()
            if not found or (parts.fragment and target in pages and parts.fragment not in pages[target].anchors):
                broken.add((path.name, url))
    assert not broken


@pytest.mark.slow
def test_every_page_of_docs_is_in_the_navigation(site: Path) -> None:
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [page for page in sorted(ROOT.glob("docs/**/*.md")) if str(page.relative_to(ROOT)) not in config] == []


@pytest.mark.slow
def test_the_reference_holds_what_is_public(site: Path) -> None:
    text = "".join(path.read_text("utf-8") for path in (site / "docs" / "api").glob("*.html"))
    for name in ("functional.kd_loss", "losses.MEKDLoss", "linear.linear_kd_loss", "compat.trl.generalized_jsd_loss",
                 "load_student", "nets.registry.build", "oracle.ort.OnnxOracle", "errors.MekdError"):  # fmt: skip
        assert f'id="mekd.{name}"' in text, name
