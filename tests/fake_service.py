"""A service in this process, whose answers are a function of the images, and an oracle that asks it."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mekd.oracle.answers import Meaning, Raw
from mekd.oracle.images import Encoding
from mekd.oracle.ledger import Ledger
from mekd.oracle.remote import RemoteOracle

IMAGE = (1, 2, 3)
CLASSES = 4
PROBS = Meaning("probs", 1.0, "as a test says")


def images(m: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (m, *IMAGE), dtype=torch.uint8, generator=generator)


def scores(asked: Tensor) -> np.ndarray:
    """The teacher: probabilities of each image alone, whatever it comes with."""
    logits = asked.flatten(1).double().numpy() @ np.random.default_rng(0).standard_normal((6, CLASSES)) / 100
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


class Fake:
    """Answers every call, late if told so, or does first what faults says: one of them a call, None for nothing.

    calls: the images of each, in the order in which they came; most: calls that were in flight at once.
    """

    def __init__(self, faults: Sequence[Exception | None] = (), pause: Callable[[int], float] = lambda call: 0) -> None:
        self.calls: list[Tensor] = []
        self.answered = self.most = self._now = 0
        self._faults, self._pause, self._lock = list(faults), pause, threading.Lock()

    def call(self, asked: "list[bytes] | Tensor") -> tuple[Raw, int]:
        assert isinstance(asked, Tensor)
        with self._lock:
            number = len(self.calls)
            self.calls.append(asked.clone())
            self._now += 1
            self.most = max(self.most, self._now)
            fault = self._faults.pop(0) if self._faults else None
        try:
            time.sleep(self._pause(number))
            if fault is not None:
                raise fault
            with self._lock:
                self.answered += len(asked)
            return Raw(scores=scores(asked)), 16 * len(asked)
        finally:
            with self._lock:
                self._now -= 1

    def close(self) -> None:
        pass

    @property
    def images(self) -> int:
        return sum(map(len, self.calls))


def connect(service: Any, folder: Path | None = None, budget: int | None = None, **options: Any) -> RemoteOracle:
    """An oracle whose account stands where the folder's does, as a stage without a checkpoint takes it up."""
    ledger = Ledger("s", folder, budget)
    ledger.rewind(0)
    options = {"encoding": Encoding(), "meaning": PROBS} | options
    return RemoteOracle(service, IMAGE, CLASSES, options.pop("response", "probs"), ledger=ledger, **options)
