"""The account: nothing is paid for twice, and the budget is hard."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ledger_teacher import Cut, Teacher, Unplugged, ask, batch, connect, counts, lose, rows, same, total
from mekd.engine.feeds import Fresh
from mekd.oracle import ledger_file
from mekd.oracle.ledger import BudgetSpent, Ledger, LedgerError, totals
from mekd.oracle.response import Response

# -- counts, budget, price ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
def test_counts(tmp_path: Path, kept: bool) -> None:
    ledger = Ledger("s", tmp_path if kept else None)
    oracle = connect(ledger)
    for m in (2, 5, 1):
        oracle.query(batch(m, m))
    ledger.close()
    assert ledger.counts == total(1, 8) | {"calls": 3}
    assert ledger.spent == 8 and ledger.left is None and ledger.affords(10**9)
    assert str(ledger) == "8 queries, 0.0 MB up, 0.0 MB down"


@pytest.mark.parametrize("kept", [False, True])
def test_a_budget_is_hard(tmp_path: Path, kept: bool) -> None:
    teacher = Teacher()
    ledger = Ledger("distill", tmp_path if kept else None, budget=7)
    oracle = connect(ledger, teacher)
    oracle.query(batch(0, 4))
    assert ledger.left == 3 and ledger.affords(3) and not ledger.affords(4)
    before = dict(ledger.counts)
    with pytest.raises(BudgetSpent, match=r"distill.budget is 7 queries, 4 are spent and the next call has 4"):
        oracle.query(batch(1, 4))
    # Neither sent, nor counted, nor booked.
    assert teacher.seen == 4 and ledger.counts == before
    if kept:
        assert ledger._booked is not None
        ledger._booked.result()
        assert totals(tmp_path, "distill") == before
    # The request that just fits is allowed, and the next image is not.
    oracle.query(batch(1, 3))
    assert ledger.left == 0 and teacher.seen == 7
    with pytest.raises(BudgetSpent):
        oracle.query(batch(2, 1))
    assert teacher.seen == 7
    ledger.close()


def test_a_budget_of_zero_sends_nothing() -> None:
    teacher = Teacher()
    with pytest.raises(BudgetSpent):
        connect(Ledger("s", budget=0), teacher).query(batch(0, 1))
    assert teacher.seen == 0


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"s.budget is -1; it must be at least 0"):
        Ledger("s", budget=-1)


def test_a_lost_answer_counts_against_the_budget(tmp_path: Path) -> None:
    lose(tmp_path, 0, 4)
    teacher = Teacher()
    ledger = Ledger("s", tmp_path, budget=10)
    oracle = connect(ledger, teacher)
    assert ledger.left == 6
    oracle.query(batch(0, 4))
    with pytest.raises(BudgetSpent, match="8 are spent"):
        oracle.query(batch(1, 4))
    assert teacher.seen == 4


def test_a_booked_answer_needs_no_budget(tmp_path: Path) -> None:
    ask(tmp_path, 0, 1)
    ledger = Ledger("s", tmp_path, budget=4)
    assert ledger.left == 0 and ledger.affords(2)
    oracle = connect(ledger)
    oracle.query(batch(0))
    oracle.query(batch(1))
    assert not ledger.affords(2)
    with pytest.raises(BudgetSpent):
        oracle.query(batch(2))


def test_what_is_uncertain_is_said() -> None:
    ledger = Ledger("s")
    connect(ledger).query(batch(0, 3))
    with pytest.raises(Cut):
        connect(ledger, Unplugged()).query(batch(1, 2))
    assert ledger.counts == total(1, 3, uncertain=2) and str(ledger).endswith(", 2 uncertain")


# -- settle ------------------------------------------------------------------------------------------------


def settled(folder: Path, *seeds: int) -> None:
    """Ask, then settle as a checkpoint does."""
    ledger = Ledger("s", folder)
    oracle = connect(ledger)
    for seed in seeds:
        oracle.query(batch(seed))
    ledger.settle()
    ledger.close()


def test_settled_and_reopened(tmp_path: Path) -> None:
    settled(tmp_path, 0, 1, 2)
    assert rows(tmp_path, "SELECT * FROM answers") == [] and rows(tmp_path, "SELECT images FROM settled") == [(6,)]
    ledger = Ledger("s", tmp_path)
    assert ledger.counts == total(3) and ledger.next == ledger.settled == 6
    assert ledger.recall(batch(2)) == []  # forgotten: the checkpoint holds its effect
    connect(ledger).query(batch(3))
    ledger.close()
    assert counts(tmp_path) == total(4)


def test_asked_after_settling(tmp_path: Path) -> None:
    settled(tmp_path, 0, 1)
    ledger = Ledger("s", tmp_path)
    given = connect(ledger).query(batch(2))
    ledger.close()
    teacher = Teacher()
    ledger = Ledger("s", tmp_path)
    ledger.rewind(4)
    again = connect(ledger, teacher).query(batch(2))
    assert teacher.seen == 0 and same(given, again) and ledger.counts == total(3)


def test_uncertain_queries_are_settled_too(tmp_path: Path) -> None:
    lose(tmp_path, 0)
    settled(tmp_path, 0)
    assert counts(tmp_path) == total(1, uncertain=2)


def test_settling_in_the_middle_of_a_replay_keeps_the_rest(tmp_path: Path) -> None:
    given = ask(tmp_path, 0, 1, 2)
    ledger = Ledger("s", tmp_path)
    connect(ledger).query(batch(0))
    ledger.settle()
    ledger.close()
    assert counts(tmp_path) == total(3)
    teacher = Teacher()
    ledger = Ledger("s", tmp_path)
    ledger.rewind(2)
    oracle = connect(ledger, teacher)
    again = [oracle.query(batch(seed)) for seed in (1, 2)]
    assert teacher.seen == 0 and all(same(*pair) for pair in zip(given[1:], again, strict=True))
    ledger.settle()
    ledger.close()
    assert counts(tmp_path) == total(3) and rows(tmp_path, "SELECT * FROM answers") == []


def test_settling_without_a_folder() -> None:
    ledger = Ledger("s")
    connect(ledger).query(batch(0))
    ledger.settle()
    assert ledger.counts == total(1) and ledger.settled == 2


# -- ledger and run that do not belong together ------------------------------------------------------------


def test_a_checkpoint_older_than_the_ledger(tmp_path: Path) -> None:
    settled(tmp_path, 0, 1)
    ledger = Ledger("s", tmp_path)
    with pytest.raises(LedgerError, match=r"settled 4 images, but the checkpoint knows of 2"):
        ledger.rewind(2)
    ledger.rewind(4)


def test_a_checkpoint_knows_no_more_than_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow disk an answer is booked long after it came; killed in between, a run could not go on."""

    def slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        insert(*arguments)

    insert = ledger_file.insert
    monkeypatch.setattr("mekd.oracle.ledger.insert", slowly)
    feed = Fresh(
        "s", lambda step: (batch(step) / 255, torch.empty(2, 0)), lambda step: 2, connect(Ledger("s", tmp_path))
    )
    for step in range(3):
        feed.take(step)
    knows = feed.state_dict()["images"]
    log = tmp_path / "s.sqlite-wal"
    assert not log.exists() or log.stat().st_size == 0  # a power cut takes what is in the log alone
    assert knows == 6 and rows(tmp_path, "SELECT sum(length(digest) / 16) FROM answers") == [(6,)]
    feed.oracle.ledger.close()


