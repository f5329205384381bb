"""What was asked, what it cost, and a journal of answers, so that nothing is paid for twice.

Every request is journalled twice: the intent before it is sent, the answer when it is there. A resumed stage
asks the same questions again and is answered from the journal, up to the one request that was in flight.
"""

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mekd import files
from mekd.oracle.response import Response
from mekd.errors import MekdError

_HEADER = struct.Struct("<cII")  # kind of record (T, I or A), length of the payload, CRC-32 of kind and payload
_COUNTS = ("requests", "queries", "bytes_up", "bytes_down", "uncertain")


class BudgetSpent(MekdError, RuntimeError):
    """The next request would exceed the stage's budget; it was not sent."""

    status = 3


class LedgerError(MekdError, RuntimeError):
    """The ledger and the run do not belong together."""


class Ledger:
    """The account of one stage: requests, queries (one image is one query), bytes, and a hard budget.

    stage names the account. folder holds STAGE.journal (the totals at the last checkpoint, and every request
    since) and STAGE.json (those totals, for others to read); without a folder the account lives in memory.
    budget: queries at most, the uncertain ones included; price: what one query costs. uncertain counts queries
    that were sent and whose answer was lost or unusable: the provider may have billed them. rank: the process that
    keeps the account, of several; those after the first have STAGE.rankN.journal. reserved: queries of the budget
    that are spent by other processes, or theirs to spend.
    """

    def __init__(
        self,
        stage: str,
        folder: Path | None = None,
        budget: int | None = None,
        price: float | None = None,
        rank: int = 0,
    ) -> None:
        if budget is not None and budget < 0:
            raise ValueError(f"{stage}.budget is {budget}; it must be at least 0, or null for no limit")
        self.stage, self.budget, self.price, self.reserved = stage, budget, price, 0
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.settled = 0
        self.next = 0
        self._answers: dict[int, tuple[str, Response]] = {}
        self._journal: BinaryIO | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / (f"{stage}.rank{rank}.journal" if rank else f"{stage}.journal")
            self._read()

    @property
    def spent(self) -> int:
        """Queries that count against the budget."""
        return self.counts["queries"] + self.counts["uncertain"]

    @property
    def left(self) -> int | None:
        """Queries left in the budget; None without one."""
        return None if self.budget is None else max(0, self.budget - self.spent - self.reserved)

    def affords(self, queries: int) -> bool:
        """Whether the next request may be sent, or needs not be because its answer is in the journal."""
        return self.next in self._answers or self.left is None or queries <= self.left

    def totals(self) -> dict[str, Any]:
        """The counts, and the cost where a price is known."""
        cost = {} if self.price is None else {"cost": round(self.spent * self.price, 6)}
        return {**self.counts, **cost}

    def __str__(self) -> str:
        return describe(self.counts)

    def rewind(self, request: int) -> None:
        """Stand at a checkpoint's request again, so that the requests since then are answered from the journal."""
        if request < self.settled:
            raise LedgerError(
                f"the ledger of {self.stage} has settled {self.settled} requests, but the checkpoint knows of "
                f"{request}: its checkpoint is missing or older. Put it back, or start anew with another --out"
            )
        if request > self.next_unanswered():
            raise LedgerError(
                f"the checkpoint of {self.stage} knows of {request} requests, the ledger of "
                f"{self.next_unanswered()}: the ledger folder is missing or older. Put it back, or start anew with "
                "another --out"
            )
        self.next = request

    def next_unanswered(self) -> int:
        """The first request that no answer is known for."""
        return max(self._answers, default=self.settled - 1) + 1

    def recall(self, images: Tensor) -> Response | None:
        """The journalled answer if this request was answered before; LedgerError if it asked something else."""
        if self.next not in self._answers:
            return None
        digest, response = self._answers[self.next]
        if digest != _digest(images):
            raise LedgerError(
                f"request {self.next} of {self.stage} differs from the journalled one: the run is not the one that "
                "was interrupted (other code, device or thread count?). Start anew with another --out"
            )
        self.next += 1
        return response

    def intend(self, images: Tensor) -> None:
        """Journal a request before it is sent; BudgetSpent, and nothing journalled, if it would not fit."""
        if self.left is not None and len(images) > self.left:
            raise BudgetSpent(
                f"{self.stage}.budget is {self.budget} queries, {self.spent} are spent"
                + (f", {self.reserved} belong to other processes" if self.reserved else "")
                + f" and the next request has {len(images)}; it was not sent"
            )
        self._append(b"I", json.dumps({"request": self.next, "queries": len(images)}).encode())
        self.counts["uncertain"] += len(images)

    def record(self, images: Tensor, response: Response) -> None:
        """Journal the answer to the request that was intended last."""
        if self._journal is not None:
            self._append(b"A", _pack(self.next, images, response))
        self._count(images.nbytes, response)
        self.next += 1

    def settle(self) -> None:
        """Forget the answers up to here: a checkpoint that holds their effect is safely on the disk."""
        self.settled = self.next
        self._answers = {n: a for n, a in self._answers.items() if n >= self.settled}
        if self._journal is None:
            return
        if self._answers:  # still replaying: the journal's tail is needed, and totals already count it
            return
        totals = json.dumps({**self.counts, "settled": self.settled}, indent=1)
        # One file, replaced in one step: no kill can leave totals beside the records that they contain.
        files.write(self._path, lambda file: file.write(_record(b"T", totals.encode())))
        self._journal.close()
        self._journal = open(self._path, "r+b", buffering=0)  # noqa: SIM115
        self._journal.seek(0, io.SEEK_END)
        files.write_text(self._path.with_suffix(".json"), totals + "\n")

    def pass_over(self) -> None:
        """Leave the answers since the checkpoint unused, though counted: other processes ask in other batches."""
        self.next = self.next_unanswered()

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()

    def _count(self, bytes_up: int, response: Response) -> None:
        self.counts["uncertain"] -= len(response)
        self.counts["queries"] += len(response)
        self.counts["requests"] += 1
        self.counts["bytes_up"] += bytes_up
        self.counts["bytes_down"] += response.nbytes

    def _append(self, kind: bytes, payload: bytes) -> None:
        if self._journal is None:
            return
        record = _record(kind, payload)
        start = self._journal.tell()
        try:
            if self._journal.write(record) < len(record):
                raise OSError("the disk is full")
        except OSError as error:
            self._journal.truncate(start)
            self._journal.seek(start)
            raise files.WriteError(
                f"the journal of {self.stage} could not be written ({error}). Free some space and run the same "
                "command again: it goes on from the last checkpoint"
            ) from error

    def _read(self) -> None:
        # Unbuffered: what a killed process wrote is in the kernel's hands.
        self._journal = open(self._path, "r+b" if self._path.exists() else "w+b", buffering=0)  # noqa: SIM115
        good = 0
        for kind, payload, good in _records(self._journal, self._path):  # noqa: B007
            if kind == b"T":
                self.counts = json.loads(payload)
                self.settled = self.next = self.counts.pop("settled")
                files.write_text(self._path.with_suffix(".json"), payload.decode() + "\n")
            elif kind == b"I":
                self.counts["uncertain"] += json.loads(payload)["queries"]
            else:
                head, response = _unpack(payload)
                self._answers[head["request"]] = (head["digest"], response)
                self._count(head["up"], response)
        self._journal.truncate(good)  # a record that the kill cut short
        self._journal.seek(good)


