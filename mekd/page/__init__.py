"""A run as a page: report.html, one file that needs nothing else, and the same page while the run goes on."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from mekd import __version__, files
from mekd.page.facts import Facts, gather
from mekd.page.markup import text
from mekd.page.pictures import SIDES
from mekd.page.sections import HEADINGS, parts, title

__all__ = ["HEADINGS", "LIMIT", "Page", "document", "fitting", "gather", "policy", "write"]

#: Bytes of a page at most.
LIMIT = 2_000_000


class Page(NamedTuple):
    """A page in parts: its title, not escaped, and the HTML of each section by its id."""

    title: str
    sections: dict[str, str]


def write(facts: Facts, audited: Sequence[str]) -> None:
    """Write report.html into the run's folder; audited: the lines about the audit, as Markdown."""
    files.write_text(facts.run.out / "report.html", document(fitting(facts, audited)))


def fitting(facts: Facts, audited: Sequence[str], limit: int = LIMIT) -> Page:
    """The page with the largest pictures with which it is no longer than limit, in bytes, and with none at worst."""
    for side in SIDES:
        page = Page(title(facts), parts(facts, audited, side))
        if len(document(page).encode()) <= limit:
            break
    return page


def document(page: Page, live: bool = False) -> str:
    """The page as an HTML document; live: it asks where it came from for what is new."""
    shown = "".join(
        f'<section id="{name}"{f" aria-labelledby={name}-title" if HEADINGS[name] and page.sections[name] else ""}>'
        f"{page.sections[name]}</section>"
        for name in HEADINGS
        if name != "head" and (live or page.sections[name])
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"{" data-live=1" if live else ""}>\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(live)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(page.title, 300)}</title>\n<style>{_own('page.css')}</style>\n</head>\n<body>\n"
        f'<header><div id="head">{page.sections["head"]}</div>'
        f"{'<p id=status role=status></p>' if live else ''}</header>\n<main>{shown}</main>\n"
        f"<footer><p>Made by mekd {__version__} of the files in the run's folder.</p>"
        "</footer>\n"
        f"<script>{_own('page.js')}</script>\n</body>\n</html>\n"
    )


def policy(live: bool = False) -> str:
    """The content security policy: nothing is loaded, and no script or style runs but the page's own."""
    connects = "connect-src 'self'; " if live else ""
    script, style = (_digest(_own(name)) for name in ("page.js", "page.css"))
    return (
        f"default-src 'none'; img-src data:; {connects}script-src '{script}'; style-src '{style}'; base-uri 'none'; "
        "form-action 'none'"
    )


@functools.cache
def _own(name: str) -> str:
    """A file beside this one."""
    return resources.files("mekd.page").joinpath(name).read_text("utf-8")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
