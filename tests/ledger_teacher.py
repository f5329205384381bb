"""A teacher that counts what it is sent, and short ways to ask it and to look into its account."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mekd.oracle.ledger import Ledger
from mekd.oracle.response import Response
from mekd.oracle.module import TorchOracle

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


def record_ends(journal: bytes) -> list[int]:
    """The offset behind each record, read from the headers alone."""
    ends, at = [], 0
    while at < len(journal):
        kind, length, _ = struct.unpack_from("<cII", journal, at)
        assert kind in (b"T", b"I", b"A")
        at += HEADER + length
        ends.append(at)
    return ends
