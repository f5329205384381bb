"""The oracle asked a batch ahead by a thread: the same run as in line, and nothing that goes wrong there is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mekd import cli
from mekd.engine.ahead import Ahead, Asked
from mekd.engine.run import Run
from mekd.engine.stages import STAGES
from mekd.oracle.base import Oracle
from mekd.oracle.response import AnswerError, Response
from test_resume import DRIVER, assert_equal_runs

CPU = torch.device("cpu")
AHEAD = "from mekd.oracle.ort import OnnxOracle\nOnnxOracle.ahead = True\n"


def asked(step: int) -> Asked:
    return torch.full((1,), step), {"labels": torch.tensor([step])}


def test_answers_come_in_order_and_one_step_ahead() -> None:
    calls: list[tuple[int, str]] = []

    def ask(step: int) -> Asked:
        calls.append((step, threading.current_thread().name))
        return asked(step)

    ahead = Ahead(ask, lambda step: step % 3 != 0 and step < 6, CPU)
    for step in range(6):
        assert ahead.has(step) == (step % 3 != 0)
        assert int(ahead.take(step)[0]) == step
        assert ahead.answered() == int((step + 1) % 3 != 0)
        assert len(calls) == step + 1 + ahead.answered()
    assert [step for step, _ in calls] == list(range(6))
    assert {name for _, name in calls} == {"oracle"}


def test_a_step_and_the_next_query_overlap() -> None:
    begun = threading.Event()

    def ask(step: int) -> Asked:
        if step == 1:
            begun.set()
        return asked(step)

    ahead = Ahead(ask, lambda step: True, CPU)
    ahead.take(0)
    assert begun.wait(10), "the next step is asked for while this one is taken"


def test_an_error_surfaces_with_its_cause_and_leaves_no_answer() -> None:
    def ask(step: int) -> Asked:
        if step == 1:
            raise AnswerError("the teacher answered nonsense") from OSError("the line broke")
        return asked(step)

    ahead = Ahead(ask, lambda step: True, CPU)
    ahead.take(0)
    assert ahead.answered() == 0
    with pytest.raises(AnswerError, match="nonsense") as caught:
        ahead.take(1)
    assert isinstance(caught.value.__cause__, OSError)
    assert any(frame.name == "ask" for frame in caught.traceback)


def test_a_thread_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ahead, "_work", lambda self: None)
    ahead = Ahead(asked, lambda step: True, CPU)
    with pytest.raises(RuntimeError, match="ended without an answer"):
        ahead.take(0)


class Dying(Oracle):
    """Passes questions on from a thread, until the third one."""

    def __init__(self, oracle: Oracle, left: list[int]) -> None:
        self.__dict__.update(vars(oracle))
        self._inner, self._left, self.ahead = oracle, left, True

    def _send(self, images: Tensor) -> Response:
        assert threading.current_thread().name == "oracle" or len(images) == 20  # the holdout is asked in line
        self._left[0] -= 1
        if self._left[0] == 0:
            raise AnswerError("the teacher is gone")
        return self._inner._send(images)


def test_a_run_whose_teacher_dies_says_so_and_goes_on_later(tiny: list[str], tmp_path: Path) -> None:
    parsed = cli.parse([*tiny, "--oracle.response", "label", "--out", str(tmp_path / "run")])
    assert parsed is not None
    with pytest.raises(AnswerError, match="the teacher is gone"):
        for stage in STAGES.values():
            stage(
                Run(
                    *parsed,
                    wrap_oracle=lambda oracle: Dying(oracle, [5]) if oracle.ledger.stage == "distill" else oracle,
                )
            )
    for stage in STAGES.values():
        stage(Run(*parsed, wrap_oracle=lambda oracle: Dying(oracle, [-1])))
    expected = cli.parse([*tiny, "--oracle.response", "label", "--out", str(tmp_path / "in line")])
    assert expected is not None
    for stage in STAGES.values():
        stage(Run(*expected))
    assert_equal_runs(tmp_path / "run", tmp_path / "in line", uncertain=8)


@pytest.mark.parametrize(
    ("target", "count", "when", "uncertain"),
    [
        # While a step is taken, the next one's question is under way: it may be lost.
        ("mekd.engine.distill:MEKDLoss.terms", 3, "after", 8),
        # The thread is killed with the rest after its answer is in the journal.
        ("mekd.oracle.ledger:Ledger.record", 15, "after", 0),
    ],
)
def test_killed_and_resumed_as_if_nothing_was(
    tiny: list[str], tmp_path: Path, target: str, count: int, when: str, uncertain: int
) -> None:
    words = ["run", *tiny, "--evaluate.enabled", "true", "--evaluate.baseline", "false"]
    for folder, driver in (("expected", None), ("killed", AHEAD + DRIVER), ("killed", None)):
        launch = ["-m", "mekd"] if driver is None else ["-c", driver, target, str(count), when]
        if folder == "killed" and driver is None:
            launch = ["-c", AHEAD + "import sys\nfrom mekd.cli import main\nraise SystemExit(main(sys.argv[1:]))"]
        done = subprocess.run(
            [sys.executable, *launch, *words, "--out", str(tmp_path / folder)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == (-signal.SIGKILL if driver else 0), done.stderr
    found = sum(
        __import__("json").loads(path.read_text())["uncertain"]
        for path in (tmp_path / "killed" / "ledger").glob("*.json")
    )
    assert found <= uncertain
    assert_equal_runs(tmp_path / "killed", tmp_path / "expected", uncertain=found)


def test_ctrl_c_while_a_query_is_under_way(tiny: list[str], tmp_path: Path) -> None:
    """The teacher takes its time over every question of step 2; the stage stops, saved, and the answer is kept."""
    slow = AHEAD + (
        "import sys, time\nfrom mekd.cli import main\nfrom mekd.oracle.base import Oracle\nquery = Oracle.query\n"
        "def slow(self, images):\n"
        "    if self.ledger.stage == 'distill' and len(images) == 8:\n"
        "        open(sys.argv[1], 'a').write('x')\n"
        "        time.sleep(0.5)\n"
        "    return query(self, images)\n"
        "Oracle.query = slow\nraise SystemExit(main(sys.argv[2:]))"
    )
    words = ["run", *tiny, "--out", str(tmp_path / "run")]
    asked_file = tmp_path / "asked"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(asked_file), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (asked_file.exists() and len(asked_file.read_text()) >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "saved" in errors and "Traceback" not in errors
    for folder in ("run", "expected"):
        done = [sys.executable, "-m", "mekd", "run", *tiny, "--out", str(tmp_path / folder)]
        assert subprocess.run(done, capture_output=True, timeout=300, env=os.environ).returncode == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "expected")
