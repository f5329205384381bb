"""Tests marked gpu: values are looked at there, and nowhere is one skipped without its reason."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import os
import pytest

@pytest.mark.gpu
def test_on_a_card():
    assert os.environ["MEKD_CHECK"] == "1"

@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.gpu), 2])
def test_by_parameter(x):
    assert ("MEKD_CHECK" in os.environ) == (x == 1)
"""
#: One run as on a machine with a card, which this one need not have, and one as on a machine without.
RUN = """
import sys
import pytest, torch
for there in (True, False):
    torch.cuda.is_available = lambda: there
    pytest.main(["-p", "conftest", "-p", "no:cacheprovider", "-o", "markers=gpu", "-rs", sys.argv[1]])
"""


def test_a_card_is_asked_for_and_values_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "test_marked.py").write_text(TESTS)
    kept = {key: value for key, value in os.environ.items() if key != "MEKD_CHECK"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "test_marked.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**kept, "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    with_card, without = done.stdout.split("test session starts")[1:]
    assert "3 passed" in with_card, done.stdout
    assert "1 passed, 2 skipped" in without and "needs a CUDA device, and torch finds none" in without
