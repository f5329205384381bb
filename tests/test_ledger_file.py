"""The ledger's file: answers are kept to the bit, and nothing is counted that is not known."""

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ledger_teacher import Teacher, ask, batch, connect, counts, lose, same, total
from mekd.files import WriteError
from mekd.oracle.ledger import Ledger, LedgerError, totals
from mekd.oracle.response import KINDS, Response


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
    ledger.close()


def test_odd_bits_survive_the_file(tmp_path: Path) -> None:
    odd = Response("logits", torch.tensor([[-0.0, -torch.inf, 1e-45, 3.4028235e38]]))
    ledger = Ledger("s", tmp_path)
    sent = ledger.intend(batch(0, 1))
    ledger.record(sent, batch(0, 1), odd)
    ledger.close()
    ledger = Ledger("s", tmp_path)
    ((row, again),) = ledger.recall(batch(0, 1))
    ledger.close()
    assert row == 0 and same(odd, again)


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
    # The lost call was asked again: it is counted, and what it may have cost before stays uncertain.
    assert teacher.seen == 2
    assert counts(tmp_path) == total(2, uncertain=2)


def test_lost_twice_is_uncertain_twice(tmp_path: Path) -> None:
    lose(tmp_path, 0)
    lose(tmp_path, 0)
    assert counts(tmp_path) == total(0, uncertain=4)
    ask(tmp_path, 0)
    assert counts(tmp_path) == total(1, uncertain=4)


# -- kill -9: what a process leaves behind that had no time to close ----------------------------------------

KILLED = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from ledger_teacher import batch, connect
from mekd.oracle.ledger import Ledger
ledger = Ledger("s", Path(sys.argv[1]))
oracle = connect(ledger)
for seed in range(3):
    oracle.query(batch(seed))
if sys.argv[3] == "in flight":
    ledger.intend(batch(3))
else:
    ledger._booked.result()
