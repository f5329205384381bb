"""Faults at random moments, counted: `python -m bench faults` in the size of a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import faults
from mekd import files


@pytest.mark.slow
def test_no_run_is_lost_and_nothing_paid_twice(tmp_path: Path) -> None:
    table = tmp_path / "faults.json"
    command = [sys.executable, "-m", "bench", "faults", "--quick", "--json", str(table), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(table.read_text())
    assert sum(row["runs"] for row in rows) == 20 and [row["case"] for row in rows] == list(faults.CASES)
    for row in rows:
        assert row["same"] == row["runs"] and row["lost"] == row["paid_twice"] == 0, row
    again = subprocess.run(command, capture_output=True, text=True)  # what is done is not done again
    assert again.returncode == 0 and json.loads(table.read_text()) == rows and "20 runs, 0 s" in again.stdout


def test_a_lost_run_and_a_second_payment_are_counted() -> None:
    good = {"same": True, "refused": True, "in_flight": 8, "paid_twice": 0}
    bad = {"same": False, "refused": False, "in_flight": 0, "paid_twice": 3}
    assert faults.summed("a", [good, bad, good]) == {
        "case": "a", "runs": 3, "same": 2, "lost": 1, "paid_twice": 3, "refused": 2, "in_flight": 16,
    }  # fmt: skip


def test_another_weight_is_another_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "counts", lambda out: {"queries": faults.QUERIES})
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        files.save(tmp_path / name / "student.pt", {"weight": torch.tensor(value)})
    assert faults.is_same(tmp_path / "a", tmp_path / "b") and not faults.is_same(tmp_path / "a", tmp_path / "c")
