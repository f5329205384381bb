"""Triton and MLServer as processes of .venv-servers, which nobody survives."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHON = HERE.parent / ".venv-servers" / "bin" / "python"
START_S = 180.0


@contextlib.contextmanager
def triton(folder: Path, models: list[dict[str, Any]]) -> Iterator[str]:
    """A Triton with the models, as bench/triton_server.py takes them: http://HOST:PORT/v2/models."""
    (port,), workspace = _ports(1), folder / "triton"
    settings = json.dumps({"port": port, "workspace": str(workspace), "models": models})
    with _serving([str(PYTHON), str(HERE / "triton_server.py"), settings], workspace, port, models) as url:
        yield url


@contextlib.contextmanager
def mlserver(folder: Path, models: list[dict[str, Any]]) -> Iterator[str]:
    """An MLServer with the models: http://HOST:PORT/v2/models."""
    ports, repository = _ports(3), folder / "mlserver"
    names = ("http_port", "grpc_port", "metrics_port")
    settings = {**dict(zip(names, ports, strict=True)), "host": "127.0.0.1", "parallel_workers": 0}
    for model in models:
        about = {"name": model["name"], "implementation": "mlserver_model.Onnx", "parameters": {"uri": model["file"]}}
        (repository / model["name"]).mkdir(parents=True)
        (repository / model["name"] / "model-settings.json").write_text(json.dumps(about))
    (repository / "settings.json").write_text(json.dumps(settings))
    command = [str(PYTHON.with_name("mlserver")), "start", str(repository)]
    with _serving(command, repository, ports[0], models) as url:
        yield url


@contextlib.contextmanager
def _serving(command: list[str], mark: Path, port: int, models: list[dict[str, Any]]) -> Iterator[str]:
    """A server that ends when its pipe is closed; what has the mark in its command line is killed afterwards.

    Raises RuntimeError with what it said if it does not start.
    """
    # Triton's Python backend needs the interpreter as a library, which is where only the interpreter knows.
    ask = "import sysconfig; print(sysconfig.get_config_var('LIBDIR') or '')"
    library = subprocess.run([str(PYTHON), "-c", ask], text=True, capture_output=True, check=True).stdout.strip()
    environment = os.environ | {
        "LD_LIBRARY_PATH": ":".join(filter(None, [library, os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": str(HERE),
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}/v2/models"
    # What it says goes to a file: a pipe that nobody empties would stop it.
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, text=True, env=environment)
        assert process.stdin is not None
        try:
            if not _starts(process, [f"{url}/{model['name']}/ready" for model in models]):
                said.seek(0)
                raise RuntimeError(f"{command[0]} does not serve (status {process.poll()}): {said.read()[-3000:]}")
            yield url
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
            _kill(str(mark))


def _starts(process: "subprocess.Popen[str]", urls: Sequence[str]) -> bool:
    """Whether all addresses answer before it ends or takes too long."""
    until = time.monotonic() + START_S
    for url in urls:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            if process.poll() is not None or time.monotonic() > until:
                return False
            time.sleep(0.2)
    return True


def _kill(mark: str) -> None:
    """Triton and its backends are in sessions of their own, and may outlive the process that started them."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in command.read_bytes():
                os.kill(int(command.parent.name), signal.SIGKILL)


def _ports(count: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listening.getsockname()[1] for listening in made]
