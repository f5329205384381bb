"""A teacher that counts what it is sent, and short ways to ask it and to look into its account."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mekd.oracle import ledger_file
from mekd.oracle.ledger import Ledger
from mekd.oracle.module import TorchOracle
from mekd.oracle.response import Response

IMAGE = (1, 2, 3)
CLASSES = 4
BYTES_UP = 6  # an image as uint8
BYTES_DOWN = 16  # a row of probabilities


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
    """The connection broke while a call was in flight."""


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
    """Open the account, replay what is known, and lose the connection in the middle of one more call."""
    ledger = Ledger("s", folder)
    ledger.rewind(ledger.next_unanswered())
    with pytest.raises(Cut):
        connect(ledger, Unplugged()).query(batch(seed, m))
    ledger.close()


def counts(folder: Path) -> dict[str, int]:
    ledger = Ledger("s", folder)
    ledger.close()
    return ledger.counts


def total(calls: int, m: int = 2, uncertain: int = 0) -> dict[str, int]:
    """What an account says after so many answered calls of m images."""
    queries = calls * m
    return {
        "calls": calls,
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


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    """What anybody can ask of the file."""
    database = sqlite3.connect(folder / "s.sqlite")
    found = database.execute(query).fetchall()
    database.close()
    return found


def accounts(out: Path) -> dict[str, dict[str, int]]:
    """What each account of a run says, over all processes."""
    names = {path.name.split(".")[0] for path in (out / "ledger").glob("*.sqlite")}
    return {name: ledger_file.totals(out / "ledger", name) for name in sorted(names)}


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what was left of a budget that only one of two runs had."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "budget_left"} for row in found]
