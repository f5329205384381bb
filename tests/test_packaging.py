"""What is said of the package in several places is the same, and the workflows keep to what they need."""

import re
from pathlib import Path
from typing import Any

import pytest

import mekd

ROOT = Path(__file__).parent.parent
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'mekd[run]'")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def test_the_version_is_said_alike() -> None:
    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cited = read(ROOT / "CITATION.cff")
    assert project and project[1] == mekd.__version__ == cited["version"]
    assert f": {mekd.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    names = [one["family-names"] for one in cited["preferred-citation"]["authors"]]
    assert names == ["Ma", "Xiang", "Wang", "Wu", "Li"]


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "mekd" / "py.typed").read_bytes() == b""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_read_and_says_where_it_may_more(path: Path) -> None:
    flow = read(path)
    assert flow["permissions"] == {"contents": "read"}
    wide = {name for name, job in flow["jobs"].items() if "write" in str(job.get("permissions"))}
    assert wide <= {"publish"}
    assert all("environment" in flow["jobs"][name] and "if" in flow["jobs"][name] for name in wide)
    used = [step["uses"] for job in flow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert all(re.search(r"@(v\d+|release/v\d+)$", action) for action in used), used
    assert "secrets." not in path.read_text()


def test_what_a_page_names_is_there() -> None:
    for page in ("CONTRIBUTING.md", "docs/packaging.md"):
        text = (ROOT / page).read_text()
        for name in re.findall(r"`((?:mekd|csrc|kernels|bench|tests|\.github)/[\w./*-]+)`", text):
            if "NAME" not in name:
                assert list(ROOT.glob(name.rstrip("/"))), (page, name)
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), (page, link)