def test_a_checkpoint_newer_than_the_ledger(tmp_path: Path) -> None:
    ask(tmp_path, 0, 1)
    ledger = Ledger("s", tmp_path)
    with pytest.raises(LedgerError, match=r"knows of 5 images, the ledger of 4"):
        ledger.rewind(5)
    ledger.rewind(4)
    with pytest.raises(LedgerError, match=r"knows of 1 images, the ledger of 0"):
        Ledger("empty", tmp_path).rewind(1)


@pytest.mark.parametrize("changed", ["a pixel", "a row", "the order"])
def test_a_run_that_asks_something_else(tmp_path: Path, changed: str) -> None:
    ask(tmp_path, 0, m=3)
    other = batch(0, 3)
    if changed == "a pixel":
        other[2, 0, 1, 2] ^= 1
    elif changed == "a row":
        other = other[[0, 2, 2]]
    else:
        other = other.flip(0)
    teacher = Teacher()
    ledger = Ledger("s", tmp_path)
    with pytest.raises(LedgerError, match="call 0 of s differs from the booked one"):
        connect(ledger, teacher).query(other)
    assert teacher.seen == 0 and ledger.counts == total(1, 3)


def test_in_ones_own_loop_what_is_booked_may_be_passed_over(tmp_path: Path) -> None:
    ask(tmp_path, 0, m=3)
    teacher, ledger = Teacher(), Ledger("s", str(tmp_path))
    with pytest.raises(LedgerError, match=r"in a loop of your own: .* after pass_over\(\) of the ledger"):
        connect(ledger, teacher).query(batch(1, 3))
    ledger.pass_over()  # as it advises
    connect(ledger, teacher).query(batch(1, 3))
    assert teacher.seen == 3 and ledger.counts == total(2, 3)
    ledger.close()


