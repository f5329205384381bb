"""Triton and MLServer as processes of .venv-servers, which nobody survives."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
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
    with _process([str(PYTHON), str(HERE / "triton_server.py"), settings], str(workspace)) as process:
        assert process.stdout is not None
        until, line = time.monotonic() + START_S, "-"
        while line and line != "ready\n":
            if not select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise RuntimeError(f"Triton did not start in {START_S:g} s")
            line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"Triton ended with status {process.wait()}")
        yield f"http://127.0.0.1:{port}/v2/models"


@contextlib.contextmanager
def mlserver(folder: Path, models: list[dict[str, Any]]) -> Iterator[str]:
    """An MLServer with the models: http://HOST:PORT/v2/models."""
    ports, repository = _ports(3), folder / "mlserver"
    http = f"http://127.0.0.1:{ports[0]}/v2"
    names = ("http_port", "grpc_port", "metrics_port")
    settings = {**dict(zip(names, ports, strict=True)), "host": "127.0.0.1", "parallel_workers": 0}
    for model in models:
        of_model = {
            "name": model["name"],
            "implementation": "mlserver_model.Onnx",
            "parameters": {"uri": model["file"]},
        }
        (repository / model["name"]).mkdir(parents=True)
        (repository / model["name"] / "model-settings.json").write_text(json.dumps(of_model))
    (repository / "settings.json").write_text(json.dumps(settings))
    with _process([str(PYTHON.with_name("mlserver")), "start", str(repository)], str(repository)) as process:
        until = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{http}/health/ready", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"MLServer did not start (status {process.poll()})")
            time.sleep(0.2)
        yield f"{http}/models"


@contextlib.contextmanager
def _process(command: list[str], mark: str) -> Iterator["subprocess.Popen[str]"]:
    """A server, which ends when its pipe is closed; whatever has the mark in its command is killed afterwards."""
    # Triton's Python backend needs the interpreter as a library, which is where only the interpreter knows.
    ask = "import sysconfig; print(sysconfig.get_config_var('LIBDIR') or '')"
    library = subprocess.run([str(PYTHON), "-c", ask], text=True, capture_output=True, check=True).stdout.strip()
    environment = os.environ | {
        "LD_LIBRARY_PATH": ":".join(filter(None, [library, os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
        )
        assert process.stdin is not None
        try:
            yield process
        except RuntimeError as error:
            said.seek(0)
            raise RuntimeError(f"{error}: {said.read()[-3000:]}") from None
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            _kill(process, mark)


def _kill(process: "subprocess.Popen[str]", mark: str) -> None:
    """Triton and its backends are in sessions of their own, and may outlive the process that started them."""
    process.kill()
    process.wait()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in command.read_bytes():
                os.kill(int(command.parent.name), signal.SIGKILL)


def _ports(count: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listening.getsockname()[1] for listening in made]
