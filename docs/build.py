"""The documentation as a site: python docs/build.py [--with zensical|mkdocs]. Nothing is downloaded.

The pages are the repository's own Markdown, laid out in build/pages as it lies in the repository, so that a link works
in both; notebooks become Markdown, with the output that is stored in them.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "pages"
#: What the pages link to. A page that stands in mkdocs.yml has to be among them.
PARTS = ["*.md", "LICENSE", "CITATION.cff", "docs", "bench/results", "configs", "examples"]


def lay_out() -> None:
    """A fresh build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for part in (found for pattern in PARTS for found in ROOT.glob(pattern)):
        target = PAGES / part.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.is_dir():
            shutil.copytree(part, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(part, target)
    to_markdown = [sys.executable, "-m", "nbconvert", "--to", "markdown", "--log-level", "WARN"]
    for notebook in sorted(ROOT.glob("notebooks/*.ipynb")):
        subprocess.run([*to_markdown, "--output-dir", PAGES / "notebooks", notebook], check=True)
    for page in PAGES.rglob("*.md"):
        page.write_text(page.read_text("utf-8").replace(".ipynb)", ".md)"), "utf-8")


def main() -> int:
    """Build into site/; not 0 if a page, a link or an anchor is missing."""
    parser = argparse.ArgumentParser(prog="docs/build.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--with", dest="builder", choices=["zensical", "mkdocs"], default="zensical")
    chosen = parser.parse_args()
    lay_out()
    return subprocess.run([sys.executable, "-m", chosen.builder, "build", "--clean", "--strict"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
