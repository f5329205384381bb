"""What tests read of a page: its elements, and the pictures in it."""

import base64
import io
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import pytest
from PIL import Image

from mekd import cli
from mekd.engine.run import Run


def parsed(html: str) -> Element:
    """The tree of a page; a failed test where it is no valid HTML."""
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed: pip install html5lib")
    parser = html5lib.HTMLParser(strict=False, namespaceHTMLElements=False)
    tree: Element = parser.parse(html)
    assert parser.errors == []
    for element in tree.iter():  # of SVG
        if isinstance(element.tag, str):
            element.tag = element.tag.rpartition("}")[2]
    return tree


def of(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def words(element: Element) -> str:
    """What an element says, without what scripts and styles hold."""
    kept = [e.text or "" for e in element.iter() if e.tag not in ("script", "style")]
    return " ".join(" ".join([*kept, *(e.tail or "" for e in element.iter())]).split())


def section(tree: Element, name: str) -> Element | None:
    return next((e for e in tree.iter() if e.get("id") == name), None)


def pictures(element: Element) -> list[np.ndarray]:
    """The pictures of an element, decoded."""
    found = [e.get("src", "") for e in element.iter("img")]
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in found)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in found]


def saved_run(folder: Path, *more: str) -> Run:
    """The run of a folder, by its config.yaml and some words besides."""
    given: Any = cli.parse(["--config", str(folder / "config.yaml"), "--out", str(folder), *more])
    return Run(*given)
