"""What was asked and what it cost, in an SQLite file that anyone can query, so that nothing is paid for twice.

A call to the teacher is booked before it is sent and again with its answer, by one thread. A resumed stage asks the
same questions again and is answered from the ledger, up to the one call that was in flight or not yet written. That
holds for a process that is killed; a power cut can take what was booked since the last checkpoint.
"""

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mekd import files
from mekd.errors import MekdError, UsageError
from mekd.oracle.ledger_file import COUNTS, LedgerError, insert, open_file, packed, totals
from mekd.oracle.response import Response

__all__ = ["BudgetSpent", "Ledger", "LedgerError", "describe", "totals"]

Result = TypeVar("Result")

LOG = 2000  # transactions that the write-ahead log grows by at most


class BudgetSpent(MekdError, RuntimeError):
    """The next call would exceed the stage's budget; it was not sent."""

    status = 3


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
            self._database, self._lock, held = open_file(folder, name, rank)
            self._attempt, self.counts, self.settled, self._answers = held
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
            self._book(lambda database: insert(database, "calls", row)).result()
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
                insert(database, "answers", (call, _digest(images), *packed(response)))
                insert(database, "calls", row)

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
            insert(database, "settled", (settled,))

        self._book(write, cut=True)

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

    def _book(self, write: Callable[[sqlite3.Connection], None], cut: bool = False) -> "Future[Any]":
        """Let the writer do a transaction. An earlier one that failed is an error here, before anything follows it.

        cut: then move what is booked into the file itself; from there on it survives a power cut too.
        """
        if self._writer is None:
            done: Future[Any] = Future()
            done.set_result(None)
            return done
        booked, self._booked = self._booked, None
        if booked is not None:
            booked.result()
        self._written = 0 if cut or self._written == LOG else self._written + 1
        cut = self._written == 0

        def transaction() -> None:
            with self._database:
                write(self._database)
            if cut:
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

        self._booked = self._writer.submit(self._attempted, transaction)
        return self._booked

    def _attempted(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except sqlite3.OperationalError as error:
            raise files.WriteError(
                f"the ledger of {self.name} could not be written ({error}). Free some space and run the same command "
                "again: it goes on from the last checkpoint"
            ) from error


def describe(counts: dict[str, int]) -> str:
    """An account's counts in a line."""
    up, down = (counts[name] / 1e6 for name in ("bytes_up", "bytes_down"))
    sent = f"{counts['queries']} queries, {up:.1f} MB up, {down:.1f} MB down"
    return sent + (f", {counts['uncertain']} uncertain" if counts["uncertain"] else "")


def _digest(images: Tensor) -> bytes:
    content = images.cpu().contiguous().numpy()
    return hashlib.blake2b(content.reshape(-1).view(np.uint8).data, digest_size=16).digest()
