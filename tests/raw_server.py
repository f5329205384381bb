"""A server on a bare socket that says exactly what a test wrote down, and what it was asked."""

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

#: What is done with a connection once a request has been read: bytes are sent; None closes it.
Script = bytes | None | Callable[[socket.socket], bytes | None]


def reply(status: int, body: bytes | str = b"", length: bool = True, **headers: object) -> bytes:
    """An answer as it goes over the line; an _ in a header's name is a -. length: with a Content-Length."""
    content = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} So", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    lines += [f"Content-Length: {len(content)}"] if length else []
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def chunked(body: bytes) -> bytes:
    """The body in chunks of 7 bytes."""
    parts = [body[at : at + 7] for at in range(0, len(body), 7)]
    content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
    return reply(200, content, length=False, Transfer_Encoding="chunked")


def dripping(content: bytes, pause: float = 0.05) -> Callable[[socket.socket], None]:
    """Send it byte by byte, each well within a time-out, and then close."""

    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for at in range(len(content)):
                connection.sendall(content[at : at + 1])
                time.sleep(pause)

    return drip


def silent(connection: socket.socket) -> None:
    """Wait until the client goes."""
    with contextlib.suppress(OSError):
        connection.settimeout(20)
        connection.recv(1)


class Raw:
    """One server: url is http://HOST:PORT; requests: (line, headers, body) as they came; connections: how many."""

    def __init__(self, script: list[Script], context: ssl.SSLContext | None = None) -> None:
        self.script, self.requests, self.connections = list(script), [], 0  # type: ignore[var-annotated]
        self._context = context
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as file:
                while self._one(connection, file):
                    pass

    def _one(self, connection: socket.socket, file: Any) -> bool:
        line = file.readline().decode().strip()
        if not line:
            return False
        headers = {}
        while field := file.readline().decode().strip():
            name, _, value = field.partition(":")
            headers[name.lower()] = value.strip()
        self.requests.append((line, headers, file.read(int(headers.get("content-length", 0)))))
        said = self.script.pop(0) if self.script else None
        if callable(said):
            said = said(connection)
        if said is None:
            return False
        connection.sendall(said)
        return True


@contextlib.contextmanager
def scripted(*script: Script, context: ssl.SSLContext | None = None) -> Iterator[Raw]:
    """A server for the time of a test, which answers the nth request with the nth of the script."""
    server = Raw(list(script), context)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def shaking(hello: Callable[[socket.socket], None]) -> Iterator[str]:
    """The https address of a server that does nothing but hello(connection), for every connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        hello(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield f"https://127.0.0.1:{listening.getsockname()[1]}"


def pairs(**shares: float) -> bytes:
    """An answer as Hugging Face's."""
    return json.dumps([{"label": name, "score": share} for name, share in shares.items()]).encode()


def tensor(values: Any, shape: list[int], datatype: str = "FP32", name: str = "probs") -> bytes:
    """An answer of the Open Inference Protocol, as JSON."""
    return json.dumps(
        {"model_name": "m", "outputs": [{"name": name, "shape": shape, "datatype": datatype, "data": values}]}
    ).encode()
