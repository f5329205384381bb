"""Finished runs, opened again as they were saved."""

from pathlib import Path

from mekd.cli import parse
from mekd.engine.run import Run


def reopened(folder: Path) -> Run:
    """The run in a folder, with the settings in its config.yaml."""
    parsed = parse(["--config", str(folder / "config.yaml"), "--out", str(folder)])
    assert parsed is not None
    return Run(*parsed)
