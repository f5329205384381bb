"""kill -9 at any moment, Ctrl-C, a spent budget: the finished run equals the undisturbed one bit for bit."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import KILL, Server, is_killed
from ledger_teacher import accounts, metrics
from mekd import cli, files

# Each moment is one that has gone wrong in somebody's code: the comment says what would be lost.
MOMENTS = [
    # The call is booked and sent, its answer is not booked: it may be counted again.
    ("mekd.oracle.ledger:Ledger.record", 3, "before"),
    # The answer is being booked, in the middle of its transaction: the other one that may.
    ("mekd.oracle.ledger:insert", 2, "after"),
    # A checkpoint is written, but not yet under its name.
    ("mekd.files:os.replace", 2, "before"),
    # The checkpoint has its name, the ledger has not settled: it holds more than is needed.
    ("mekd.engine.checkpoint:files.save", 1, "after"),
    # The ledger has settled.
    ("mekd.oracle.ledger:Ledger.settle", 1, "after"),
    # In step 2: the holdout is asked, the student has not begun.
    ("mekd.engine.distill:MEKDLoss.terms", 1, "before"),
    ("mekd.engine.distill:MEKDLoss.terms", 4, "after"),
    # The student is trained, its files are not written.
    ("mekd.engine.distill:write_student", 1, "before"),
    # In the simulation: between the answers and the baseline's training, and within it.
    ("mekd.oracle.ledger:Ledger.settle", 1, "before"),
    ("mekd.engine.evaluate:functional.kd_loss", 3, "after"),
]

# An answer is booked while the run goes on, and a kill may come first: here the run waits for it, so that what is
# lost is known. The first two moments are those that lose an answer.
BOOKED = """
from mekd.oracle.ledger import Ledger
def record(self, *arguments, record=Ledger.record):
    record(self, *arguments)
    self._booked.result()
