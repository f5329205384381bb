"""What was asked and what it cost, in an SQLite file that anyone can query, so that nothing is paid for twice.

A call to the teacher is booked before it is sent and again with its answer, by one thread. A resumed stage asks the
same questions again and is answered from the ledger, up to the one call that was in flight or not yet written. That
holds for a process that is killed; a power cut can take what was booked since the last checkpoint.
"""

import contextlib
import fcntl
import hashlib
import io
import shutil
import sqlite3
import struct
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mekd import files
from mekd.errors import MekdError, UsageError
from mekd.oracle.response import Response

Result = TypeVar("Result")

LOG = 2000  # transactions that the write-ahead log grows by at most
COUNTS = ("calls", "queries", "bytes_up", "bytes_down", "uncertain")
_APPLICATION, _VERSION = 0x6D656B64, 1  # "mekd"
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
CREATE TABLE calls (
    attempt INTEGER PRIMARY KEY,  -- in the order in which they were sent
    call INTEGER NOT NULL,        -- the run's question: one whose answer was lost is asked again under its number
    queries INTEGER NOT NULL,     -- images
    bytes_up INTEGER NOT NULL,
    bytes_down INTEGER,           -- NULL without an answer: the provider may have billed it
    sent REAL NOT NULL,           -- seconds since 1970
    answered REAL,
    crc INTEGER NOT NULL
);
CREATE TABLE answers (            -- those that no checkpoint holds yet
    call INTEGER PRIMARY KEY, digest BLOB, kind TEXT, decimals INTEGER, "values" BLOB, indices BLOB, crc INTEGER
);
CREATE TABLE settled (calls INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE VIEW totals AS SELECT
    count(answered) AS calls,
    coalesce(sum(queries) FILTER (WHERE answered IS NOT NULL), 0) AS queries,
    coalesce(sum(bytes_up) FILTER (WHERE answered IS NOT NULL), 0) AS bytes_up,
    coalesce(sum(bytes_down), 0) AS bytes_down,
    coalesce(sum(queries) FILTER (WHERE answered IS NULL), 0) AS uncertain
FROM calls;
"""
#: Where several machines see one file, SQLite's write-ahead log does not work: it shares memory.
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "fuse.", "ocfs", "gfs")


class BudgetSpent(MekdError, RuntimeError):
    """The next call would exceed the stage's budget; it was not sent."""

    status = 3


class LedgerError(MekdError, RuntimeError):
    """The ledger and the run do not belong together, or the ledger's file is damaged."""


class Ledger:
    """One account: calls, queries (one image is one query), bytes, and a hard budget.

    name: of the account. folder holds NAME.sqlite, of the processes after the first NAME.rankN.sqlite; without a
    folder the account lives in memory. setting: the budget's, for messages. budget: queries at most, the uncertain ones
    included; elsewhere: queries of it that other accounts have spent; reserved: those and what is theirs to spend.
    uncertain counts queries that were sent and whose answer was lost or unusable: the provider may have billed them.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None = None,
        budget: int | None = None,
        *,
        setting: str | None = None,
        rank: int = 0,
    ) -> None:
        self.name, self.setting = name, setting or f"{name}.budget"
        if budget is not None and budget < 0:
            raise UsageError(f"{self.setting} is {budget}; it must be at least 0, or null for no limit")
        self.budget, self.reserved, self.elsewhere = budget, 0, 0
        self.counts = dict.fromkeys(COUNTS, 0)
        self.settled = 0
        self.next = 0
        self._answers: dict[int, tuple[bytes, Response]] = {}
        self._attempt = 0
        self._writer: ThreadPoolExecutor | None = None
        self._booked: Future[Any] | None = None
        self._written = 0
        if folder is not None:
            self._open(folder, rank)

    @property
    def spent(self) -> int:
        """Queries that count against the budget."""
        return self.counts["queries"] + self.counts["uncertain"]

    @property
    def left(self) -> int | None:
        """Queries left in the budget; None without one."""
        return None if self.budget is None else max(0, self.budget - self.spent - self.reserved)

    def affords(self, queries: int) -> bool:
        """Whether the next call may be sent, or needs not be because its answer is known."""
        return self.next in self._answers or self.left is None or queries <= self.left

    def __str__(self) -> str:
        return describe(self.counts)

    def rewind(self, call: int) -> None:
        """Stand at a checkpoint's call again, so that the calls since then are answered from the ledger."""
        if call < self.settled:
            raise LedgerError(
                f"the ledger of {self.name} has settled {self.settled} calls, but the checkpoint knows of {call}: its "
                "checkpoint is missing or older. Put it back, or start anew with another --out"
            )
        if call > self.next_unanswered():
            raise LedgerError(
                f"the checkpoint of {self.name} knows of {call} calls, the ledger of {self.next_unanswered()}: the "
                "ledger folder is missing or older. Put it back, or start anew with another --out"
            )
        self.next = call

    def next_unanswered(self) -> int:
        """The first call that no answer is known for."""
        return max(self._answers, default=self.settled - 1) + 1

    def recall(self, images: Tensor) -> Response | None:
        """The booked answer if this call was answered before; LedgerError if it asked something else."""
        if self.next not in self._answers:
            return None
        digest, response = self._answers[self.next]
        if digest != _digest(images):
            raise LedgerError(
                f"call {self.next} of {self.name} differs from the booked one: the run is not the one that was "
                "interrupted (other code, device or thread count?). Start anew with another --out"
            )
        self.next += 1
        return response

    def intend(self, images: Tensor) -> None:
        """Book a call before it is sent; BudgetSpent, and nothing booked, if it would not fit."""
        if self.left is not None and len(images) > self.left:
            raise BudgetSpent(
                f"{self.setting} is {self.budget} queries, {self.spent} are spent"
                + (f", {self.reserved} belong to others" if self.reserved else "")
                + f" and the next call has {len(images)}; it was not sent"
            )
        self._attempt += 1
        row = (self._attempt, self.next, len(images), images.nbytes, None, time.time(), None)
        try:
            self._book(lambda database: _insert(database, "calls", row)).result()
        except MekdError:
            self._attempt -= 1
            raise
        self.counts["uncertain"] += len(images)
        self._sent = row

    def record(self, images: Tensor, response: Response) -> None:
        """Book the answer to the call that was intended last, while the caller goes on."""
        self.counts["uncertain"] -= len(response)
        self.counts["queries"] += len(response)
        self.counts["calls"] += 1
        self.counts["bytes_up"] += images.nbytes
        self.counts["bytes_down"] += response.nbytes
        if self._writer is not None:
            attempt, call, queries, up, _, sent, _ = self._sent
            row = (attempt, call, queries, up, response.nbytes, sent, time.time())
            ready = torch.cuda.Event() if images.is_cuda else None
            if ready is not None:
                ready.record()

            def write(database: sqlite3.Connection) -> None:
                if ready is not None:  # the writer's stream does not wait for the caller's by itself
                    ready.synchronize()
                _insert(database, "answers", (call, _digest(images), *_packed(response)))
                _insert(database, "calls", row)

            self._book(write)
        self.next += 1

    def settle(self) -> None:
        """Let the answers up to here go: a checkpoint that holds their effect is safely on the disk."""
        self.settled = settled = self.next
        self._answers = {n: a for n, a in self._answers.items() if n >= self.settled}
        if self._writer is None:
            return

        def write(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM answers WHERE call < ?", (settled,))
            database.execute("DELETE FROM settled")
            _insert(database, "settled", (settled,))

        self._book(write)
        self._cut_log()

    def pass_over(self) -> None:
        """Leave the answers since the checkpoint unused, though counted: other processes ask in other batches."""
        self.next = self.next_unanswered()

    def close(self) -> None:
        """Wait until all is written, and leave one plain file."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            if self._booked is not None:
                self._booked.result()
        finally:
            writer.shutdown()
            with contextlib.suppress(sqlite3.OperationalError):  # somebody reads it
                self._database.execute("PRAGMA busy_timeout = 1000")
                self._database.execute("PRAGMA journal_mode = DELETE")
            self._database.close()
            self._lock.close()

    def _book(self, write: Callable[[sqlite3.Connection], None]) -> "Future[Any]":
        """Let the writer do a transaction. An earlier one that failed is an error here, before anything follows it."""
        if self._writer is None:
            done: Future[Any] = Future()
            done.set_result(None)
            return done
        booked, self._booked = self._booked, None
        if booked is not None:
            booked.result()

        def transaction() -> None:
            with self._database:
                write(self._database)

        self._written += 1
        if self._written % LOG == 0:
            self._cut_log()
        self._booked = self._writer.submit(self._attempted, transaction)
        return self._booked

    def _cut_log(self) -> None:
        """Move what is booked into the file itself; from then on it survives a power cut too."""
        assert self._writer is not None
        self._written = 0
        cut = "PRAGMA wal_checkpoint(TRUNCATE)"
        self._booked = self._writer.submit(self._attempted, lambda: self._database.execute(cut).fetchall())

    def _attempted(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except sqlite3.OperationalError as error:
            raise files.WriteError(
                f"the ledger of {self.name} could not be written ({error}). Free some space and run the same command "
                "again: it goes on from the last checkpoint"
            ) from error

    def _open(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_file_name(self.name, rank)}.sqlite"
        if (old := path.with_suffix(".journal")).exists():
            raise LedgerError(
                f"{old} is a ledger of mekd 0.1's first format, which this version does not read: finish that run with "
                "the version that began it, or start anew with another --out"
            )
        self._lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise LedgerError(f"{path} is in use: another run works in this folder; wait for it, or stop it") from error
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level="IMMEDIATE", timeout=60)
        try:
            _check_log(path)
            self._database.execute(f"PRAGMA journal_mode = {'TRUNCATE' if _on_network(folder) else 'WAL'}")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("PRAGMA wal_autocheckpoint = 0")  # it is cut in settle()
            if not self._database.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._database.executescript(_SCHEMA)
            self._read()
        except sqlite3.OperationalError as error:
            self._database.close()
            raise files.WriteError(f"{path} cannot be opened ({error}); check the folder's permissions") from error
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise LedgerError(
                f"{path} is damaged ({error}): put a copy back, or start anew with another --out"
            ) from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"ledger {self.name}")

    def _read(self) -> None:
        query = self._database.execute
        if query("PRAGMA application_id").fetchone() != (_APPLICATION,):
            raise sqlite3.DatabaseError("it is no ledger of mekd")
        ((said,), *_) = query("PRAGMA quick_check").fetchall()
        if said != "ok":
            raise sqlite3.DatabaseError(said)
        for table in ("calls", "answers", "settled"):
            for *row, crc in query(f"SELECT * FROM {table}"):
                if crc != _crc(row):
                    raise sqlite3.DatabaseError(f"a row of {table} is not what was written")
        self._attempt, rows = query("SELECT coalesce(max(attempt), 0), count(*) FROM calls").fetchone()
        if self._attempt != rows:
            raise sqlite3.DatabaseError(f"{self._attempt - rows} calls are missing")
        self.counts = dict(zip(COUNTS, query("SELECT * FROM totals").fetchone(), strict=True))
        self.settled = self.next = (query("SELECT calls FROM settled").fetchone() or (0,))[0]
        for call, digest, *packed, _ in query("SELECT * FROM answers WHERE call >= ?", (self.settled,)):
            self._answers[call] = (digest, _unpacked(*packed))


def totals(folder: Path, *names: str) -> dict[str, int]:
    """The counts of some accounts of a folder together, over all processes; they may be in use."""
    counts = dict.fromkeys(COUNTS, 0)
    for path in (path for name in names for path in _files(folder, name)):
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            row = database.execute("SELECT * FROM totals").fetchone()
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{path} cannot be read ({error})") from error
        finally:
            database.close()
        counts = {key: counts[key] + more for key, more in zip(COUNTS, row, strict=True)}
    return counts


def describe(counts: dict[str, int]) -> str:
    """An account's counts in a line."""
    up, down = (counts[name] / 1e6 for name in ("bytes_up", "bytes_down"))
    sent = f"{counts['queries']} queries, {up:.1f} MB up, {down:.1f} MB down"
    return sent + (f", {counts['uncertain']} uncertain" if counts["uncertain"] else "")


def _file_name(name: str, rank: int) -> str:
    return f"{name}.rank{rank}" if rank else name


def _files(folder: Path, name: str) -> list[Path]:
    return [path for path in (folder / f"{name}.sqlite", *sorted(folder.glob(f"{name}.rank*.sqlite"))) if path.exists()]


def _insert(database: sqlite3.Connection, table: str, row: tuple[Any, ...]) -> None:
    marks = ", ".join("?" * (len(row) + 1))
    database.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (*row, _crc(row)))


def _crc(row: tuple[Any, ...] | list[Any]) -> int:
    """SQLite keeps no checksum of its pages."""
    crc = 0
    for value in row:
        crc = zlib.crc32(value if isinstance(value, bytes) else repr(value).encode(), crc)
    return crc


def _digest(images: Tensor) -> bytes:
    content = images.cpu().contiguous().numpy()
    return hashlib.blake2b(content.reshape(-1).view(np.uint8).data, digest_size=16).digest()


def _packed(response: Response) -> tuple[Any, ...]:
    """Kind, decimals, values and indices, the last two as NumPy's files."""
    blobs = []
    for tensor in (response.values, response.indices):
        buffer = io.BytesIO()
        if tensor is not None:
            np.save(buffer, tensor.cpu().numpy(), allow_pickle=False)
        blobs.append(None if tensor is None else buffer.getvalue())
    return response.kind, response.decimals, *blobs


def _unpacked(kind: str, decimals: int | None, values: bytes | None, indices: bytes | None) -> Response:
    def tensor(blob: bytes | None) -> Tensor | None:
        return None if blob is None else torch.from_numpy(np.load(io.BytesIO(blob), allow_pickle=False))

    return Response(kind, tensor(values), tensor(indices), decimals)


def _on_network(folder: Path) -> bool:
    """Whether the folder lies on a filesystem of several machines, as far as the system tells."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()]
    except OSError:
        return False
    place = str(folder.resolve())
    holding = [(point, kind) for point, kind in mounts if (place + "/").startswith(point.rstrip("/") + "/")]
    return bool(holding) and max(holding, key=lambda mount: len(mount[0]))[1].startswith(_NETWORK)


def _check_log(path: Path) -> None:
    """Raise where whole transactions behind a damaged place of the write-ahead log would be lost.

    SQLite stops reading at the first frame that is not what was written, and says nothing. What a killed process leaves
    unfinished is one transaction at the end whose last frame is missing; anything else is calls that were paid for.
    """
    log = path.with_name(path.name + "-wal")
    content = memoryview(log.read_bytes() if log.exists() else b"")
    if len(content) < 56:
        return
    words = struct.unpack((">" if content[3] & 1 else "<") + "6I", content[:24])
    sums = [0, 0]
    for i in range(0, 6, 2):
        sums[0] = (sums[0] + words[i] + sums[1]) & 0xFFFFFFFF
        sums[1] = (sums[1] + words[i + 1] + sums[0]) & 0xFFFFFFFF
    whole = struct.pack(">2I", *sums) == content[24:32]
    size = 24 + (struct.unpack_from(">I", content, 8)[0] if whole else 4096)
    salt = content[16:24] if whole else content[40:48]  # the log begins anew with another salt
    frames = [content[at : at + 24] for at in range(32, len(content) - size + 1, size)]
    ends = [i for i, head in enumerate(frames, 1) if head[8:16] == salt and head[4:8] != bytes(4)]
    begun_anew = any(head[8:16] != salt for head in frames)  # over old frames, where a last one may look whole
    with tempfile.TemporaryDirectory() as folder:  # a connection that ends would tidy the evidence away
        for file in (path, log):
            shutil.copy(file, Path(folder) / file.name)
        database = sqlite3.connect(Path(folder) / path.name)
        _, read, _ = database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        database.close()
    if len([end for end in ends if end > read]) > begun_anew:
        raise sqlite3.DatabaseError("its write-ahead log is damaged, and calls behind that place would be lost")
