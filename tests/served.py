"""A server of `mekd serve`, in a process of its own or in a thread, and what it has counted."""

import contextlib
import http.client
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit


@dataclass
class Answer:
    """What a server sent."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


START_S = 120.0  # torch alone takes many seconds to import on a busy machine


@dataclass
class Served:
    """A running server: url is http://HOST:PORT, name the model's, line what it printed at its start."""

    process: "subprocess.Popen[str]"
    line: str
    url: str
    name: str

    def metrics(self) -> dict[str, float]:
        """Its counts, by their name as it stands in the text: mekd_requests_total{status="200"} among them."""
        return metrics(self.url)

    def kill(self) -> None:
        """End it as a crash would; whoever is connected finds the connection broken."""
        self.process.kill()
        self.process.wait()


def metrics(url: str) -> dict[str, float]:
    """The counts of the server at http://HOST:PORT."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@contextlib.contextmanager
def serving(path: Path | str, *options: object, port: int = 0) -> Iterator[Served]:
    """`mekd serve path --port 0 options`, ended behind the with; port: a given one, to come back after a crash.

    Raises RuntimeError with what it said if it does not start.
    """
    command = [sys.executable, "-m", "mekd", "serve", str(path), "--port", str(port), *map(str, options)]
    # Its messages go to a file: a pipe that nobody empties would stop it.
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)
        assert process.stdout is not None
        try:
            line = _line(process, process.stdout)
            if not line:
                process.kill()
                process.wait()
                said.seek(0)
                raise RuntimeError(f"{' '.join(command)} did not start (status {process.returncode}): {said.read()}")
            address = urlsplit(line.split(" as ")[-1].split()[0])
            name = unquote(address.path.rpartition("/")[2])
            yield Served(process, line, f"http://{address.netloc}", name)
        finally:
            _end(process)
            process.stdout.close()


@contextlib.contextmanager
def inside(path: Path | str, *options: object) -> Iterator[str]:
    """The same server in a thread of this process, which starts at once: its url."""
    from mekd.serve import prepare

    server, listening, line = prepare([str(path), "--port", "0", *map(str, options)])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield line.split(" as ")[-1].split("/v2/")[0]
    finally:
        server.should_exit = True
        thread.join()


def call(url: str, body: bytes | None = None, **headers: str) -> Answer:
    """GET an address, or POST a body to it; an _ in a header's name is a -."""
    address = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(address.netloc, timeout=30)) as connection:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", address.path, body, sent)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def _line(process: "subprocess.Popen[str]", output: IO[str]) -> str:
    """The first line that it prints; empty if it ends or takes too long."""
    until = time.monotonic() + START_S
    while not select.select([output], [], [], 0.2)[0]:
        if process.poll() is not None or time.monotonic() > until:
            return ""
    return output.readline().strip()


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