Ledger.record = record
"""


def assert_equal_runs(out: Path, expected: Path, uncertain: int = 0) -> None:
    """The same weights, the same metrics, the same accounts but for what was uncertain."""
    found, wanted = files.load(out / "student.pt"), files.load(expected / "student.pt")
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    for name in ("deprivatize", "distill"):
        a, b = (files.load(folder / "checkpoints" / f"{name}.pt")["state"] for folder in (out, expected))
        assert_equal_trees(a, b)
    assert metrics(out) == metrics(expected)
    mine, theirs = accounts(out), accounts(expected)
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
        "deprivatize.steps": 9, "deprivatize.batch": 8, "deprivatize.width": 0.1, "deprivatize.alpha": 0.5,
        "distill.steps": 9, "distill.batch": 8, "distill.holdout": 20, "distill.coverage": 0, "distill.eval_every": 3,
        "engine.checkpoint_every": 4, "engine.log_every": 2, "engine.device": "cpu",
        "evaluate.enabled": "true", "evaluate.baseline_steps": 6,
        # What auto measures on a busy machine may differ from one run to the next.
        "deprivatize.precision": "bfloat16", "distill.precision": "bfloat16",
    }  # fmt: skip
    return ["run", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def undisturbed(processes: Server, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    done = processes.run(*words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def test_killed_at_every_moment(processes: Server, words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """One run that is killed again and again, at another place each time, and then left alone."""
    killed = 0
    for target, count, when in MOMENTS:
        done = processes.run(target, str(count), when, *words, "--out", str(tmp_path), code=BOOKED + KILL)
        assert is_killed(done) or done.returncode == 0, done.stderr
        killed += is_killed(done)
    assert killed == len(MOMENTS), "a moment was never reached"
    done = processes.run(*words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path, undisturbed, uncertain=16)


def test_killed_while_a_replay_store_is_filled(processes: Server, words: list[str], tmp_path: Path) -> None:
    replay = [*words, "--distill.replay", "700", "--distill.keep", "bfloat16", "--distill.holdout", "300"]
    replay += ["--engine.checkpoint_every", "2", "--evaluate.enabled", "false"]
    replay += ["--distill.augment", "true"]
    out, expected = tmp_path / "killed", tmp_path / "undisturbed"
    assert processes.run(*replay, "--out", str(expected)).returncode == 0
    for target, count, when in [
        ("mekd.oracle.replay:Replay.write", 4, "before"),
        ("mekd.oracle.replay:Replay.read", 3, "after"),
    ]:
        assert is_killed(done := processes.killed(target, count, when, *replay, "--out", str(out))), done.stderr
    assert processes.run(*replay, "--out", str(out)).returncode == 0
    found = accounts(out)
    assert sum(account["uncertain"] for account in found.values()) <= 256  # its answer may not have been booked yet
    assert_equal_runs(out, expected, uncertain=sum(account["uncertain"] for account in found.values()))
    for name in ("images", "values"):
        assert (out / "replay" / f"{name}.npy").read_bytes() == (expected / "replay" / f"{name}.npy").read_bytes()


def test_ctrl_c_saves_and_the_same_command_goes_on(processes: Server, words: list[str], tmp_path: Path) -> None:
    long = [*words, "--deprivatize.steps", "60", "--engine.checkpoint_every", "1000", "--evaluate.enabled", "false"]
    long += ["--deprivatize.augment", "true"]
    out, expected = tmp_path / "stopped", tmp_path / "undisturbed"
    running = processes.begin(*long, "--out", str(out))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    done = running.wait()
    assert done.returncode == 130
    assert "saved" in done.stderr and "Traceback" not in done.stderr
    step = files.load(out / "checkpoints" / "deprivatize.pt")["step"]
    assert 2 <= step < 60, "it was stopped in the middle"
    for folder in (out, expected):
        done = processes.run(*long, "--out", str(folder))
        assert done.returncode == 0, done.stderr
    assert_equal_runs(out, expected)


def test_a_stop_before_the_first_answer_is_not_final(
    processes: Server, words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """Ctrl-C before any step of a stage: what is saved there is nothing yet, and the same command goes on from it."""
    stop = (
        "import sys\nfrom mekd.engine import checkpoint\n"
        "name, restore = sys.argv.pop(1), checkpoint.Checkpoint.restore\n"
        "def restored(self, log):\n"
        "    if self.name == name: checkpoint._asked_to_stop.set()\n"
        "    return restore(self, log)\n"
        "checkpoint.Checkpoint.restore = restored\n"
        "from mekd.cli import main\nraise SystemExit(main(sys.argv[1:]))\n"
    )
    for stage in ("deprivatize", "holdout", "distill", "baseline"):
        done = processes.run(stage, *words, "--out", str(tmp_path), code=stop)
        assert done.returncode == 130 and f"{stage} stopped at step 0" in done.stderr, done.stderr
    assert processes.run(*words, "--out", str(tmp_path)).returncode == 0
    assert_equal_runs(tmp_path, undisturbed)


def test_a_spent_budget_ends_the_stage_saved(
    processes: Server, words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """Step 1 may ask 30 queries: three steps of 8 fit, the fourth is not begun; a larger budget finishes the run."""
    out = tmp_path
    done = processes.run(*words, "--out", str(out), "--deprivatize.budget", "30")
    assert done.returncode == 3
    assert "deprivatize.budget is 30" in done.stderr and "24 are spent" in done.stderr
    assert "step 3 of 9" in done.stderr and "larger --deprivatize.budget" in done.stderr
    assert files.load(out / "checkpoints" / "deprivatize.pt")["step"] == 3
    assert accounts(out)["deprivatize"]["queries"] == 24
    done = processes.run(*words, "--out", str(out), "--deprivatize.budget", "72", "--distill.budget", "50")
    assert done.returncode == 3 and "distill.budget is 50 queries and 44 are spent" in done.stderr, done.stderr
    found = accounts(out)
    assert found["holdout"]["queries"] == 20 and found["distill"]["queries"] == 3 * 8
    done = processes.run(*words, "--out", str(out), "--deprivatize.budget", "72", "--distill.budget", "92")
    assert done.returncode == 0, done.stderr
    assert_equal_runs(out, undisturbed)


def test_a_budget_that_cannot_reach_is_refused_before_anything_is_paid(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting, value, least in [
        ("deprivatize.budget", "7", "less than the 8"), ("distill.budget", "19", "at least 28"),
    ]:  # fmt: skip
        assert cli.main([*words, "--out", str(tmp_path), f"--{setting}", value]) == 2
        said = capsys.readouterr().err
        assert f"{setting} is {value}" in said and least in said
    assert cli.main([*words, "--out", str(tmp_path), "--distill.replay", "40", "--distill.budget", "59"]) == 2
    assert "at least 60" in capsys.readouterr().err
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_accepting_a_generator_as_it_is(words: list[str], tmp_path: Path) -> None:
    """What the message of a spent budget offers besides: fewer steps of step 1."""
    limited = [*words, "--deprivatize.budget", "30", "--evaluate.enabled", "false", "--out", str(tmp_path)]
    assert cli.main(limited) == 3
    assert cli.main([*limited, "--deprivatize.steps", "3"]) == 0
    assert accounts(tmp_path)["deprivatize"]["queries"] == 24


def test_another_student_keeps_the_answers_that_are_paid_for(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Holdout and replay depend on teacher, generator, response and transport alone."""
    replay = [*words, "--evaluate.enabled", "false", "--distill.replay", "40", "--out", str(tmp_path)]
    assert cli.main(replay) == 0
    paid, config = accounts(tmp_path), (tmp_path / "config.yaml").read_bytes()
    another = ["--distill.lr", "0.01", "--distill.student", "resnet20"]
    capsys.readouterr()
    assert cli.main([*replay, *another, "--seed", "1"]) == 2
    assert (tmp_path / "config.yaml").read_bytes() == config, "a refused run has changed the folder"
    capsys.readouterr()
    assert cli.main([*replay, *another]) == 0
    assert accounts(tmp_path) == paid and (tmp_path / "student-resnet8.onnx").exists()
    capsys.readouterr()
    assert cli.main([*replay, *another, "--oracle.response", "topk"]) == 2  # other answers are other answers
    assert "oracle.response was 'probs' and is 'topk'" in capsys.readouterr().err
    assert cli.main([*replay, *another, "--deprivatize.steps", "12"]) == 2  # and so are another generator's
    assert "Say --deprivatize.steps 9" in capsys.readouterr().err
    assert accounts(tmp_path) == paid


