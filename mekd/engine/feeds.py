"""What a step consumes, and what it owes for it: images, fresh queries, the same asked ahead, replayed answers."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mekd.data import Batches, arrays
from mekd.engine import parallel
from mekd.engine.account import open_account
from mekd.engine.pictures import Pictures
from mekd.engine.run import Run
from mekd.engine.worker import Worker
from mekd.errors import Diverged
from mekd.oracle.base import Oracle
from mekd.oracle.ledger import Ledger
from mekd.oracle.replay import Joined, Replay
from mekd.oracle.response import Response
from mekd.oracle.session import provider_names, runs_on_cuda
from mekd.pixels import to_uint8
from mekd.seeds import generator_at


class Asked(NamedTuple):
    """Images (m, ch, S, S), the teacher's answer, the nuisance that G drew them with, and what G drew of the answer."""

    images: Tensor
    answer: Response | None
    n: Tensor
    kept: Tensor | None = None

    @property
    def confidence(self) -> Tensor | None:
        """The teacher's top probability (m,), where it was asked."""
        return None if self.answer is None else self.answer.confidence

    @property
    def target(self) -> dict[str, Any]:
        """The arguments of MEKDLoss.terms."""
        assert self.answer is not None
        own = {"n": self.n} if self.n.shape[1] else {}
        return self.answer.target | own | ({} if self.kept is None else {"kept": self.kept})


#: What G draws for a step: images (m, ch, S, S), and the nuisance (m, entries) that they are drawn with.
Draw = Callable[[int], tuple[Tensor, Tensor]]


class Feed(Protocol):
    """What one process consumes in the steps of a stage. take(step) gives it; steps are taken in order.

    ledger: what is paid is booked there; waits_for: "data" or "teacher"; waited: seconds that take() waited for it.
    """

    ledger: Ledger | None
    waits_for: str
    waited: float

    def owes(self, step: int) -> int:
        """The queries that this process will pay for a step."""
        ...

    def begin(self) -> None:
        """Nothing was taken yet."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last step that was taken."""
        ...

    def load_state_dict(self, state: dict[str, Any], own: bool = True) -> None:
        """Go on from a place; own: this process's, and not the first one's of another number of processes."""
        ...

    def settle(self) -> None:
        """A checkpoint holds what was taken."""
        ...


class Free:
    """What costs nothing and has no place: what it gives is a function of the step."""

    ledger: Ledger | None = None
    waits_for, waited = "data", 0.0

    def owes(self, step: int) -> int:
        return 0

    def begin(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], own: bool = True) -> None:
        pass

    def settle(self) -> None:
        pass


class Images(Free):
    """Batches of a data set."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (m, ch, S, S) and labels (m,)."""
        with _waiting(self):
            return self._batches.take(step)

    def state_dict(self) -> dict[str, Any]:
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any], own: bool = True) -> None:
        self._batches.load_state_dict(state)  # a batch is the same in any number of processes


class Unasked(Free):
    """Images that draw(step) makes, about which the teacher is asked nothing."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def take(self, step: int) -> Asked:
        """The images alone."""
        images, n = self._draw(step)
        return Asked(images, None, n)


class Fresh:
    """Images that draw(step) makes, and the teacher's answers to them, paid for as the step comes.

    queries(step): how many of them are this process's. name: of the stage, for messages.
    """

    waits_for, waited = "teacher", 0.0

    def __init__(self, name: str, draw: Draw, queries: Callable[[int], int], oracle: Oracle) -> None:
        self.name, self.oracle = name, oracle
        self.ledger: Ledger | None = oracle.ledger
        self._draw, self._queries = draw, queries

    def take(self, step: int) -> Asked:
        """The images, uint8 if they are sent so, but for those that G learns from, and the answer to them."""
        images, sent, n = self._images(step)
        with _waiting(self):
            return Asked(images, self.oracle.query(sent), n)

    def owes(self, step: int) -> int:
        return self._queries(step)

    def begin(self) -> None:
        self.oracle.ledger.rewind(0)

    def state_dict(self) -> dict[str, Any]:
        self.oracle.ledger.flush()
        return {"images": self.oracle.ledger.next}

    def load_state_dict(self, state: dict[str, Any], own: bool = True) -> None:
        if own:
            self.oracle.ledger.rewind(state["images"])
        else:
            self.oracle.ledger.pass_over()  # other processes ask in other batches

    def settle(self) -> None:
        self.oracle.ledger.settle()

    def _images(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the step gets, what is sent, and the nuisance of both."""
        images, n = self._draw(step)
        if not bool(images.detach().isfinite().all()):  # before NaN becomes a black pixel, and is paid for
            raise Diverged(
                f"{self.name}: the generator draws NaN at step {step}, nothing was sent. It diverged: start anew with "
                "another --out and a smaller --deprivatize.lr"
            )
        sent = images
        if self.oracle.transport == "uint8":
            sent = to_uint8(images.detach())
        # The student sees what the teacher sees.
        return (images if images.requires_grad else self.oracle.shown(sent)), sent, n


