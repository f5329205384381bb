"""The file of an account: SQLite, which keeps what a killed process wrote, with a checksum of each row.

A power cut can take what was booked since the last checkpoint; a copy of the file alone is whole once it is closed.
"""

import contextlib
import io
import os
import shutil
import sqlite3
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout  # torch brings it
from torch import Tensor

from mekd import files
from mekd.errors import MekdError
from mekd.oracle.response import Response

COUNTS = ("calls", "queries", "bytes_up", "bytes_down", "uncertain")
_MARKS = struct.Struct("<3QI")
_APPLICATION, _VERSION = 0x6D656B64, 2  # "mekd"
_SCHEMA = f"""
BEGIN;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
CREATE TABLE calls (
    attempt INTEGER PRIMARY KEY,  -- in the order in which they were sent
    call INTEGER NOT NULL,        -- its first image: one whose answer was lost is asked for again under its number
    queries INTEGER NOT NULL,     -- images; 0 where the call was certainly refused
    bytes_up INTEGER NOT NULL,
    bytes_down INTEGER,           -- NULL without an answer: the provider may have billed it
    sent REAL NOT NULL,           -- seconds since 1970
    answered REAL,
    crc INTEGER NOT NULL
);
CREATE TABLE answers (            -- those that no checkpoint holds yet
    call INTEGER PRIMARY KEY, digest BLOB, kind TEXT, decimals INTEGER, "values" BLOB, indices BLOB, crc INTEGER
);
CREATE TABLE settled (images INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE VIEW totals AS SELECT
    count(*) FILTER (WHERE answered IS NOT NULL AND queries > 0) AS calls,
    coalesce(sum(queries) FILTER (WHERE answered IS NOT NULL), 0) AS queries,
    coalesce(sum(bytes_up) FILTER (WHERE answered IS NOT NULL), 0) AS bytes_up,
    coalesce(sum(bytes_down), 0) AS bytes_down,
    coalesce(sum(queries) FILTER (WHERE answered IS NULL), 0) AS uncertain
FROM calls;
COMMIT;
"""
#: Where several machines see one file, SQLite's write-ahead log does not work: it shares memory.
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "fuse.", "ocfs", "gfs")


class LedgerError(MekdError, RuntimeError):
    """The ledger and the run do not belong together, or the ledger's file is damaged."""


class Marks(NamedTuple):
    """How far an account is: attempts that were sent, those that ended, images that are settled. They only grow."""

    sent: int
    ended: int
    settled: int


class Contents(NamedTuple):
    """What a file holds: the counts, how far it is, digests and answer of each call since what is settled."""

    counts: dict[str, int]
    marks: Marks
    answers: dict[int, tuple[bytes, Response]]


class Witness:
    """How far an account is, beside its file: SQLite reads a log that was cut short as one that ends there.

    It is written behind each transaction, so that after a kill it is never ahead; with a checksum of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115

    def check(self, marks: Marks) -> None:
        """DatabaseError where the account is less far than was booked."""
        content = os.pread(self._file.fileno(), _MARKS.size, 0)
        if len(content) < _MARKS.size or zlib.crc32(content[:-4]) != _MARKS.unpack(content)[-1]:
            return
        booked = Marks(*_MARKS.unpack(content)[:-1])
        if any(now < then for now, then in zip(marks, booked, strict=True)):
            raise sqlite3.DatabaseError(
                f"it ends with {marks.sent} attempts of which {marks.ended} ended, and {booked.sent} and "
                f"{booked.ended} were booked; to pay for the rest again, delete {self.path.name}"
            )

    def write(self, marks: Marks) -> None:
        """Keep how far the account is now."""
        content = _MARKS.pack(*marks, 0)[:-4]
        os.pwrite(self._file.fileno(), content + struct.pack("<I", zlib.crc32(content)), 0)

    def close(self) -> None:
        self._file.close()


def open_file(folder: Path, name: str, rank: int) -> tuple[sqlite3.Connection, BaseFileLock, Witness, Contents]:
    """The file of the account NAME, made if it is not there, the lock that keeps others out, its witness, its contents.

    Raises LedgerError for one that is in use, of another format or damaged, WriteError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.rank{rank}.sqlite" if rank else folder / f"{name}.sqlite"
    if (old := path.with_suffix(".journal")).exists():
        raise LedgerError(
            f"{old} is a ledger of mekd's first format, which this version does not read: finish that run with the "
            "version that began it, or start anew with another --out"
        )
    lock = _locked(path)
    database = sqlite3.connect(path, check_same_thread=False, isolation_level="IMMEDIATE", timeout=60)
    try:
        witness = Witness(path.with_suffix(".booked"))
    except OSError as error:
        database.close()
        lock.release()
        raise files.WriteError(f"{path} cannot be opened ({error}); check the folder's permissions") from error
    try:
        _check_log(path)
        database.execute(f"PRAGMA journal_mode = {'TRUNCATE' if _on_network(folder) else 'WAL'}")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA wal_autocheckpoint = 0")  # the ledger cuts it
        if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            database.executescript(_SCHEMA)
        held = contents(database)
        witness.check(held.marks)
        return database, lock, witness, held
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        database.close()
        witness.close()
        lock.release()
        if any(word in str(error) for word in ("unable to open", "readonly", "disk I/O", "disk is full", "locked")):
            raise files.WriteError(f"{path} cannot be opened ({error}); check the folder's permissions") from error
        raise LedgerError(f"{path} is damaged ({error}): put a copy back, or start anew with another --out") from error