def test_a_generator_whose_images_were_asked_about_is_trained_no_further(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 1 as a command of its own: another generator would make the paid store useless for good."""
    replay = [*words, "--evaluate.enabled", "false", "--distill.replay", "40", "--out", str(tmp_path)]
    assert cli.main(replay) == 0
    saved, config = (tmp_path / "checkpoints" / "deprivatize.pt"), (tmp_path / "config.yaml").read_bytes()
    generator = saved.read_bytes()
    alone = ["deprivatize", *replay[1:]]
    assert cli.main([*alone, "--deprivatize.steps", "12"]) == 2
    said = capsys.readouterr().err
    assert "holdout.pt is of the generator at step 9" in said and "Say --deprivatize.steps 9" in said
    assert saved.read_bytes() == generator and (tmp_path / "config.yaml").read_bytes() == config
    assert cli.main([*alone, "--deprivatize.steps", "9"]) == 0, "its advice works"
    saved.rename(tmp_path / "elsewhere.pt")
    assert cli.main(alone) == 2
    assert "deprivatize.pt is missing" in (said := capsys.readouterr().err) and "put it back" in said
    (tmp_path / "elsewhere.pt").rename(saved)
    assert cli.main(replay) == 0


def test_another_student_of_fresh_queries_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answers were not kept: it would pay for them anew."""
    fresh = [*words, "--evaluate.enabled", "false", "--distill.replay", "0", "--out", str(tmp_path)]
    assert cli.main(fresh) == 0
    capsys.readouterr()
    assert cli.main([*fresh, "--distill.student", "resnet20"]) == 2
    said = capsys.readouterr().err
    assert "distill.student was 'resnet8' and is 'resnet20'" in said and "another --out" in said


def test_a_ledger_of_another_run_is_refused(words: list[str], tmp_path: Path, capsys: Any) -> None:
    """Answers belong to the images that were asked: a checkpoint that went missing is not papered over."""
    out = tmp_path
    assert cli.main([*words, "--out", str(out), "--deprivatize.budget", "40"]) == 3
    os.remove(out / "checkpoints" / "deprivatize.pt")
    assert cli.main([*words, "--out", str(out)]) == 2
    assert "its checkpoint is missing or older" in capsys.readouterr().err
