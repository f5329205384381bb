"""The oracle asked one batch ahead by a thread, so that the student does not wait for a teacher that is fast enough."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Asked = tuple[Tensor, dict[str, Any]]  # images as they were sent, and the answer as arguments of a loss


class Ahead:
    """While a step is taken, a thread asks for the next one: ask(step), called for one step at a time, in order.

    may_ask(step): whether that step may be asked for ahead. On CUDA the thread works on a stream of its own. An
    error of ask is raised by take(), as it was; the thread never keeps the program from ending.
    """

    def __init__(self, ask: Callable[[int], Asked], may_ask: Callable[[int], bool], device: torch.device) -> None:
        self._ask, self._may_ask = ask, may_ask
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the weights that it draws with
        self._steps: queue.Queue[int] = queue.Queue(1)
        self._answers: queue.Queue[Asked | BaseException] = queue.Queue(1)
        self._asked_for: int | None = None
        self._thread = threading.Thread(target=self._work, name="oracle", daemon=True)
        self._thread.start()

    def take(self, step: int) -> Asked:
        """The images and the answer of a step; the next one is then asked for."""
        if self._asked_for is None:
            self._begin(step)
        answer = self._wait()
        self._asked_for = None
        if isinstance(answer, BaseException):
            raise answer
        if self._stream is not None:
            here = torch.cuda.current_stream(self._stream.device)
            here.wait_stream(self._stream)  # the thread is idle: all that the stream holds is this answer
            for tensor in _tensors(answer):
                tensor.record_stream(here)
        if self._may_ask(step + 1):
            self._begin(step + 1)
        return answer

    def has(self, step: int) -> bool:
        """Whether that step has been asked for."""
        return self._asked_for == step

    def answered(self) -> int:
        """The answers that lie ready, 0 or 1, once the thread is idle."""
        if self._asked_for is None:
            return 0
        answer = self._wait()
        self._answers.put(answer)
        return int(not isinstance(answer, BaseException))

    def _begin(self, step: int) -> None:
        self._asked_for = step
        self._steps.put(step)

    def _wait(self) -> Asked | BaseException:
        while True:  # in slices, so that Ctrl-C is heard and a thread that is gone is noticed
            try:
                return self._answers.get(timeout=0.5)
            except queue.Empty:
                if not self._thread.is_alive() and self._answers.empty():
                    return RuntimeError("the thread that asks the oracle ended without an answer")

    def _work(self) -> None:
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            while True:
                step = self._steps.get()
                try:
                    self._answers.put(self._ask(step))
                except BaseException as error:
                    self._answers.put(error)


def _tensors(asked: Asked) -> list[Tensor]:
    found = [asked[0]]
    for value in asked[1].values():
        found += [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor)]
    return found