def describe(counts: dict[str, int]) -> str:
    """An account's counts in a line."""
    up, down = (counts[name] / 1e6 for name in ("bytes_up", "bytes_down"))
    sent = f"{counts['queries']} queries, {up:.1f} MB up, {down:.1f} MB down"
    return sent + (f", {counts['uncertain']} uncertain" if counts["uncertain"] else "")


def _digest(images: Tensor) -> str:
    return hashlib.blake2b(images.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _record(kind: bytes, payload: bytes) -> bytes:
    return _HEADER.pack(kind, len(payload), zlib.crc32(kind + payload)) + payload


def _records(journal: BinaryIO, path: Path) -> Iterator[tuple[bytes, bytes, int]]:
    """The whole records of a journal, each with the offset behind it; the one that a kill cut short is left out."""
    size = path.stat().st_size
    while len(header := journal.read(_HEADER.size)) == _HEADER.size:
        kind, length, crc = _HEADER.unpack(header)
        payload = journal.read(length)
        if len(payload) < length or zlib.crc32(kind + payload) != crc:
            if journal.tell() < size:
                raise LedgerError(
                    f"{path} is damaged before its end; put a copy back, or start anew with another --out"
                )
            return
        yield kind, payload, journal.tell()


def _pack(request: int, images: Tensor, response: Response) -> bytes:
    head = {"request": request, "digest": _digest(images), "up": images.nbytes}
    head |= {"kind": response.kind, "decimals": response.decimals}
    head["parts"] = [name for name in ("values", "indices") if getattr(response, name) is not None]
    buffer = io.BytesIO()
    buffer.write(json.dumps(head).encode() + b"\n")
    for tensor in response.tensors():
        np.save(buffer, tensor.cpu().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _unpack(payload: bytes) -> tuple[dict[str, Any], Response]:
    buffer = io.BytesIO(payload)
    head = json.loads(buffer.readline())
    parts = {name: torch.from_numpy(np.load(buffer, allow_pickle=False)) for name in head["parts"]}
    return head, Response(head["kind"], parts.get("values"), parts.get("indices"), head["decimals"])
