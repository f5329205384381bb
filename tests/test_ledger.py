"""The account: nothing is paid for twice, and the budget is hard."""

import json
from pathlib import Path

import pytest
import torch

from ledger_teacher import Cut, Teacher, Unplugged, ask, batch, connect, counts, lose, record_ends, same, total
from mekd.oracle.ledger import BudgetSpent, Ledger, LedgerError
from mekd.oracle.response import Response

# -- counts, budget, price ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
def test_counts(tmp_path: Path, kept: bool) -> None:
    ledger = Ledger("s", tmp_path if kept else None)
    oracle = connect(ledger)
    for m in (2, 5, 1):
        oracle.query(batch(m, m))
    assert ledger.counts == total(1, 8) | {"requests": 3}
    assert ledger.spent == 8 and ledger.left is None and ledger.affords(10**9)
    assert str(ledger) == "8 queries, 0.0 MB up, 0.0 MB down"


@pytest.mark.parametrize("kept", [False, True])
def test_a_budget_is_hard(tmp_path: Path, kept: bool) -> None:
    teacher = Teacher()
    ledger = Ledger("distill", tmp_path if kept else None, budget=7)
    oracle = connect(ledger, teacher)
    oracle.query(batch(0, 4))
    assert ledger.left == 3 and ledger.affords(3) and not ledger.affords(4)
    journal = (tmp_path / "distill.journal").read_bytes() if kept else b""
    before = dict(ledger.counts)
    with pytest.raises(BudgetSpent, match=r"distill.budget is 7 queries, 4 are spent and the next request has 4"):
        oracle.query(batch(1, 4))
    # Neither sent, nor counted, nor journalled.
    assert teacher.seen == 4 and ledger.counts == before
    if kept:
        assert (tmp_path / "distill.journal").read_bytes() == journal
    # The request that just fits is allowed, and the next image is not.
    oracle.query(batch(1, 3))
    assert ledger.left == 0 and teacher.seen == 7
    with pytest.raises(BudgetSpent):
        oracle.query(batch(2, 1))
    assert teacher.seen == 7


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


def test_a_journalled_answer_needs_no_budget(tmp_path: Path) -> None:
    ask(tmp_path, 0, 1)
    ledger = Ledger("s", tmp_path, budget=4)
    assert ledger.left == 0 and ledger.affords(2)
    oracle = connect(ledger)
    oracle.query(batch(0))
    oracle.query(batch(1))
    assert not ledger.affords(2)
    with pytest.raises(BudgetSpent):
        oracle.query(batch(2))


def test_cost() -> None:
    ledger = Ledger("s", price=0.0015)
    oracle = connect(ledger)
    oracle.query(batch(0, 3))
    with pytest.raises(Cut):
        connect(ledger, Unplugged()).query(batch(1, 2))
    # The provider may have billed the lost request, so it costs too.
    assert ledger.totals() == total(1, 3, uncertain=2) | {"cost": 0.0075}
    assert "cost" not in Ledger("s").totals()
    assert str(ledger).endswith(", 2 uncertain")


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
    assert len(record_ends((tmp_path / "s.journal").read_bytes())) == 1
    snapshot = json.loads((tmp_path / "s.json").read_text())
    assert snapshot == snapshot | total(3) | {"settled": 3}
    ledger = Ledger("s", tmp_path)
    assert ledger.counts == total(3) and ledger.next == ledger.settled == 3
    assert ledger.recall(batch(2)) is None  # forgotten: the checkpoint holds its effect
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
    ledger.rewind(2)
    again = connect(ledger, teacher).query(batch(2))
    assert teacher.seen == 0 and same(given, again) and ledger.counts == total(3)


def test_uncertain_queries_are_settled_too(tmp_path: Path) -> None:
    lose(tmp_path, 0)
    settled(tmp_path, 0)
    assert counts(tmp_path) == total(1, uncertain=2)