def totals(folder: Path, *names: str) -> dict[str, int]:
    """The counts of some accounts of a folder together, over all processes; they may be in use.

    An account NAME has those of earlier generations with it, NAME@1 and so on; NAME@* are these alone.
    """
    counts = dict.fromkeys(COUNTS, 0)
    patterns = [f"{name}{more}.sqlite" for name in names for more in ("", ".rank*", "@*")]
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        row = _looked_up(path, "SELECT * FROM totals", (0,) * len(COUNTS))
        counts = {key: counts[key] + more for key, more in zip(COUNTS, row, strict=True)}
    return counts


def pending(folder: Path, name: str) -> int:
    """The images whose answers no checkpoint holds yet, of one account over all processes; it may be in use."""
    query = "SELECT coalesce(sum(length(digest) / 16), 0) FROM answers"
    paths = [path for pattern in (f"{name}.sqlite", f"{name}.rank*.sqlite") for path in folder.glob(pattern)]
    return sum(_looked_up(path, query, (0,))[0] for path in paths)


def _looked_up(path: Path, query: str, nothing: tuple[int, ...]) -> tuple[int, ...]:
    """The row that a query finds in an account's file; nothing: where it was killed before it had made its tables."""

    def look(mode: str) -> tuple[int, ...]:
        address = f"{path.resolve().as_uri()}?mode={mode}"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=60)) as database:
            made = database.execute("SELECT 1 FROM sqlite_master").fetchone()
            return tuple(database.execute(query).fetchone()) if made else nothing

    try:
        try:
            return look("ro")
        except sqlite3.OperationalError as error:
            if "readonly" not in str(error):
                raise
            return look("rw")  # a killed process left a transaction, which reading has to take back first
    except sqlite3.OperationalError as error:
        raise LedgerError(f"{path} cannot be read ({error})") from error
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path} is damaged ({error}): put a copy back, or start anew with another --out") from error


def insert(database: sqlite3.Connection, table: str, row: tuple[Any, ...]) -> None:
    marks = ", ".join("?" * (len(row) + 1))
    database.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (*row, _crc(row)))


def contents(database: sqlite3.Connection) -> Contents:
    """What a file holds, each row as it was written; DatabaseError where one is not, LedgerError for another format."""
    query = database.execute
    if query("PRAGMA application_id").fetchone() != (_APPLICATION,):
        raise sqlite3.DatabaseError("it is no ledger of mekd")
    if (version := query("PRAGMA user_version").fetchone()[0]) != _VERSION:
        raise LedgerError(
            f"the ledger is of format {version}, and this version of mekd reads {_VERSION}: finish that run with the "
            "version that began it, or start anew with another --out"
        )
    ((said,), *_) = query("PRAGMA quick_check").fetchall()
    if said != "ok":
        raise sqlite3.DatabaseError(said)
    for table in ("calls", "answers", "settled"):
        for *row, crc in query(f"SELECT * FROM {table}"):
            if crc != _crc(row):
                raise sqlite3.DatabaseError(f"a row of {table} is not what was written")
    attempts, rows = query("SELECT coalesce(max(attempt), 0), count(*) FROM calls").fetchone()
    if attempts != rows:
        raise sqlite3.DatabaseError(f"{attempts - rows} calls are missing")
    counts = dict(zip(COUNTS, query("SELECT * FROM totals").fetchone(), strict=True))
    (settled,) = query("SELECT images FROM settled").fetchone() or (0,)
    since = query("SELECT * FROM answers WHERE call + length(digest) / 16 > ?", (settled,))
    answers = {call: (digest, _unpacked(*packed)) for call, digest, *packed, _ in since}
    (ended,) = query("SELECT count(answered) FROM calls").fetchone()
    return Contents(counts, Marks(attempts, ended, settled), answers)


def _locked(path: Path) -> BaseFileLock:
    lock = FileLock(path.with_suffix(".lock"), thread_local=False)  # the ledger may be closed by another thread
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise LedgerError(f"{path} is in use: another run works in this folder; wait for it, or stop it") from error
    return lock


def _crc(row: tuple[Any, ...] | list[Any]) -> int:
    """SQLite keeps no checksum of its pages."""
    crc = 0
    for value in row:
        crc = zlib.crc32(value if isinstance(value, bytes) else repr(value).encode(), crc)
    return crc


def packed(response: Response) -> tuple[Any, ...]:
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
