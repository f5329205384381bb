"""A thread that does what it is given, in order: what may only be used on one thread lives there."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class Worker:
    """One thread, which ends with close() and never keeps the program from ending, as an executor's would."""

    def __init__(self, name: str) -> None:
        self._given: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Result]) -> "Future[Result]":
        """Do it once all that was given before is done; its error is the future's."""
        future: Future[Result] = Future()
        self._given.put((future, work))
        return future

    def close(self) -> None:
        """End the thread after what it was given; it lets go of everything."""
        self._given.put(None)

    def _work(self) -> None:
        while (given := self._given.get()) is not None:
            future, work = given
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del given, future, work  # nothing is kept while it waits