def test_images_are_compared_by_value_not_by_layout(tmp_path: Path) -> None:
    image = (2, 3, 4)
    images = torch.randint(0, 256, (3, *image), dtype=torch.uint8)
    ledger = Ledger("s", tmp_path)
    sent = ledger.intend(images)
    ledger.record(sent, images, Response("label", None, torch.tensor([0, 1, 2])))
    ledger.close()
    ledger = Ledger("s", tmp_path)
    again = ledger.recall(images.to(memory_format=torch.channels_last))
    assert [(row, answer.labels.tolist()) for row, answer in again] == [(0, [0, 1, 2])]
    ledger.close()


# -- what anybody can look up ------------------------------------------------------------------------------


def test_what_was_paid_can_be_queried_while_the_run_goes_on(tmp_path: Path) -> None:
    ledger = Ledger("s", tmp_path)
    oracle = connect(ledger)
    oracle.query(batch(0, 3))
    with pytest.raises(Cut):
        connect(ledger, Unplugged()).query(batch(1, 2))
    assert rows(tmp_path, "SELECT queries, uncertain FROM totals") == [(3, 2)]
    assert rows(tmp_path, "SELECT call, queries, answered IS NULL FROM calls") == [(0, 3, 0), (3, 2, 1)]
    assert totals(tmp_path, "s", "never") == total(1, 3, uncertain=2)
    ledger.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.booked", "s.lock", "s.sqlite"]


def test_one_folder_is_one_runs(tmp_path: Path) -> None:
    ledger = Ledger("s", tmp_path)
    with pytest.raises(LedgerError, match="is in use: another run works in this folder"):
        Ledger("s", tmp_path)
    ledger.close()
    Ledger("s", tmp_path).close()


def test_the_old_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "s.journal").write_bytes(b"T")
    with pytest.raises(LedgerError, match=r"s\.journal is a ledger of mekd's first format"):
        Ledger("s", tmp_path)


def test_a_network_filesystem_gets_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_file, "_on_network", lambda folder: True)
    ledger = Ledger("s", tmp_path)
    connect(ledger).query(batch(0))
    assert not (tmp_path / "s.sqlite-wal").exists()
    ledger.settle()
    ledger.close()
    assert counts(tmp_path) == total(1)
    monkeypatch.undo()
    mounts = "server:/x /data nfs4 rw 0 0\n/dev/a / ext4 rw 0 0\nother /data/local ext4 rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, *_: mounts)
    found = [ledger_file._on_network(Path(folder)) for folder in ("/data/run", "/data/local/run", "/datax", "/")]
    assert found == [True, False, False, False]
