"""The account: nothing is paid for twice, nothing is counted that is not known, and the budget is hard."""

import errno
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mekd.files import WriteError
from mekd.oracle.ledger import BudgetSpent, Ledger, LedgerError
from mekd.oracle.response import KINDS, Response
from mekd.oracle.torch import TorchOracle

IMAGE = (1, 2, 3)
CLASSES = 4
BYTES_UP = 6  # an image as uint8
BYTES_DOWN = 16  # a row of probabilities
HEADER = 9  # kind, length, CRC


class Teacher(nn.Module):
    """A linear classifier that counts what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, CLASSES, generator=generator))
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1) @ self.weight


class Cut(RuntimeError):
    """The connection broke while a request was in flight."""


class Unplugged(Teacher):
    def forward(self, images: Tensor) -> Tensor:
        raise Cut


def batch(seed: int, m: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (m, *IMAGE), dtype=torch.uint8, generator=generator)


def connect(ledger: Ledger, teacher: Teacher | None = None, response: str = "probs", **options: Any) -> TorchOracle:
    return TorchOracle(teacher or Teacher(), IMAGE, CLASSES, response, k=2, ledger=ledger, **options)


def ask(folder: Path, *seeds: int, teacher: Teacher | None = None, m: int = 2) -> list[Response]:
    """Open the account, ask one batch per seed, close it."""
    ledger = Ledger("s", folder)
    answers = [connect(ledger, teacher).query(batch(seed, m)) for seed in seeds]
    ledger.close()
    return answers


def lose(folder: Path, seed: int, m: int = 2) -> None:
    """Open the account, replay what is known, and lose the connection in the middle of one more request."""
    ledger = Ledger("s", folder)
    ledger.rewind(ledger.next_unanswered())
    with pytest.raises(Cut):
        connect(ledger, Unplugged()).query(batch(seed, m))
    ledger.close()


def counts(folder: Path) -> dict[str, int]:
    ledger = Ledger("s", folder)
    ledger.close()
    return ledger.counts


def total(requests: int, m: int = 2, uncertain: int = 0) -> dict[str, int]:
    """What an account says after so many answered requests of m images."""
    queries = requests * m
    return {
        "requests": requests,
        "queries": queries,
        "bytes_up": queries * BYTES_UP,
        "bytes_down": queries * BYTES_DOWN,
        "uncertain": uncertain,
    }


def same(one: Response, other: Response) -> bool:
    """Equal to the bit, -0.0 and NaN included."""
    if (one.kind, one.decimals, len(one.tensors())) != (other.kind, other.decimals, len(other.tensors())):
        return False
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return all(a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)


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


# -- the journal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_answers_equal_the_originals(tmp_path: Path, kind: str, decimals: int | None) -> None:
    ledger = Ledger("s", tmp_path)
    oracle = connect(ledger, response=kind, decimals=decimals)
    given = [oracle.query(batch(seed, 3)) for seed in range(3)]
    ledger.close()
    teacher = Teacher()
    ledger = Ledger("s", tmp_path)
    oracle = connect(ledger, teacher, response=kind, decimals=decimals)
    again = [oracle.query(batch(seed, 3)) for seed in range(3)]
    assert teacher.seen == 0
    assert all(same(*pair) for pair in zip(given, again, strict=True))
    assert ledger.counts["queries"] == 9


def test_odd_bits_survive_the_journal(tmp_path: Path) -> None:
    odd = Response("logits", torch.tensor([[-0.0, -torch.inf, 1e-45, 3.4028235e38]]))
    ledger = Ledger("s", tmp_path)
    ledger.intend(batch(0, 1))
    ledger.record(batch(0, 1), odd)
    ledger.close()
    again = Ledger("s", tmp_path).recall(batch(0, 1))
    assert again is not None and same(odd, again)


def test_reopened_after_answers(tmp_path: Path) -> None:
    ask(tmp_path, 0, 1, 2)
    assert counts(tmp_path) == total(3)
    # Asking them again costs nothing, one more costs one more.
    teacher = Teacher()
    ask(tmp_path, 0, 1, 2, 3, teacher=teacher)
    assert teacher.seen == 2
    assert counts(tmp_path) == total(4)


def test_reopened_after_an_intent_without_an_answer(tmp_path: Path) -> None:
    ask(tmp_path, 0)
    lose(tmp_path, 1)
    assert counts(tmp_path) == total(1, uncertain=2)
    # Reopening alone changes nothing, however often.
    assert counts(tmp_path) == total(1, uncertain=2)
    teacher = Teacher()
    ask(tmp_path, 0, 1, teacher=teacher)
    # The lost request was asked again: it is counted, and what it may have cost before stays uncertain.
    assert teacher.seen == 2
    assert counts(tmp_path) == total(2, uncertain=2)


def test_lost_twice_is_uncertain_twice(tmp_path: Path) -> None:
    lose(tmp_path, 0)
    lose(tmp_path, 0)
    assert counts(tmp_path) == total(0, uncertain=4)
    ask(tmp_path, 0)
    assert counts(tmp_path) == total(1, uncertain=4)


def test_a_torn_answer_is_no_answer(tmp_path: Path) -> None:
    ask(tmp_path / "whole", 0, 1)
    journal = (tmp_path / "whole" / "s.journal").read_bytes()
    ends = record_ends(journal)
    assert len(ends) == 4 and ends[-1] == len(journal)
    for cut in range(ends[-2], len(journal)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "s.journal").write_bytes(journal[:cut])
        ledger = Ledger("s", folder)
        assert ledger.counts == total(1, uncertain=2), f"cut at {cut} of {len(journal)}"
        assert (folder / "s.journal").read_bytes() == journal[: ends[-2]]
        # What is written behind the torn tail is readable again.
        teacher = Teacher()
        oracle = connect(ledger, teacher)
        for seed in range(3):
            oracle.query(batch(seed))
        ledger.close()
        assert teacher.seen == 4 and counts(folder) == total(3, uncertain=2), f"cut at {cut} of {len(journal)}"
        shutil.rmtree(folder)
    assert counts(tmp_path / "whole") == total(2)


def test_a_torn_intent_was_never_sent(tmp_path: Path) -> None:
    ask(tmp_path, 0)
    lose(tmp_path, 1)
    path = tmp_path / "s.journal"
    journal = path.read_bytes()
    ends = record_ends(journal)
    assert len(ends) == 3
    for cut in range(ends[-2], len(journal)):
        path.write_bytes(journal[:cut])
        assert counts(tmp_path) == total(1), f"cut at {cut} of {len(journal)}"
    path.write_bytes(journal)
    assert counts(tmp_path) == total(1, uncertain=2)


def record_ends(journal: bytes) -> list[int]:
    """The offset behind each record, read from the headers alone."""
    ends, at = [], 0
    while at < len(journal):
        kind, length, _ = struct.unpack_from("<cII", journal, at)
        assert kind in (b"T", b"I", b"A")
        at += HEADER + length
        ends.append(at)
    return ends


def test_a_flipped_byte_in_the_last_answer(tmp_path: Path) -> None:
    ask(tmp_path, 0, 1)
    path = tmp_path / "s.journal"
    journal = path.read_bytes()
    for at in range(record_ends(journal)[-2], len(journal)):
        path.write_bytes(journal[:at] + bytes([journal[at] ^ 0xFF]) + journal[at + 1 :])
        try:
            found = counts(tmp_path)
        except LedgerError:  # a length that was shortened looks like damage with records behind it
            continue
        assert found == total(1, uncertain=2), f"byte {at} of {len(journal)}"


@pytest.mark.parametrize("last", ["intent", "answer"])
def test_a_flipped_bit_in_the_kind_of_a_record(tmp_path: Path, last: str) -> None:
    ask(tmp_path, 0)
    path = tmp_path / "s.journal"
    journal = bytearray(path.read_bytes())
    ends = [0, *record_ends(bytes(journal))]
    if last == "intent":
        del journal[ends[1] :]
    journal[ends[0] if last == "intent" else ends[1]] ^= ord("I") ^ ord("A")
    path.write_bytes(journal)
    assert counts(tmp_path)["queries"] == 0


def test_damage_before_the_end_is_not_taken_for_a_torn_tail(tmp_path: Path) -> None:
    ask(tmp_path, 0, 1, 2)
    path = tmp_path / "s.journal"
    journal = bytearray(path.read_bytes())
    journal[HEADER + 3] ^= 0xFF
    path.write_bytes(journal)
    try:
        found = counts(tmp_path)
    except LedgerError:
        return
    assert found["queries"] + found["uncertain"] >= 6, "queries that were paid are forgotten"


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


# -- a full disk -------------------------------------------------------------------------------------------


class FullDisk:
    """A journal whose disk takes half of what is written, then says so or not."""

    def __init__(self, file: Any, loud: bool) -> None:
        self.file, self.loud, self.full = file, loud, True

    def write(self, data: bytes) -> int:
        if not self.full:
            return self.file.write(data)
        done = self.file.write(data[: len(data) // 2])
        if self.loud:
            raise OSError(errno.ENOSPC, "No space left on device")
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("loud", [False, True], ids=["short write", "ENOSPC"])
@pytest.mark.parametrize("at", ["intent", "answer"])
def test_a_full_disk(tmp_path: Path, at: str, loud: bool) -> None:
    ask(tmp_path, 0)
    teacher = Teacher()
    ledger = Ledger("s", tmp_path)
    oracle = connect(ledger, teacher)
    oracle.query(batch(0))
    size = (tmp_path / "s.journal").stat().st_size
    disk = FullDisk(ledger._journal, loud)
    if at == "intent":
        ledger._journal = disk  # type: ignore[assignment]
        with pytest.raises(WriteError, match=r"the journal of s could not be written.*Free some space"):
            oracle.query(batch(1))
        # Nothing was sent, so nothing may be counted.
        assert teacher.seen == 0 and ledger.counts == total(1)
        assert (tmp_path / "s.journal").stat().st_size == size
        expected = total(1)
    else:
        ledger.intend(batch(1))
        size = (tmp_path / "s.journal").stat().st_size
        ledger._journal = disk  # type: ignore[assignment]
        with pytest.raises(WriteError, match="the journal of s"):
            ledger.record(batch(1), Response("probs", torch.full((2, CLASSES), 0.25)))
        assert ledger.counts == total(1, uncertain=2)
        assert (tmp_path / "s.journal").stat().st_size == size
        expected = total(1, uncertain=2)
    disk.file.close()
    assert counts(tmp_path) == expected
    # With space again, the run goes on.
    ask(tmp_path, 0, 1)
    assert counts(tmp_path) == total(2, uncertain=expected["uncertain"])


def test_space_that_comes_back_is_used(tmp_path: Path) -> None:
    ledger = Ledger("s", tmp_path)
    oracle = connect(ledger)
    disk = FullDisk(ledger._journal, loud=True)
    ledger._journal = disk  # type: ignore[assignment]
    with pytest.raises(WriteError):
        oracle.query(batch(0))
    disk.full = False
    oracle.query(batch(0))
    ledger.close()
    assert counts(tmp_path) == total(1)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    # The kernel itself refuses here, in the middle of a record.
    ask(tmp_path, 0, 1)
    size = (tmp_path / "s.journal").stat().st_size
    code = f"""
import resource, sys
from pathlib import Path
import torch
from mekd.files import WriteError
from mekd.oracle.ledger import Ledger
from mekd.oracle.response import Response
ledger = Ledger("s", Path({str(tmp_path)!r}))
ledger.rewind(2)
images = torch.zeros(2, 1, 2, 3, dtype=torch.uint8)
ledger.intend(images)
end = Path({str(tmp_path / "s.journal")!r}).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (end + 40, resource.RLIM_INFINITY))
try:
    ledger.record(images, Response("probs", torch.full((2, 4), 0.25)))
except WriteError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: the journal of s could not be written"), done.stdout
    assert (tmp_path / "s.journal").stat().st_size > size  # the intent is there, whole
    assert counts(tmp_path) == total(2, uncertain=2)
