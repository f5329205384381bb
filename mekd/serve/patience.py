"""Requests that come too slowly: whoever sends a byte a second would hold a connection for ever."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def patient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which ends a connection where the head of a request is not there in so many seconds.

    h11 by its name, since uvicorn takes httptools where that is installed, which takes a head of any size.
    """

    class Patient(H11Protocol):
        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.late = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])  # a head, and not whole yet
            if begun and self.late is None:
                self.late = self.loop.call_later(seconds, self.transport.close)
            elif not begun:
                self._in_time()

        def connection_lost(self, exc: Exception | None) -> None:
            self._in_time()
            super().connection_lost(exc)

        def _in_time(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

    return Patient
