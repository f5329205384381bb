"""What goes wrong with a server, on purpose: delays, failures and broken connections, the same ones for a seed."""

import asyncio
import random
import time
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


@dataclass(frozen=True)
class Faults:
    """How often requests go wrong, and how slow they are.

    refuse_rate: shares of requests refused before anything is computed; fail_rate: computed, then answered by a 500;
    cut_rate: computed, then cut off in the middle of the answer. latency, drip: seconds a request, and a byte.
    """

    refuse_rate: float = 0.0
    fail_rate: float = 0.0
    cut_rate: float = 0.0
    latency: float = 0.0
    drip: float = 0.0
    seed: int = 0

    def drawn(self, number: int) -> str | None:
        """The fate of the request with that number: "refuse", "fail", "cut" or None."""
        left = random.Random(f"{self.seed} {number}").random()
        for fate, rate in (("refuse", self.refuse_rate), ("fail", self.fail_rate), ("cut", self.cut_rate)):
            if left < rate:
                return fate
            left -= rate
        return None


class Broken(Response):
    """A response that drips, a byte every so many seconds, or is cut off in the middle of its body."""

    def __init__(self, response: Response, cut: bool, drip: float) -> None:
        super().__init__(response.body, response.status_code)
        self.raw_headers = response.raw_headers  # they promise the whole body
        self.left = self.body[: len(self.body) // 2] if cut else self.body
        self.cut, self.drip = cut, drip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Request(scope, receive)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        step = 1 if self.drip else max(1, len(self.left))
        for start in range(0, len(self.left), step):
            await send({"type": "http.response.body", "body": self.left[start : start + step], "more_body": True})
            if self.drip:
                await asyncio.sleep(self.drip)
                if await client.is_disconnected():
                    return
        if not self.cut:  # a server closes the connection of a response that does not end
            await send({"type": "http.response.body", "body": b""})


class Bucket:
    """Lets rate requests a second through, and as many at once after a pause."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.tokens = self.size = max(1.0, rate)
        self.filled = time.monotonic()

    def wait(self) -> float:
        """0 and a token taken, or the seconds until there is one."""
        now = time.monotonic()
        self.tokens = min(self.size, self.tokens + (now - self.filled) * self.rate)
        self.filled = now
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0.0