class Ahead(Fresh):
    """The same, asked by a thread: while a step is taken, it asks for the next one, but never past a checkpoint."""

    def __init__(self, *arguments: Any, worker: Worker, every: int, steps: int, device: torch.device) -> None:
        super().__init__(*arguments)
        self._worker, self._every, self._steps = worker, every, steps
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the weights that it draws with
        self._asked: tuple[int, Future[Asked]] | None = None

    def take(self, step: int) -> Asked:
        if self._asked is None:
            self._begin(step)
        assert self._asked is not None
        with _waiting(self):
            asked = self._asked[1].result()
        self._asked = None
        if self._stream is not None:
            here = torch.cuda.current_stream(self._stream.device)
            here.wait_stream(self._stream)  # the thread is idle: all that the stream holds is this answer
            for tensor in (asked.images, asked.n, *(asked.answer.tensors() if asked.answer else ())):
                tensor.record_stream(here)
        following = step + 1
        if following < self._steps and following % self._every and self.oracle.ledger.affords(self._queries(following)):
            self._begin(following)
        return asked

    def owes(self, step: int) -> int:
        return 0 if self._asked is not None and self._asked[0] == step else self._queries(step)

    def state_dict(self) -> dict[str, Any]:
        ahead = self._answered()  # first: it waits, and the ledger goes on meanwhile
        self.oracle.ledger.flush()
        return {"images": self.oracle.ledger.next - ahead}

    def settle(self) -> None:
        if not self._answered():  # an answer ahead is found in the ledger again
            self.oracle.ledger.settle()

    def _begin(self, step: int) -> None:
        def ask() -> Asked:
            with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                images, sent, n = self._images(step)
                return Asked(images, self.oracle.query(sent), n)

        self._asked = step, self._worker.submit(ask)

    def _answered(self) -> int:
        """The images whose answers lie ready, once the thread is idle."""
        if self._asked is None or self._asked[1].exception() is not None:
            return 0
        return len(self._asked[1].result().images)


class Replayed(Free):
    """Rows of a store, drawn anew for each step, with kept pictures where they are given."""

    def __init__(self, run: Run, store: Replay | Joined, batch: int, pictures: Pictures | None) -> None:
        self._seed, self._device, self._batch = run.config.seed, run.device, batch
        self._store, self._pictures = store, pictures
        self._augment, self._data = run.config.distill.augment, run.config.data

    def take(self, step: int) -> Asked:
        """The images as they were sent, or moved where distill.augment says so, and the answer to them."""
        now, then = self._rows(step), self._rows(step + 1)
        with _waiting(self):
            images, answer, n = self._store.read(now)
            self._store.will_need(then)
            if self._augment:
                generator = generator_at(self._seed, "augment", step)
                size, flip, shift = images.shape[-1], self._data.flip, self._data.shift
                how = arrays.moves(self._batch, size, flip, generator, shift)
                images = arrays.moved(images, how[parallel.part(self._batch)])
            kept = None
            if self._pictures is not None:
                kept = self._pictures.read(now).to(self._device)
                self._pictures.will_need(then)
            return Asked(images.to(self._device), answer.to(self._device), n.to(self._device), kept)

    def _rows(self, step: int) -> Tensor:
        # Of the step alone, so that those of the next one are known.
        generator = generator_at(self._seed, "replayed", step)
        return torch.randint(len(self._store), (self._batch,), generator=generator)[parallel.part(self._batch)]


@contextlib.contextmanager
def _waiting(feed: Feed) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    feed.waited += time.perf_counter() - begun


@contextlib.contextmanager
def fresh(
    run: Run, stage: str, name: str, steps: int, draw: Draw, queries: Callable[[int], int], *,
    ahead: bool = False,
) -> Iterator[Fresh]:  # fmt: skip
    """A feed of fresh queries with the account NAME, one of a stage's; on CUDA asked ahead if it may be.

    Every process must come here: the budget is one for all. An ONNX Runtime session lives on the thread that asks.
    """
    account = open_account(run, stage, name)
    worker = Worker("oracle") if ahead and asks_ahead(run) else None
    oracle = None
    try:
        with parallel.first_alone():  # it measures the teacher's batch, and writes TensorRT's engine
            if worker is None:
                oracle = run.open_oracle(account)
                feed = Fresh(name, draw, queries, oracle)
            else:
                asked = worker.submit(lambda: _opened(run, account)).result()
                every, device = run.config.engine.checkpoint_every, run.device
                feed = Ahead(name, draw, queries, asked, worker=worker, every=every, steps=steps, device=device)
                del asked
        yield feed
    finally:
        if worker is not None:
            worker.close()
        (oracle or account).close()


def _opened(run: Run, account: Ledger) -> Oracle:
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)  # a thread begins on the first card
    return run.open_oracle(account)


def asks_ahead(run: Run) -> bool:
    """Whether the teacher works on another processor than the one that trains, so that asking ahead saves time."""
    return not run.config.teacher.remote and runs_on_cuda(provider_names(run.config.oracle.provider))
