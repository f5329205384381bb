"""Two processes under torchrun: the same queries as one, one budget, a killed process, another number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mekd import files
from mekd.engine import parallel
from mekd.oracle.ledger import Ledger
from test_resume import assert_equal_trees, metrics

# Runs the command line; process 1 of the first attempt kills itself at the nth call of a function.
DRIVER = """
import importlib, os, signal, sys
target, count, *words = sys.argv[1:]
module, _, path = target.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
original, left = getattr(owner, name), [int(count)]
def patched(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        open(sys.argv[0] + ".reached", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, patched)
from mekd.cli import main
raise SystemExit(main(words))
"""


def torchrun(*words: str, processes: int = 2, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *launch, f"--max-restarts={restarts}", *words],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def accounts(out: Path) -> dict[str, dict[str, int]]:
    """What each stage asked, over all processes."""
    found: dict[str, dict[str, int]] = {}
    for path in (out / "ledger").glob("*.json"):
        stage = found.setdefault(path.name.split(".")[0], {})
        for key, count in json.loads(path.read_text()).items():
            stage[key] = stage.get(key, 0) + count
    return found


@pytest.fixture(scope="module")
def words(teacher_onnx: Path) -> list[str]:
    settings = {
        "data.name": "digits", "data.size": 16, "teacher.onnx": teacher_onnx, "oracle.batch": 64,
        "deprivatize.steps": 9, "deprivatize.batch": 8, "deprivatize.width": 0.1,
        "distill.steps": 9, "distill.batch": 8, "distill.holdout": 21, "distill.eval_every": 3,
        "engine.checkpoint_every": 4, "engine.log_every": 3, "engine.device": "cpu",
        "evaluate.enabled": "true", "evaluate.baseline_steps": 6,
    }  # fmt: skip
    return ["run", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    done = torchrun("-m", "mekd", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def test_two_processes_ask_what_one_asks(words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    alone = subprocess.run(
        [sys.executable, "-m", "mekd", *words, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert alone.returncode == 0, alone.stderr
    mine, theirs = accounts(undisturbed), accounts(tmp_path)
    for account in (*mine.values(), *theirs.values()):
        for key in ("requests", "settled"):  # two processes send twice as many, of half the images
            account.pop(key)
    assert mine == theirs
    assert mine["deprivatize"]["queries"] == 72 and mine["distill"]["queries"] == 21 + 72
    two, one = (json.loads((out / "evaluate.json").read_text()) for out in (undisturbed, tmp_path))
    for key in ("test_images", "teacher_accuracy", "simulation_queries"):
        assert two[key] == one[key]
    # One line of metrics a step, of the first process.
    steps = [(row["stage"], row["step"]) for row in metrics(undisturbed)]
    assert steps == [(row["stage"], row["step"]) for row in metrics(tmp_path)]


@pytest.mark.parametrize(
    ("target", "count"),
    [
        # In the middle of an epoch of step 1: the peer waits in a collective, its request is in flight.
        ("mekd.engine.deprivatize:take_step", 7),
        # The checkpoint of step 8 is written, this process has not settled its account.
        ("mekd.oracle.ledger:Ledger.settle", 2),
        # In step 2.
        ("mekd.engine.distill:take_step", 6),
    ],
)
def test_a_killed_process_costs_what_came_after_the_checkpoint(
    words: list[str], undisturbed: Path, tmp_path: Path, target: str, count: int
) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    out = tmp_path / "run"
    done = torchrun(str(driver), target, str(count), *words, "--out", str(out), restarts=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "driver.py.reached").exists(), "nobody was killed"
    found, wanted = files.load(out / "student.pt"), files.load(undisturbed / "student.pt")
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    for name in ("deprivatize", "distill"):
        a, b = (files.load(folder / "checkpoints" / f"{name}.pt")["state"] for folder in (out, undisturbed))
        assert_equal_trees(a, b)
    assert metrics(out) == metrics(undisturbed)
    mine, theirs = accounts(out), accounts(undisturbed)
    assert sum(account.pop("uncertain") for account in mine.values()) <= 8  # what was in flight, of both
    assert sum(account.pop("uncertain") for account in theirs.values()) == 0
    assert mine == theirs


def test_one_budget_for_all_and_another_number_of_processes(words: list[str], tmp_path: Path) -> None:
    """30 queries are three steps of 8, not three for each; one process then goes on, and two again."""
    limited = [*words, "--oracle.batch", "null", "--out", str(tmp_path)]
    done = torchrun("-m", "mekd", *limited, "--deprivatize.budget", "30")
    assert done.returncode == 1  # torchrun's own
    assert "deprivatize.budget is 30 queries and 24 are spent" in done.stderr and "needs 8" in done.stderr
    assert "step 3 of 9" in done.stderr
    assert accounts(tmp_path)["deprivatize"]["queries"] == 24
    assert json.loads((tmp_path / "oracle.json").read_text())["batch"] >= 1  # measured by one process, for both
    alone = [sys.executable, "-m", "mekd", *limited, "--deprivatize.budget", "47"]
    found = subprocess.run(alone, capture_output=True, text=True, timeout=300)
    assert found.returncode == 3 and "step 5 of 9" in found.stderr, found.stderr
    assert "1 processes go on from the checkpoint of 2" in found.stdout
    assert accounts(tmp_path)["deprivatize"]["queries"] == 40
    done = torchrun("-m", "mekd", *limited, "--deprivatize.budget", "72")
    assert done.returncode == 0, done.stderr
    assert accounts(tmp_path)["deprivatize"]["queries"] == 72
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["queries"] == 72 + 21 + 72 and summary["uncertain"] == 0


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("deprivatize.batch", "7", "deprivatize.batch is 7 images over all processes together; with 2 of them"),
        ("engine.batch_norm", "synchronised", "on the CPU it must be 'local'"),
    ],
)
def test_what_processes_cannot_share_is_refused(
    words: list[str], tmp_path: Path, setting: str, value: str, said: str
) -> None:
    done = torchrun("-m", "mekd", *words, f"--{setting}", value, "--out", str(tmp_path))
    assert done.returncode == 1 and said in done.stderr
    assert not (tmp_path / "checkpoints").exists() and accounts(tmp_path).get("deprivatize", {}).get("queries", 0) == 0


def test_an_error_of_one_process_ends_all(words: list[str], tmp_path: Path) -> None:
    """The other one waits for it in a collective and must not wait for ever."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise OSError('the disk is gone')"))
    done = torchrun(str(driver), "mekd.engine.deprivatize:take_step", "3", *words, "--out", str(tmp_path / "run"))
    assert done.returncode == 1 and "the disk is gone" in done.stderr


def test_rows_and_budgets_are_dealt_out_without_a_remainder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state: dict[str, Any] = {"world": 3}
    monkeypatch.setattr(parallel, "world", lambda: state["world"])
    monkeypatch.setattr(parallel, "rank", lambda: state["rank"])
    for count in (1, 2, 3, 7, 9):
        rows: list[int] = []
        for state["rank"] in range(3):
            rows += range(count)[parallel.part(count)]
        assert rows == list(range(count))
    # An account of a process that is no more still counts: here 5 of 20 queries, so each of three may ask 5.
    gone = Ledger("s", tmp_path, rank=4)
    gone.counts["queries"] = 5
    gone.settle()
    gone.close()
    state["rank"] = 0
    monkeypatch.setattr(parallel, "sum_of", lambda *numbers: list(numbers))
    ledger = parallel.deal(Ledger("s", tmp_path, budget=20), tmp_path)
    assert ledger.left == 5