@pytest.mark.parametrize("before", [0, 2])
def test_killed_between_snapshot_and_truncation(tmp_path: Path, before: int) -> None:
    settled(tmp_path, *range(before))
    lose(tmp_path, before)  # an uncertain request among the others
    ledger = Ledger("s", tmp_path)
    oracle = connect(ledger)
    for seed in range(before, before + 3):
        oracle.query(batch(seed))
    kept = (tmp_path / "s.journal").read_bytes()
    ledger.settle()
    ledger.close()
    (tmp_path / "s.journal").write_bytes(kept)
    expected = total(before + 3, uncertain=2)
    assert counts(tmp_path) == expected
    # The stale records stay in the file until the next settle, and are not counted then either.
    ask_more = Ledger("s", tmp_path)
    ask_more.rewind(before + 3)
    connect(ask_more).query(batch(99))
    ask_more.close()
    assert counts(tmp_path) == total(before + 4, uncertain=2)


def test_killed_between_snapshot_and_truncation_with_a_request_lost_last(tmp_path: Path) -> None:
    ask(tmp_path, 0)
    lose(tmp_path, 1)
    # A resumed run that is stopped before it asks again saves a checkpoint, and so settles.
    ledger = Ledger("s", tmp_path)
    ledger.rewind(1)
    kept = (tmp_path / "s.journal").read_bytes()
    ledger.settle()
    ledger.close()
    (tmp_path / "s.journal").write_bytes(kept)
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
    ledger.rewind(1)
    oracle = connect(ledger, teacher)
    again = [oracle.query(batch(seed)) for seed in (1, 2)]
    assert teacher.seen == 0 and all(same(*pair) for pair in zip(given[1:], again, strict=True))
    ledger.settle()
    ledger.close()
    assert counts(tmp_path) == total(3) and len(record_ends((tmp_path / "s.journal").read_bytes())) == 1


def test_settling_without_a_folder() -> None:
    ledger = Ledger("s")
    connect(ledger).query(batch(0))
    ledger.settle()
    assert ledger.counts == total(1) and ledger.settled == 1


# -- ledger and run that do not belong together ------------------------------------------------------------


def test_a_checkpoint_older_than_the_ledger(tmp_path: Path) -> None:
    settled(tmp_path, 0, 1)
    ledger = Ledger("s", tmp_path)
    with pytest.raises(LedgerError, match=r"settled 2 requests, but the checkpoint knows of 1"):
        ledger.rewind(1)
    ledger.rewind(2)


def test_a_checkpoint_newer_than_the_ledger(tmp_path: Path) -> None:
    ask(tmp_path, 0, 1)
    ledger = Ledger("s", tmp_path)
    with pytest.raises(LedgerError, match=r"knows of 3 requests, the ledger of 2"):
        ledger.rewind(3)
    ledger.rewind(2)
    with pytest.raises(LedgerError, match=r"knows of 1 requests, the ledger of 0"):
        Ledger("empty", tmp_path).rewind(1)


@pytest.mark.parametrize("changed", ["a pixel", "a row", "the order"])
def test_a_run_that_asks_something_else(tmp_path: Path, changed: str) -> None:
    ask(tmp_path, 0, m=3)
    other = batch(0, 3)
    if changed == "a pixel":
        other[2, 0, 1, 2] ^= 1
    elif changed == "a row":
        other = other[:2]
    else:
        other = other.flip(0)
    teacher = Teacher()
    ledger = Ledger("s", tmp_path)
    with pytest.raises(LedgerError, match="request 0 of s differs from the journalled one"):
        connect(ledger, teacher).query(other)
    assert teacher.seen == 0 and ledger.counts == total(1, 3)


def test_images_are_compared_by_value_not_by_layout(tmp_path: Path) -> None:
    image = (2, 3, 4)
    images = torch.randint(0, 256, (3, *image), dtype=torch.uint8)
    ledger = Ledger("s", tmp_path)
    ledger.intend(images)
    ledger.record(images, Response("label", None, torch.tensor([0, 1, 2])))
    ledger.close()
    again = Ledger("s", tmp_path).recall(images.to(memory_format=torch.channels_last))
    assert again is not None and again.labels.tolist() == [0, 1, 2]
