"""The journal: answers are kept to the bit, and nothing is counted that is not known."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ledger_teacher import CLASSES, HEADER, Teacher, ask, batch, connect, counts, lose, record_ends, same, total
from mekd.files import WriteError
from mekd.oracle.ledger import Ledger, LedgerError
from mekd.oracle.response import KINDS, Response

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
