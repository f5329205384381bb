"""Requests that wait a moment for each other, so that one run of the model answers several."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]


class QueueFull(Exception):
    """As many requests wait as may."""


class _Waiting(NamedTuple):
    images: np.ndarray
    answer: "asyncio.Future[np.ndarray]"
    since: float


class Batcher:
    """Runs a model in a thread of its own, for the requests of one event loop.

    batch: images that requests are put together to; one that has more is run alone. wait: seconds that a request waits
    for others at most. limit: requests that wait at most.
    """

    def __init__(self, run: Run, batch: int, wait: float, limit: int) -> None:
        self._run, self._batch, self._wait, self._limit = run, batch, wait, limit
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()

    async def ask(self, images: np.ndarray) -> np.ndarray:
        """The model's raw answer to images (m, ...); raises QueueFull, and whatever the model raises."""
        if len(self._waiting) >= self._limit:
            raise QueueFull
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[np.ndarray] = loop.create_future()
        self._waiting.append(_Waiting(images, answer, loop.time()))
        self._arrived.set()
        return await answer

    async def work(self) -> None:
        """Answer requests until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            while True:
                await self._gathered(loop)
                taken = self._taken()
                images = [request.images for request in taken]
                ends = np.cumsum([len(part) for part in images])
                try:
                    together = images[0] if len(images) == 1 else np.concatenate(images)
                    rows = await loop.run_in_executor(thread, self._run, together)
                    if len(rows) != ends[-1]:
                        raise ValueError(f"it answered {len(rows)} rows to {ends[-1]} images")
                except Exception as error:  # one that left here would leave every later request waiting
                    for request in taken:
                        if not request.answer.done():
                            request.answer.set_exception(error)
                    continue
                for request, row in zip(taken, np.split(rows, ends[:-1]), strict=True):
                    if not request.answer.done():
                        request.answer.set_result(row)

    async def _gathered(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for a request, and then for others: until they fill a batch, or the first has waited enough."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        until = self._waiting[0].since + self._wait
        while sum(len(request.images) for request in self._waiting) < self._batch and until > loop.time():
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), until - loop.time())

    def _taken(self) -> list[_Waiting]:
        """The requests of the next run, in the order in which they came."""
        taken = [self._waiting.popleft()]
        size = len(taken[0].images)
        while self._waiting and size + len(self._waiting[0].images) <= self._batch:
            taken.append(self._waiting.popleft())
            size += len(taken[-1].images)
        return taken
