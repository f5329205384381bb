"""A teacher that is not a file: a query is cut into calls, several of them in flight, each attempt booked."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mekd.errors import MekdError, UsageError
from mekd.oracle.answers import Meaning, Raw, establish, respond
from mekd.oracle.base import Oracle
from mekd.oracle.http import Denied, Lost, Refused, ServiceError
from mekd.oracle.images import Encoding
from mekd.oracle.ledger import BudgetSpent
from mekd.oracle.oip import Oip
from mekd.oracle.response import AnswerError, Response

ATTEMPTS = 3  # of a call, of those whose fate is unknown
PAUSE_S, LONGEST_S = 0.2, 30.0
LOOK_S = 0.1  # between two looks whether somebody asks to stop
AHEAD_MS = 1000  # the clocks of two machines that share a rate may differ by so much
LONG_S = 60.0  # a call that waits so much longer than its rate asks is spoken of


class Service(Protocol):
    """A way to reach a teacher. One call holds some images, as they are sent."""

    def call(self, images: list[bytes] | Tensor) -> tuple[Raw, int]:
        """The answer and its bytes; raises Refused, Lost, Denied, ServiceError, AnswerError."""
        ...

    def close(self) -> None:
        """Nothing is asked afterwards."""
        ...


class Stopped(MekdError, RuntimeError):
    """Somebody asked the run to stop; what was in flight is answered and booked."""

    status = 130


class ServiceGone(ServiceError):
    """The service did not answer for too long, or too often left it unknown whether it did."""

    status = 3


#: Returns when so many images may be sent, or when what it is given says that somebody asks to stop.
Pace = Callable[[int, Callable[[], bool]], None]


class Rate:
    """Calls or images a second, over all processes and restarts that share a folder; log is told what is unusual."""

    def __init__(
        self, folder: Path, name: str, per_second: float, largest: int = 1,
        log: Callable[[str], object] = lambda line: None,
    ) -> None:  # fmt: skip
        limiter = pyrate_limiter()
        folder.mkdir(parents=True, exist_ok=True)
        # A window holds the largest call, and spreads the others over a fifth of a second.
        count = max(largest, round(per_second / 5), 1)
        window = limiter.Rate(count, max(1, round(1000 * count / per_second)))
        self._file, self._log = folder / f"{name}.sqlite", log
        self._said = f"oracle.{name.replace('-', '_')} is {per_second:g} a second"
        self._long = window.interval / 1000 + LONG_S
        self._bucket = limiter.SQLiteBucket.init_from_file([window], db_path=str(self._file), use_file_lock=True)
        self._limiter = limiter.Limiter(self._bucket, buffer_ms=5)
        self._turn = threading.Lock()  # the threads of a process would fight for the file

    def wait(self, weight: int = 1, stop: Callable[[], bool] = lambda: False) -> None:
        """Return when so much may be sent, or soon after stop() says so."""
        with self._turn:
            begun, told = time.monotonic(), False
            while not stop() and not self._limiter.try_acquire("calls", weight=weight, timeout=LOOK_S):
                self._forget_the_future()
                if not told and time.monotonic() - begun > self._long:
                    told = True
                    self._log(
                        f"{self._said}: a call has waited {time.monotonic() - begun:.0f} s for its turn, and waits on; "
                        f"other processes that share {self._file} may go first"
                    )

    def _forget_the_future(self) -> None:
        """Empty a bucket whose calls lie ahead of the clock, which was set back: else it stays full until then."""
        with self._bucket.lock:  # of the file: no other process's call of now is lost
            newest = self._bucket.peek(0)
            if newest is not None and newest.timestamp > self._bucket.now() + AHEAD_MS:
                self._bucket.flush()
                self._log(
                    f"{self._said}: the clock was set back, so the calls that {self._file} has of later are forgotten"
                )


def pyrate_limiter() -> Any:
    """The package that keeps rates, or UsageError saying what to install."""
    try:
        import filelock  # noqa: F401 - what it keeps its file with
        import pyrate_limiter
    except ImportError as error:
        raise UsageError(
            f"oracle.rate and oracle.image_rate need pyrate-limiter and filelock ({error}): pip install 'mekd[remote]'"
        ) from error
    return pyrate_limiter


class RemoteOracle(Oracle):
    """Ask a service: batch images a call, concurrency calls in flight, answers in the order of the images.

    size: side of the images that the service takes, encoding: how they go up. meaning: how answers are read, or None:
    then calls hold one image, one after another, until an answer tells it; established(meaning) is told what it was
    read as, before anything else is sent. stop(): whether to end before the next call. patience: seconds in which a
    call that is certainly refused is repeated. The rest as in Oracle.
    """

    def __init__(
        self,
        service: Service,
        image: tuple[int, int, int],
        num_classes: int,
        response: str,
        *,
        encoding: Encoding,
        batch: int = 1,
        concurrency: int = 1,
        rates: Sequence[Pace] = (),
        meaning: Meaning | None = None,
        established: Callable[[Meaning], None] = lambda meaning: None,
        reading: dict[str, Any] | None = None,
        stop: Callable[[], bool] = lambda: False,
        patience: float = 300.0,
        **options: Any,
    ) -> None:
        super().__init__(image, num_classes, response, **options)
        self._service, self._encoding = service, encoding
        self._batch, self._rates, self._meaning, self._established = batch, rates, meaning, established
        self._reading, self._stop, self._patience = reading or {}, stop, patience
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="call")
        self._failed = threading.Event()
        self._tell()

    def shown(self, images: Tensor) -> Tensor:
        """The images as the service gets to see them: decoded again where they go up as JPEG."""
        return self._encoding.shown(images)

    def close(self) -> None:
        self._threads.shutdown()
        self._service.close()
        super().close()

    def _send(self, images: Tensor) -> Response:
        raise NotImplementedError("a remote teacher is asked by calls")

    def _ask(self, images: Tensor, rows: slice) -> list[tuple[int, Response]]:
        images = images.cpu()
        first = rows.start
        answered: list[tuple[int, Response]] = []
        calls: dict[int, Future[Response]] = {}
        self._failed.clear()
        try:
            while self._meaning is None and first < rows.stop:  # one image tells what answers are, before more is paid
                answered.append((first, self._call(images, first, first + 1)))
                first += 1
            for start in range(rows.start, rows.stop, self._batch):
                begin, end = max(start, first), min(start + self._batch, rows.stop)
                if end > begin:
                    calls[begin] = self._threads.submit(self._call, images, begin, end)
            wait(calls.values())
            errors = [error for call in calls.values() if (error := call.exception()) is not None]
            if errors:
                raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
        except BaseException:  # Ctrl-C in one's own loop too: what has not begun is not sent
            self._failed.set()
            for call in calls.values():
                call.cancel()
            wait(calls.values())  # what is in flight is paid for, and is booked
            done = [(row, call) for row, call in calls.items() if not call.cancelled() and call.exception() is None]
            self.ledger.remember(images, answered + [(row, call.result()) for row, call in done])
            raise
        return answered + [(row, call.result()) for row, call in calls.items()]

    def _call(self, images: Tensor, start: int, end: int) -> Response:
        """The answer to rows start to end, by as many attempts as it may take."""
        try:
            return self._attempts(images[start:end], start)
        except BaseException:
            self._failed.set()
            raise

    def _attempts(self, images: Tensor, row: int) -> Response:
        payload = self._encoding.encode(images)
        up = sum(map(len, payload)) if isinstance(payload, list) else payload.nbytes
        lost, begun, pause = 0, time.monotonic(), PAUSE_S
        while True:
            for rate in self._rates:
                rate(len(images), self._ends)
            if self._ends():
                raise Stopped(
                    "stopped while the teacher was asked; what was answered is kept, the same command goes on"
                )
            try:
                sent = self.ledger.intend(images, row, up)
            except BudgetSpent as error:
                raise BudgetSpent(
                    f"{error}. What was answered is kept; to go on, run the same command with a larger "
                    f"{self.ledger.setting}"
                ) from None
            try:
                raw, down = self._service.call(payload)
            except (Denied, UsageError):  # the user's to mend, and nothing was paid
                self.ledger.refuse(sent)
                raise
            except Refused as error:
                self.ledger.refuse(sent)
                rest = max(pause * random.uniform(0.5, 1.5), error.after or 0.0)
                if time.monotonic() + rest - begun > self._patience:
                    raise ServiceGone(
                        f"{error}; so it went for {time.monotonic() - begun:.0f} s (oracle.patience), at no cost. The "
                        "same command goes on later"
                    ) from None
            except Lost as error:
                lost, rest = lost + 1, pause * random.uniform(0.5, 1.5)
                if lost == ATTEMPTS:
                    raise ServiceGone(
                        f"{error}. That was the attempt {lost} of one call whose fate is unknown; they are booked as "
                        "uncertain. Look what the service has; the same command goes on"
                    ) from None
            else:
                answer = self._read(raw, len(images))
                self.ledger.record(sent, images, answer, down)
                return answer
            self._rest(rest)
            pause = min(2 * pause, LONGEST_S)

    def _ends(self) -> bool:
        """Whether nothing more is to be sent: another call failed, or somebody asks to stop."""
        return self._failed.is_set() or self._stop()

    def _rest(self, seconds: float) -> None:
        """Wait, but no longer than another call goes well and nobody asks to stop."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._stop():
            if self._failed.wait(min(left, LOOK_S)):
                return

    def _tell(self) -> None:
        """Tell a service that may ask for more at first whether its answers can be read."""
        if isinstance(self._service, Oip):
            self._service.known = self._meaning is not None

    def _read(self, raw: Raw, count: int) -> Response:
        if len(raw) != count:
            raise AnswerError(f"the teacher answered {len(raw)} of {count} images")
        meaning = self._meaning or establish(
            raw, self.num_classes, self.response, decimals=self.decimals, **self._reading
        )
        answer = respond(raw, meaning, self.num_classes, self.response, self.k, self.decimals)
        if self._meaning is None and (raw.pairs is None or any(raw.pairs)):  # an empty answer tells no scale
            self._meaning = meaning
            self._tell()
            self._established(meaning)
        return answer
