"""What was asked and what it cost, in an SQLite file that anyone can query, so that nothing is paid for twice.

A call to the teacher is booked before it is sent and again with its answer, by one thread. Its number is that of its
first image among all that the account asked for. A resumed stage asks for the same images again and is answered from
the ledger, however they are cut into calls now, up to the calls that were in flight or not yet written. That holds for
a process that is killed; a power cut can take what was booked since the last checkpoint.
"""

import contextlib
import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mekd import files
from mekd.errors import MekdError, UsageError
from mekd.oracle.ledger_file import COUNTS, LedgerError, contents, insert, open_file, packed, totals
from mekd.oracle.response import Response

__all__ = ["BudgetSpent", "Ledger", "LedgerError", "describe", "digests", "totals"]

Result = TypeVar("Result")

LOG = 2000  # transactions that the write-ahead log grows by at most


class BudgetSpent(MekdError, RuntimeError):
    """The next call would exceed the stage's budget; it was not sent."""

    status = 3


class Sent(NamedTuple):
    """A call as it was booked before it was sent; call: the number of its first image."""

    attempt: int
    call: int
    queries: int
    bytes_up: int
    time: float


class Ledger:
    """One account: calls, queries (one image is one query), bytes, and a hard budget.

    name: of the account. folder holds NAME.sqlite, of the processes after the first NAME.rankN.sqlite; without a
    folder the account lives in memory. setting: the budget's, for messages. budget: queries at most, the uncertain ones
    included; elsewhere: queries of it that other accounts have spent; reserved: those and what is theirs to spend.
    uncertain counts queries that were sent and whose answer was lost or unusable: the provider may have billed them.
    next: the images that were asked for, in order. Several threads may have calls in flight.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path | None = None,
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
        self._unfinished: set[int] = set()
        self._turn = threading.RLock()
        self._writer: ThreadPoolExecutor | None = None
        self._booked: Future[Any] | None = None
        self._written = 0
        if folder is not None:
            self._database, self._lock, self._witness, held = open_file(Path(folder), name, rank)
            self.counts, self._marks, self._answers = held
            self.settled = self._marks.settled
            self.next = self.settled
            self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"ledger {name}")

    @property
    def spent(self) -> int:
        """Queries that count against the budget."""
        return self.counts["queries"] + self.counts["uncertain"]

    @property
    def left(self) -> int | None:
        """Queries left in the budget; None without one."""
        return None if self.budget is None else max(0, self.budget - self.spent - self.reserved)

    def affords(self, queries: int) -> bool:
        """Whether the next images may be asked for, as far as their answers are not known."""
        return self.left is None or self.left >= queries - sum(hi - lo for _, lo, hi in self._known(queries))

    def __str__(self) -> str:
        return describe(self.counts)

    def rewind(self, image: int) -> None:
        """Stand at a checkpoint's image again, so that the images since then are answered from the ledger."""
        if image < self.next and self._writer is not None:  # what this process booked since is in the file alone
            self._book(lambda database: None).result()
            self._answers = contents(self._database).answers
            self._unfinished.clear()
        if image < self.settled:
            raise LedgerError(
                f"the ledger of {self.name} has settled {self.settled} images, but the checkpoint knows of {image}: "
                "its checkpoint is missing or older. Put it back, or start anew with another --out"
            )
        if image > self.next_unanswered():
            raise LedgerError(
                f"the checkpoint of {self.name} knows of {image} images, the ledger of {self.next_unanswered()}: the "
                "ledger folder is missing or older. Put it back, or start anew with another --out"
            )
        self.next = image

    def next_unanswered(self) -> int:
        """The first image behind all that an answer is known for."""
        return max((first + len(answer) for first, (_, answer) in self._answers.items()), default=self.settled)

    def recall(self, images: Tensor) -> list[tuple[int, Response]]:
        """The booked answers to the next images (m, ...), as far as there are any: row of the first, and answers.

        LedgerError if something else was asked there, unless by this process, whose query then failed.
        """
        found = []
        for first, low, high in self._known(len(images)):
            booked, answer = self._answers[first]
            row, rows = low - self.next, slice(low - first, high - first)
            if booked[16 * rows.start : 16 * rows.stop] != digests(images[row : row + high - low]):
                if first in self._unfinished:  # the caller asks something else after an error
                    del self._answers[first]
                    continue
                raise LedgerError(
                    f"call {first} of {self.name} differs from the booked one: the run is not the one that was "
                    "interrupted (other code, device, or number of threads or processes?). Go on as it was begun, or "
                    "start anew with another --out (in a loop of your own: in another folder, or after pass_over() of "
                    "the ledger)"
                )
            found.append((row, answer[rows]))
        return found

    def _known(self, count: int) -> list[tuple[int, int, int]]:
        """Of the next images: the booked calls that hold some, each with the first and the end of those that it has."""
        end = self.next + count
        spans = ((first, first + len(answer)) for first, (_, answer) in sorted(self._answers.items()))
        return [
            (first, max(first, self.next), min(stop, end)) for first, stop in spans if first < end and stop > self.next
        ]

    def intend(self, images: Tensor, row: int = 0, bytes_up: int | None = None) -> Sent:
        """Book a call before it is sent; BudgetSpent, and nothing booked, if it would not fit.

        row: of its first image among the next ones; bytes_up: of the payload, where it is not the images' own.
        """
        with self._turn:
            if self.left is not None and len(images) > self.left:
                raise BudgetSpent(
                    f"{self.setting} is {self.budget} queries, {self.spent} are spent"
                    + (f", {self.reserved} belong to others" if self.reserved else "")
                    + f" and the next call has {len(images)}; it was not sent"
                )
            call, queries, now = self.next + row, len(images), time.time()
            up = images.nbytes if bytes_up is None else bytes_up

            def write(database: sqlite3.Connection) -> int:
                attempt: int = database.execute("SELECT coalesce(max(attempt), 0) + 1 FROM calls").fetchone()[0]
                insert(database, "calls", (attempt, call, queries, up, None, now, None))
                self._marks = self._marks._replace(sent=attempt)
                return attempt

            booked = self._book(write)
            self.counts["uncertain"] += queries
        try:
            return Sent(booked.result(), call, queries, up, now)
        except MekdError:
            with self._turn:
                self.counts["uncertain"] -= queries
            raise

    def record(self, sent: Sent, images: Tensor, response: Response, bytes_down: int | None = None) -> None:
        """Book the answer to a call, while the caller goes on; bytes_down: where they are not the answer's own."""
        down = response.nbytes if bytes_down is None else bytes_down
        ready = torch.cuda.Event() if images.is_cuda else None
        if ready is not None:
            ready.record()

        def write(database: sqlite3.Connection) -> None:
            if ready is not None:  # the writer's stream does not wait for the caller's by itself
                ready.synchronize()
            insert(database, "answers", (sent.call, digests(images), *packed(response)))
            insert(database, "calls", (*sent[:4], down, sent.time, time.time()))
            self._marks = self._marks._replace(ended=self._marks.ended + 1)

        with self._turn:
            self.counts["uncertain"] -= sent.queries
            self.counts["queries"] += sent.queries
            self.counts["calls"] += 1
            self.counts["bytes_up"] += sent.bytes_up
            self.counts["bytes_down"] += down
            self._book(write)

    def remember(self, images: Tensor, answered: list[tuple[int, Response]]) -> None:
        """Keep what was booked of a query of images (m, ...) that failed, each with its first row, to ask it again."""
        for row, answer in answered:
            self._answers[self.next + row] = digests(images[row : row + len(answer)]), answer
            self._unfinished.add(self.next + row)

    def refuse(self, sent: Sent) -> None:
        """Book that a call was certainly refused: it cost nothing, and stays as a row of no queries."""
        with self._turn:
            self.counts["uncertain"] -= sent.queries
            row = (sent.attempt, sent.call, 0, 0, 0, sent.time, time.time())

            def write(database: sqlite3.Connection) -> None:
                insert(database, "calls", row)
                self._marks = self._marks._replace(ended=self._marks.ended + 1)

            self._book(write)

    def settle(self) -> None:
        """Let the answers up to here go: a checkpoint that holds their effect is safely on the disk."""
        self.settled = settled = self.next
        self._answers = {n: a for n, a in self._answers.items() if n + len(a[1]) > settled}
        if self._writer is None:
            return

        def write(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM answers WHERE call + length(digest) / 16 <= ?", (settled,))
            database.execute("DELETE FROM settled")
            insert(database, "settled", (settled,))
            self._marks = self._marks._replace(settled=settled)

        self._book(write, cut=True)

    def flush(self) -> None:
        """Wait until what was booked is in the file itself, power cut or not: a checkpoint may know of no more."""
        self._book(lambda database: None, cut=True).result()

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
            self._witness.close()
            self._lock.release()

    def _book(self, write: Callable[[sqlite3.Connection], Any], cut: bool = False) -> "Future[Any]":
        """Let the writer do a transaction. An earlier one that failed is an error here, before anything follows it.

        cut: then move what is booked into the file itself; from there on it survives a power cut too.
        """
        if self._writer is None:  # in memory
            done: Future[Any] = Future()
            done.set_result(0)
            return done
        booked, self._booked = self._booked, None
        if booked is not None:
            booked.result()
        self._written = 0 if cut or self._written == LOG else self._written + 1
        cut = self._written == 0

        def transaction() -> Any:
            before = self._marks
            try:
                with self._database:
                    result = write(self._database)
            except BaseException:
                self._marks = before
                raise
            self._witness.write(self._marks)
            if cut:
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            return result

        self._booked = self._writer.submit(self._attempted, transaction)
        return self._booked

    def _attempted(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except (sqlite3.OperationalError, OSError) as error:
            raise files.WriteError(
                f"the ledger of {self.name} could not be written ({error}). Free some space and run the same command "
                "again: it goes on from the last checkpoint"
            ) from error


def describe(counts: dict[str, int]) -> str:
    """An account's counts in a line."""
    up, down = (counts[name] / 1e6 for name in ("bytes_up", "bytes_down"))
    sent = f"{counts['queries']} queries, {up:.1f} MB up, {down:.1f} MB down"
    return sent + (f", {counts['uncertain']} uncertain" if counts["uncertain"] else "")


def digests(images: Tensor) -> bytes:
    """Of each image, 16 bytes, by which it is known again."""
    content = images.cpu().contiguous().numpy()
    rows = content.reshape(len(content), -1).view(np.uint8)
    return b"".join(hashlib.blake2b(row.data, digest_size=16).digest() for row in rows)
