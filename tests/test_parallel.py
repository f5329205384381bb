"""Two processes under torchrun: the same queries as one, one budget, a killed process, another number of processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import FIND, KILL, Server, is_killed
from ledger_teacher import accounts, metrics
from mekd import files
from mekd.config import Config, DistillConfig
from mekd.engine import feeds, parallel
from mekd.engine.run import Run
from mekd.oracle.ledger import Ledger
from mekd.oracle.response import Response
from test_resume import assert_equal_trees

# Runs the command line; process 1 of the first attempt kills itself at the nth call of a function.
DRIVER = (
    FIND
    + """
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
)


def torchrun(*words: str, processes: int = 2, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *launch, f"--max-restarts={restarts}", *words],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def words(teacher_onnx: Path) -> list[str]:
    settings = {
        "data.name": "digits", "data.size": 16, "teacher.onnx": teacher_onnx, "oracle.batch": 64,
        "deprivatize.steps": 9, "deprivatize.batch": 8, "deprivatize.width": 0.1, "deprivatize.alpha": 0.5,
        "distill.steps": 9, "distill.batch": 8, "distill.holdout": 21, "distill.coverage": 0, "distill.eval_every": 3,
        "engine.checkpoint_every": 4, "engine.log_every": 3, "engine.device": "cpu",
        "evaluate.enabled": "true", "evaluate.baseline_steps": 6,
    }  # fmt: skip
    return ["run", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def undisturbed(processes: Server, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    done = processes.together(2, *words, "--out", str(out))
    assert [one.returncode for one in done] == [0, 0], done
    return out


def test_two_processes_ask_what_one_asks(
    processes: Server, words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    alone = processes.run(*words, "--out", str(tmp_path))
    assert alone.returncode == 0, alone.stderr
    mine, theirs = accounts(undisturbed), accounts(tmp_path)
    for account in (*mine.values(), *theirs.values()):
        account.pop("calls")  # two processes send twice as many, of half the images
    assert mine == theirs
    assert [mine[name]["queries"] for name in ("deprivatize", "holdout", "distill")] == [72, 21, 72]
    two, one = (json.loads((out / "evaluate.json").read_text()) for out in (undisturbed, tmp_path))
    for key in ("test_images", "teacher_accuracy", "simulation_queries"):
        assert two[key] == one[key]
    # One line of metrics a step, of the first process.
    steps = [(row["stage"], row["step"]) for row in metrics(undisturbed)]
    assert steps == [(row["stage"], row["step"]) for row in metrics(tmp_path)]
    # What two asked of real images, one finds.
    out, paid = Path(shutil.copytree(undisturbed, tmp_path / "two")), accounts(undisturbed)
    (out / "checkpoints" / "baseline.pt").unlink()
    done = processes.run("evaluate", *words[1:], "--out", str(out))
    assert done.returncode == 0 and accounts(out) == paid, done.stderr
    again = json.loads((out / "evaluate.json").read_text())
    assert {key: again[key] for key in two if "baseline" not in key} == {
        key: value for key, value in two.items() if "baseline" not in key
    }


@pytest.mark.slow
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


def test_one_budget_for_all_and_another_number_of_processes(
    processes: Server, words: list[str], tmp_path: Path
) -> None:
    """30 queries are three steps of 8, not three for each; one process then goes on, and two again."""
    limited = [*words, "--oracle.batch", "null", "--evaluate.enabled", "false", "--out", str(tmp_path)]
    for done in processes.together(2, *limited, "--deprivatize.budget", "30"):
        assert done.returncode == 3
        assert "deprivatize.budget is 30 queries and 24 are spent" in done.stderr and "needs 8" in done.stderr
        assert "step 3 of 9" in done.stderr
    assert accounts(tmp_path)["deprivatize"]["queries"] == 24
    assert json.loads((tmp_path / "oracle.json").read_text())["batch"] >= 1  # measured by one process, for both
    found = processes.run(*limited, "--deprivatize.budget", "47")
    assert found.returncode == 3 and "step 5 of 9" in found.stderr, found.stderr
    assert "1 processes go on from the checkpoint of 2" in found.stdout
    assert accounts(tmp_path)["deprivatize"]["queries"] == 40
    assert [done.returncode for done in processes.together(2, *limited, "--deprivatize.budget", "72")] == [0, 0]
    assert accounts(tmp_path)["deprivatize"]["queries"] == 72
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["queries"] == 72 + 21 + 72 and summary["uncertain"] == 0


@pytest.mark.parametrize(("begun", "now"), [(2, 1), (1, 2)])
def test_another_number_before_the_first_checkpoint_is_told_how_to_go_on(
    begun: int, now: int, processes: Server, words: list[str], tmp_path: Path
) -> None:
    """What is paid is found by as many processes alone: the others are told so, and pay nothing."""
    stage = ["deprivatize", *words[1:], "--out", str(tmp_path)]
    target = ["mekd.engine.deprivatize:take_step", "3", "before"]
    killed = processes.together(begun, *target, *stage, code=KILL)
    assert any(is_killed(done) for done in killed) and not list((tmp_path / "checkpoints").glob("*")), killed
    paid = accounts(tmp_path)["deprivatize"]["queries"]
    assert 2 * 8 <= paid <= 3 * 8
    for done in processes.together(now, *stage):
        assert done.returncode == 2 and f"{paid} queries are paid" in done.stderr, done
        assert (
            "Go on with 2 processes (under torchrun" if begun == 2 else "Go on with one process (without"
        ) in done.stderr
    assert accounts(tmp_path)["deprivatize"]["queries"] == paid
    for done in processes.together(begun, *stage):
        assert done.returncode == 0, done.stderr
    found = accounts(tmp_path)["deprivatize"]
    assert found["queries"] == 72 and found["uncertain"] <= 8


@pytest.mark.parametrize(("begun", "now"), [(2, 1), (1, 2)])
def test_another_number_in_the_middle_of_the_simulation_is_told_how_to_go_on(
    begun: int, now: int, processes: Server, words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """What evaluate has paid for and not yet kept is found by as many processes alone."""
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    for path in [*(out / "checkpoints").glob("evaluate-*"), *(out / "ledger").glob("evaluate-*")]:
        path.unlink()
    asks = ["--evaluate.ask_teacher", "true", "--evaluate.baseline", "true"]
    stage = ["evaluate", *words[1:], "--oracle.price", "0.001", *asks, "--out", str(out)]
    killed = processes.together(begun, "mekd.engine.asked:keep", "1", "before", *stage, code=KILL)
    assert any(is_killed(done) for done in killed), killed
    paid = accounts(out)["evaluate-test"]["queries"]
    assert paid == 360
    for done in processes.together(now, *stage):
        assert done.returncode == 2 and "evaluate-test was begun with" in done.stderr, done
        assert "once all of them are answered, any number goes on" in done.stderr
    assert accounts(out)["evaluate-test"]["queries"] == paid
    for count in (begun, now):
        assert [done.returncode for done in processes.together(count, *stage)] == [0] * count
        found = accounts(out)
        assert (found["evaluate-test"]["queries"], found["evaluate-private"]["queries"]) == (paid, 144)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("deprivatize.batch", "7", "deprivatize.batch is 7 images over all processes together; with 2 of them"),
        ("engine.batch_norm", "synchronised", "on the CPU it must be 'local'"),
    ],
)
def test_what_processes_cannot_share_is_refused(
    processes: Server, words: list[str], tmp_path: Path, setting: str, value: str, said: str
) -> None:
    for done in processes.together(2, *words, f"--{setting}", value, "--out", str(tmp_path)):
        assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.iterdir()), "something was written before it was refused"


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(words: list[str], tmp_path: Path) -> None:
    """The other one waits for it in a collective and must not wait for ever."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise OSError('the disk is gone')"))
    done = torchrun(str(driver), "mekd.engine.deprivatize:take_step", "3", *words, "--out", str(tmp_path / "run"))
    assert done.returncode == 1 and "the disk is gone" in done.stderr


def test_rows_and_budgets_are_dealt_out_without_a_remainder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state: dict[str, Any] = {"world": 3}
    run = Run(Config(distill=DistillConfig(budget=20)), tmp_path)
    monkeypatch.setattr(parallel, "world", lambda: state["world"])
    monkeypatch.setattr(parallel, "rank", lambda: state["rank"])
    for count in (1, 2, 3, 7, 9):
        rows: list[int] = []
        for state["rank"] in range(3):
            rows += range(count)[parallel.part(count)]
        assert rows == list(range(count))
    # An account of a process that is no more still counts: here 5 of 20 queries, and 6 of the holdout's, so each of
    # three may ask 3.
    for name, rank, spent in (("distill", 4, 5), ("holdout", 0, 6)):
        gone = Ledger(name, tmp_path / "ledger", rank=rank)
        images = torch.zeros(spent, 1, 2, 2, dtype=torch.uint8)
        sent = gone.intend(images)
        gone.record(sent, images, Response("label", None, torch.zeros(spent, dtype=torch.int64)))
        gone.close()
    state["rank"] = 0
    monkeypatch.setattr(parallel, "rank", lambda: state["rank"])
    monkeypatch.setattr(parallel, "sum_of", lambda *numbers: list(numbers))
    monkeypatch.setattr(parallel, "barrier", lambda: None)
    account = feeds.open_account(run, "distill", "distill")
    assert account.left == 3 and account.elsewhere == 11
    account.close()
