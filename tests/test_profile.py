"""mekd STAGE --profile: a trace and a table of ten steps."""

import json
from pathlib import Path

from mekd.cli import main


def test_a_trace_and_a_table(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--deprivatize.steps", "16", "--out", str(tmp_path / "run"), "--profile"]
    assert main(["deprivatize", *words]) == 0
    folder = tmp_path / "run" / "profile"
    table = (folder / "deprivatize.txt").read_text()
    assert "aten::convolution_backward" in table
    assert json.loads((folder / "deprivatize.json").read_text())["traceEvents"]


def test_nothing_without_it(tiny: list[str], tmp_path: Path) -> None:
    assert main(["deprivatize", *tiny, "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "profile").exists()
