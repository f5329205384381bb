"""kill -9 at any moment, Ctrl-C, a spent budget: the finished run equals the undisturbed one bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mekd import cli, files

# Runs the command line, and kills itself at the nth call of a function: before it, or once it has returned.
DRIVER = """
import importlib, os, signal, sys
target, count, when, *words = sys.argv[1:]
module, _, path = target.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
original, left = getattr(owner, name), [int(count)]
def patched(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, patched)
from mekd.cli import main
raise SystemExit(main(words))
"""

# Each moment is one that has gone wrong in somebody's code: the comment says what would be lost.
MOMENTS = [
    # The request is journalled and sent, its answer is not: the only query that may be counted again.
    ("mekd.oracle.ledger:Ledger.record", 3, "before"),
    # The answer is journalled, nothing is computed from it yet.
    ("mekd.oracle.ledger:Ledger.record", 1, "after"),
    # A checkpoint is written, but not yet under its name.
    ("mekd.files:os.replace", 4, "before"),
    # The checkpoint has its name, the ledger has not settled: the journal holds more than is needed.
    ("mekd.engine.loop:files.save", 1, "after"),
    # The ledger's snapshot is written, its journal is not yet cut.
    ("mekd.files:write_text", 6, "after"),
    # In step 2: the holdout is asked, the student has not begun.
    ("mekd.engine.distill:MEKDLoss.terms", 1, "before"),
    ("mekd.engine.distill:MEKDLoss.terms", 4, "after"),
    # The student is trained, its files are not written.
    ("mekd.engine.distill:export", 1, "before"),
    # In the simulation: between the answers and the baseline's training, and within it.
    ("mekd.oracle.ledger:Ledger.settle", 1, "before"),
    ("mekd.engine.evaluate:functional.kd_loss", 3, "after"),
]


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, **options)


def ledgers(out: Path) -> dict[str, dict[str, int]]:
    return {path.name: json.loads(path.read_text()) for path in sorted((out / "ledger").glob("*.json"))}


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what was left of a budget that only one of two runs had."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "budget_left"} for row in rows]


def assert_equal_runs(out: Path, expected: Path, uncertain: int = 0) -> None:
    """The same weights, the same metrics, the same ledger but for what was uncertain."""
    found, wanted = files.load(out / "student.pt"), files.load(expected / "student.pt")
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    for name in ("deprivatize", "distill"):
        a, b = (files.load(folder / "checkpoints" / f"{name}.pt")["state"] for folder in (out, expected))
        assert_equal_trees(a, b)
    assert metrics(out) == metrics(expected)
    mine, theirs = ledgers(out), ledgers(expected)
    assert sum(account.pop("uncertain") for account in mine.values()) == uncertain
    assert sum(account.pop("uncertain") for account in theirs.values()) == 0
    assert mine == theirs


def assert_equal_trees(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="module")
def words(teacher_onnx: Path) -> list[str]:
    settings = {
        "data.name": "digits", "data.size": 16, "teacher.onnx": teacher_onnx, "oracle.batch": 64,
        "deprivatize.steps": 9, "deprivatize.batch": 8, "deprivatize.width": 0.1,
        "distill.steps": 9, "distill.batch": 8, "distill.holdout": 20, "distill.eval_every": 3,
        "engine.checkpoint_every": 4, "engine.log_every": 2, "engine.device": "cpu",
        "evaluate.enabled": "true", "evaluate.baseline_steps": 6,
    }  # fmt: skip
    return ["run", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    done = python("-m", "mekd", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def test_killed_at_every_moment(words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """One run that is killed again and again, at another place each time, and then left alone."""
    killed = 0
    for target, count, when in MOMENTS:
        done = python("-c", DRIVER, target, str(count), when, *words, "--out", str(tmp_path))
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        killed += done.returncode != 0
    assert killed == len(MOMENTS), "a moment was never reached"
    done = python("-m", "mekd", *words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path, undisturbed, uncertain=8)


def test_killed_while_a_replay_store_is_filled(words: list[str], tmp_path: Path) -> None:
    replay = [
        *words,
        "--distill.replay",
        "700",
        "--distill.keep",
        "bfloat16",
        "--distill.holdout",
        "300",
        "--engine.checkpoint_every",
        "2",
    ]
    out, expected = tmp_path / "killed", tmp_path / "undisturbed"
    assert python("-m", "mekd", *replay, "--out", str(expected)).returncode == 0
    moments = [("mekd.oracle.replay:Replay.write", 4, "before"), ("mekd.oracle.replay:Replay.read", 3, "after")]
    for target, count, when in moments:
        done = python("-c", DRIVER, target, str(count), when, *replay, "--out", str(out))
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert python("-m", "mekd", *replay, "--out", str(out)).returncode == 0
    assert_equal_runs(out, expected)
    for name in ("images", "values"):
        assert (out / "replay" / f"{name}.npy").read_bytes() == (expected / "replay" / f"{name}.npy").read_bytes()


def test_ctrl_c_saves_and_the_same_command_goes_on(words: list[str], tmp_path: Path) -> None:
    long = [*words, "--deprivatize.steps", "60", "--engine.checkpoint_every", "1000"]
    out, expected = tmp_path / "stopped", tmp_path / "undisturbed"
    process = subprocess.Popen(
        [sys.executable, "-m", "mekd", *long, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "saved" in errors and "Traceback" not in errors
    step = files.load(out / "checkpoints" / "deprivatize.pt")["step"]
    assert 2 <= step < 60, "it was stopped in the middle"
    for folder in (out, expected):
        done = python("-m", "mekd", *long, "--out", str(folder))
        assert done.returncode == 0, done.stderr
    assert_equal_runs(out, expected)


def test_a_spent_budget_ends_the_stage_saved(words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """Step 1 may ask 30 queries: three steps of 8 fit, the fourth is not begun; a larger budget finishes the run."""
    out = tmp_path
    done = python("-m", "mekd", *words, "--out", str(out), "--deprivatize.budget", "30")
    assert done.returncode == 3
    assert "deprivatize.budget is 30" in done.stderr and "24 are spent" in done.stderr
    assert "step 3 of 9" in done.stderr and "larger --deprivatize.budget" in done.stderr
    assert files.load(out / "checkpoints" / "deprivatize.pt")["step"] == 3
    assert ledgers(out)["deprivatize.json"]["queries"] == 24
    done = python("-m", "mekd", *words, "--out", str(out), "--deprivatize.budget", "72", "--distill.budget", "50")
    assert done.returncode == 3 and "distill.budget is 50" in done.stderr
    assert ledgers(out)["distill.json"]["queries"] == 20 + 3 * 8
    done = python("-m", "mekd", *words, "--out", str(out), "--deprivatize.budget", "72", "--distill.budget", "92")
    assert done.returncode == 0, done.stderr
    assert_equal_runs(out, undisturbed)


def test_accepting_a_generator_as_it_is(words: list[str], tmp_path: Path) -> None:
    """What the message of a spent budget offers besides: fewer steps of step 1."""
    limited = [*words, "--deprivatize.budget", "30", "--out", str(tmp_path)]
    assert cli.main(limited) == 3
    assert cli.main([*limited, "--deprivatize.steps", "3"]) == 0
    assert ledgers(tmp_path)["deprivatize.json"]["queries"] == 24


def test_a_journal_of_another_run_is_refused(words: list[str], tmp_path: Path, capsys: Any) -> None:
    """Answers belong to the images that were asked: a checkpoint that went missing is not papered over."""
    out = tmp_path
    assert cli.main([*words, "--out", str(out), "--deprivatize.budget", "40"]) == 3
    os.remove(out / "checkpoints" / "deprivatize.pt")
    assert cli.main([*words, "--out", str(out)]) == 2
    assert "its checkpoint is missing or older" in capsys.readouterr().err
