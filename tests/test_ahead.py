"""The oracle asked a batch ahead by a thread: the same run as in line, and nothing that goes wrong there is lost."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forked import KILL, MAIN, Server, is_killed
from ledger_teacher import Teacher, accounts, connect
from mekd import cli
from mekd.engine import feeds
from mekd.engine.feeds import Ahead, Asked
from mekd.engine.run import Run
from mekd.engine.stages import STAGES
from mekd.engine.worker import Worker
from mekd.errors import Diverged
from mekd.oracle.base import Oracle
from mekd.oracle.ledger import Ledger
from mekd.oracle.response import AnswerError, Response
from test_resume import assert_equal_runs

AHEAD = "import mekd.engine.feeds\nmekd.engine.feeds.asks_ahead = lambda run: True\n"


def ahead(draw: Callable[[int], Tensor], teacher: Teacher | None = None, every: int = 100, steps: int = 6) -> Ahead:
    worker, oracle = Worker("oracle"), connect(Ledger("s"), teacher)
    return Ahead(
        "distill",
        lambda step: (draw(step), torch.empty(2, 0)),
        lambda step: 2,
        oracle,
        worker=worker,
        every=every,
        steps=steps,
        device=CPU,
    )


CPU = torch.device("cpu")


def drawn(step: int) -> Tensor:
    return torch.full((2, 1, 2, 3), step / 10)


def test_answers_come_in_order_and_one_step_ahead() -> None:
    calls: list[tuple[int, str]] = []

    def draw(step: int) -> Tensor:
        calls.append((step, threading.current_thread().name))
        return drawn(step)

    feed = ahead(draw, every=3)
    for step in range(6):
        assert feed.owes(step) == (2 if step % 3 == 0 else 0)  # never asked past a checkpoint
        asked: Asked = feed.take(step)
        assert int(asked.images[0, 0, 0, 0]) == round((step / 10 + 1) * 127.5)
        assert feed.state_dict() == {"images": 2 * step + 2}
        assert len(calls) == step + 1 + ((step + 1) % 3 != 0)
    assert [step for step, _ in calls] == list(range(6))
    assert {name for _, name in calls} == {"oracle"}


def test_a_step_and_the_next_query_overlap() -> None:
    begun = threading.Event()

    def draw(step: int) -> Tensor:
        if step == 1:
            begun.set()
        return drawn(step)

    feed = ahead(draw)
    feed.take(0)
    assert begun.wait(10), "the next step is asked for while this one is taken"


def test_an_error_surfaces_with_its_cause_and_leaves_no_answer() -> None:
    def draw(step: int) -> Tensor:
        if step == 1:
            raise AnswerError("the teacher answered nonsense") from OSError("the line broke")
        return drawn(step)

    feed = ahead(draw)
    feed.take(0)
    assert feed.state_dict() == {"images": 2}
    with pytest.raises(AnswerError, match="nonsense") as caught:
        feed.take(1)
    assert isinstance(caught.value.__cause__, OSError)
    assert any(frame.name == "draw" for frame in caught.traceback)


def test_nan_is_not_paid_for() -> None:
    """Converted to pixels it would be black."""
    teacher = Teacher()
    feed = ahead(lambda step: drawn(step).where(torch.tensor(step != 1), torch.nan), teacher)
    feed.take(0)
    with pytest.raises(Diverged, match=r"distill: the generator draws NaN at step 1, nothing was sent"):
        feed.take(1)
    assert teacher.seen == 2 and feed.oracle.ledger.spent == 2


def test_the_thread_ends_and_lets_go() -> None:
    import gc
    import weakref

    worker, held = Worker("ending"), Teacher()
    gone = weakref.ref(held)
    assert worker.submit(lambda held=held: held.seen).result() == 0  # type: ignore[misc]
    del held
    worker.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(t.name == "ending" for t in threading.enumerate()):
        time.sleep(0.01)
    gc.collect()
    assert gone() is None and not any(t.name == "ending" for t in threading.enumerate())


class Dying(Oracle):
    """Passes questions on from the thread that it was opened on, until the third one."""

    def __init__(self, oracle: Oracle, left: list[int]) -> None:
        self.__dict__.update(vars(oracle))
        self._inner, self._left, self._thread = oracle, left, threading.current_thread().name

    def _send(self, images: Tensor) -> Response:
        assert threading.current_thread().name == self._thread, "a session lives on one thread"
        assert self._thread == "oracle" or self.ledger.name != "distill"
        self._left[0] -= 1
        if self._left[0] == 0:
            raise AnswerError("the teacher is gone")
        return self._inner._send(images)


def test_a_run_whose_teacher_dies_says_so_and_goes_on_later(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "asks_ahead", lambda run: True)
    parsed = cli.parse([*tiny, "--oracle.response", "label", "--out", str(tmp_path / "run")])
    assert parsed is not None
    with pytest.raises(AnswerError, match="the teacher is gone"):
        for stage in STAGES.values():
            stage(
                Run(
                    *parsed,
                    wrap_oracle=lambda oracle: Dying(oracle, [5]) if oracle.ledger.name == "distill" else oracle,
                )
            )
    for stage in STAGES.values():
        stage(Run(*parsed, wrap_oracle=lambda oracle: Dying(oracle, [-1])))
    monkeypatch.undo()
    expected = cli.parse([*tiny, "--oracle.response", "label", "--out", str(tmp_path / "in line")])
    assert expected is not None
    for stage in STAGES.values():
        stage(Run(*expected))
    assert_equal_runs(tmp_path / "run", tmp_path / "in line", uncertain=8)


@pytest.mark.parametrize(
    ("target", "count", "when"),
    [
        # While a step is taken, the next one's question is under way: it may be lost.
        ("mekd.engine.distill:MEKDLoss.terms", 3, "after"),
        # The thread is killed with the rest in the middle of a question.
        ("mekd.oracle.ledger:Ledger.record", 15, "before"),
    ],
)
def test_killed_and_resumed_as_if_nothing_was(
    processes: Server, tiny: list[str], tmp_path: Path, target: str, count: int, when: str
) -> None:
    words, out = ["run", *tiny], tmp_path / "killed"
    assert processes.run(*words, "--out", str(tmp_path / "expected")).returncode == 0
    done = processes.run(target, str(count), when, *words, "--out", str(out), code=AHEAD + KILL)
    assert is_killed(done), done.stderr
    assert processes.run(*words, "--out", str(out), code=AHEAD + MAIN).returncode == 0
    uncertain = sum(account["uncertain"] for account in accounts(out).values())
    assert uncertain <= 8
    assert_equal_runs(out, tmp_path / "expected", uncertain=uncertain)


def test_ctrl_c_while_a_query_is_under_way(processes: Server, tiny: list[str], tmp_path: Path) -> None:
    """The teacher takes its time over every question of step 2; the stage stops, saved, and the answer is kept."""
    slow = AHEAD + (
        "import sys, time\nfrom mekd.cli import main\nfrom mekd.oracle.base import Oracle\nquery = Oracle.query\n"
        "asked = sys.argv.pop(1)\n"
        "def slow(self, images):\n"
        "    if self.ledger.name == 'distill':\n"
        "        open(asked, 'a').write('x')\n"
        "        time.sleep(0.5)\n"
        "    return query(self, images)\n"
        "Oracle.query = slow\nraise SystemExit(main(sys.argv[1:]))"
    )
    asked_file, words = tmp_path / "asked", ["run", *tiny, "--out"]
    running = processes.begin(str(asked_file), *words, str(tmp_path / "run"), code=slow)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (asked_file.exists() and len(asked_file.read_text()) >= 3):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    done = running.wait()
    assert done.returncode == 130, done.stderr
    assert "saved" in done.stderr and "Traceback" not in done.stderr
    for folder in ("run", "expected"):
        assert processes.run(*words, str(tmp_path / folder)).returncode == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "expected")
