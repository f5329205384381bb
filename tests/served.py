"""A server of `mekd serve` in a process of its own, and what it has counted."""

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

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