os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three calls were answered and a fourth was in flight when the process was killed."""
    folder = tmp_path_factory.mktemp("killed")
    words = [sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent), "in flight"]
    assert subprocess.run(words, timeout=120).returncode == -9
    return folder


def copied(killed: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(killed, folder))


def test_a_killed_process_loses_nothing_that_was_booked(killed: Path, tmp_path: Path) -> None:
    assert (killed / "s.sqlite-wal").stat().st_size > 0, "nothing is left for the log to tell"
    folder = copied(killed, tmp_path / "run")
    assert counts(folder) == total(3, uncertain=2) == counts(folder)
    teacher = Teacher()
    ask(folder, 0, 1, 2, 3, teacher=teacher)
    assert teacher.seen == 2 and counts(folder) == total(4, uncertain=2)


def test_a_log_that_is_cut_short_is_as_far_as_it_goes(killed: Path, tmp_path: Path) -> None:
    """What stands before the cut is counted, and what is written next is kept: so where a power cut lost the rest.

    Beside its witness such a log is damaged, and what was paid for is not paid for again unless somebody says so.
    """
    log = (killed / "s.sqlite-wal").read_bytes()
    seen = set()
    for cut in range(len(log) - 1, 32, -997):
        folder = copied(killed, tmp_path / "run")
        (folder / "s.sqlite-wal").write_bytes(log[:cut])
        with pytest.raises(LedgerError, match=r"is damaged \(it ends with . attempts .* delete s.booked\): put a copy"):
            counts(folder)
        assert totals(folder, "s")["queries"] < 8, "a look at it does not hide it"
        with pytest.raises(LedgerError, match=r"is damaged"):
            counts(folder)
        (folder / "s.booked").unlink()
        before = counts(folder)
        seen.add((before["queries"], before["uncertain"]))
        ask(folder, 0, 1, 2)
        assert counts(folder) == total(3, uncertain=before["uncertain"]), f"cut at {cut} of {len(log)}"
    assert seen == {(6, 0), (4, 2), (4, 0), (2, 2), (2, 0), (0, 2), (0, 0)}


def test_a_witness_that_is_damaged_or_behind_is_no_witness(killed: Path, tmp_path: Path) -> None:
    whole = (killed / "s.booked").read_bytes()
    older = tmp_path / "older"
    ask(older, 0)
    for content in (
        b"",
        whole[:-1],
        bytes(len(whole)),
        whole[:3] + b"\xff" + whole[4:],
        (older / "s.booked").read_bytes(),
    ):
        folder = copied(killed, tmp_path / "run")
        (folder / "s.booked").write_bytes(content)
        assert counts(folder) == total(3, uncertain=2)
        ask(folder, 0, 1, 2, 3)
        assert (folder / "s.booked").read_bytes() != content


def test_a_flipped_byte_is_noticed_or_changes_nothing(killed: Path, tmp_path: Path) -> None:
    """In the log: more than its last transaction is never lost without a word. In the file: nothing at all is."""
    closed = copied(killed, tmp_path / "closed")
    ask(closed, 0)
    whole = counts(closed)
    refused = {"s.sqlite-wal": 0, "s.sqlite": 0}
    for source, name, step in ((killed, "s.sqlite-wal", 211), (closed, "s.sqlite", 67)):
        content = (source / name).read_bytes()
        for at in range(0, len(content), step):
            folder = copied(source, tmp_path / "run")
            (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
            try:
                found = counts(folder)
            except LedgerError as error:
                assert "is damaged" in str(error) and "put a copy back" in str(error)
                refused[name] += 1
                with pytest.raises(LedgerError, match="is damaged"):  # and is not forgotten by looking at it
                    counts(folder)
                continue
            allowed = [whole, total(3)] if name.endswith("wal") else [whole]  # the last one, a call in flight
            assert found in allowed, f"byte {at} of {name}"
    assert min(refused.values()) > 10


@pytest.mark.parametrize("schema", [False, True])
def test_what_a_killed_process_left_in_the_middle_of_a_transaction_is_read(tmp_path: Path, schema: bool) -> None:
    """It made its tables, or took the write-ahead log away, which leaves a journal that must be rolled back."""
    folder, left = tmp_path / "whole", tmp_path / "left"
    left.mkdir()
    if schema:
        ask(folder, 1, 2)
    folder.mkdir(exist_ok=True)
    database = sqlite3.connect(folder / "s.sqlite", isolation_level=None)
    database.execute("PRAGMA cache_size = 1")  # so that pages are written before the transaction ends
    if not schema:
        database.execute("PRAGMA journal_mode = WAL")
    database.execute("BEGIN")
    database.execute("CREATE TABLE more (x)")
    database.executemany("INSERT INTO more VALUES (?)", [("x" * 1000,)] * 200)
    for path in folder.glob("s.sqlite*"):
        shutil.copy(path, left)
    database.close()
    assert (left / "s.sqlite-journal").exists() == schema
    assert totals(left, "s") == total(2 if schema else 0)
    with contextlib.closing(sqlite3.connect(left / "s.sqlite")) as kept:
        assert not kept.execute("SELECT 1 FROM sqlite_master WHERE name = 'more'").fetchall()
    assert len(ask(left, 1, 2, 3)) == 3
    assert totals(left, "s") == total(3), "what was answered is not asked again"


def test_a_missing_row_is_noticed(tmp_path: Path) -> None:
    import sqlite3

    ask(tmp_path, 0, 1, 2)
    for statement in ("DELETE FROM calls WHERE attempt = 2", "UPDATE calls SET queries = 1 WHERE attempt = 3"):
        folder = copied(tmp_path, tmp_path.parent / f"{tmp_path.name}-changed")
        with sqlite3.connect(folder / "s.sqlite") as database:
            database.execute(statement)
        with pytest.raises(LedgerError, match="is damaged"):
            Ledger("s", folder)


def test_a_file_that_is_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_bytes(b"this is no database, but it is long enough to be one, as it has a head" * 9)
    with pytest.raises(LedgerError, match="file is not a database"):
        Ledger("s", tmp_path)


# -- a full disk -------------------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from ledger_teacher import Teacher, batch, connect
from mekd.errors import MekdError
from mekd.oracle.ledger import Ledger
ledger, teacher = Ledger("s", Path(sys.argv[1])), Teacher()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
oracle = connect(ledger, teacher)
oracle.query(batch(0))
ledger._booked.result()
size = (Path(sys.argv[1]) / "s.sqlite-wal").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    for seed in range(1, 9):
        oracle.query(batch(seed))
except MekdError as error:
    print(type(error).__name__, teacher.seen, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    ledger.close()
except MekdError as error:
    print(type(error).__name__, teacher.seen, error)
"""


@pytest.mark.parametrize("room", [100, 9000, 30000])
def test_a_full_disk_is_known_before_the_next_call_is_sent(tmp_path: Path, room: int) -> None:
    """The kernel itself refuses, in the middle of an intent or of an answer; what was sent is counted, no more is."""
    words = [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent), str(room)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("WriteError") and "the ledger of s could not be written" in done.stdout
    seen = int(done.stdout.split()[1])
    found = counts(tmp_path)
    assert found["queries"] + found["uncertain"] == seen, "what was sent and what is counted differ"
    ask(tmp_path, *range(9))
    assert counts(tmp_path)["queries"] == 18


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("a file")
    with pytest.raises((WriteError, OSError)):
        Ledger("s", tmp_path / "ledger")
