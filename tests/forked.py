"""Runs of the command line in processes of their own that import nothing: they are forked from one that has it all.

A process that is started anew imports torch, ONNX Runtime and the exporter for longer than a small run takes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SERVER = """
import json, os, sys, tempfile
import torch
from pathlib import Path
torch.set_num_threads(1)  # a process with threads cannot be forked
import matplotlib.pyplot, onnxruntime, onnxscript, sklearn.datasets, yaml
import mekd.cli, mekd.engine.preflight, mekd.engine.stages, mekd.engine.checkpoint
from mekd.nets import build
from mekd.oracle.export import Classifier, export
export(Classifier(build("resnet8", 10, 1)), Path(tempfile.mkdtemp()) / "warm.onnx", (1, 16, 16))
print("ready", flush=True)
children = {}
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        _, status = os.waitpid(job["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    status = 70
    torch.set_num_threads(1)  # renews torch's pool after the fork; two threads that did so at once would fail
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.environ.update(job["env"])
        sys.argv = ["driver", *job["words"]]
        exec(compile(job["code"], "driver", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
        status = 1
    finally:
        import concurrent.futures.thread
        concurrent.futures.thread._python_exit()  # what an interpreter does that ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""

MAIN = "import sys\nfrom mekd.cli import main\nraise SystemExit(main(sys.argv[1:]))\n"

# Finds the function MODULE:NAME, and counts its calls down.
FIND = """
import importlib, os, signal, sys
target, count, *words = sys.argv[1:]
module, _, path = target.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
original, left = getattr(owner, name), [int(count)]
"""

# Runs the command line, and kills itself at the nth call of a function: before it, or once it has returned.
KILL = (
    FIND
    + """
when, *words = words
def patched(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, patched)
from mekd.cli import main
raise SystemExit(main(words))
"""
)


class Done(NamedTuple):
    """How a process ended: its status, negative for a signal, and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A process that was begun."""

    def __init__(self, server: "Server", pid: int, folder: Path) -> None:
        self._server, self.pid, self._folder = server, pid, folder

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether wait() returns at once."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def wait(self) -> Done:
        status = int(self._server.say({"wait": self.pid}))
        said = [(self._folder / name).read_text("utf-8", "replace") for name in ("stdout", "stderr")]
        return Done(status, *said)


class Server:
    """The process that all others are forked from."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def say(self, job: dict[str, Any]) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server is gone"
        return answer

    def begin(self, *words: str, code: str = MAIN, **env: str) -> Running:
        """Begin code with words as its arguments: the command line, unless another is given."""
        folder = self._folder / str(self._count)
        folder.mkdir()
        self._count += 1
        job = {"words": list(words), "code": code, "env": env, **{n: str(folder / n) for n in ("stdout", "stderr")}}
        return Running(self, int(self.say(job)), folder)

    def run(self, *words: str, code: str = MAIN, **env: str) -> Done:
        """The same, waited for."""
        return self.begin(*words, code=code, **env).wait()

    def killed(self, target: str, count: int, when: str, *words: str) -> Done:
        """The command line, killed at the nth call of a function, "before" or "after" it."""
        return self.run(target, str(count), when, *words, code=KILL)

    def together(self, count: int, *words: str, code: str = MAIN) -> list[Done]:
        """The command line in several processes that are one run, as torchrun would begin them once."""
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "GROUP_WORLD_SIZE": "1"}
        begun = [self.begin(*words, code=code, RANK=str(i), LOCAL_RANK=str(i), **env) for i in range(count)]
        return [running.wait() for running in begun]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def processes() -> Iterator[Server]:
    """Where a test gets its processes from."""
    server = Server()
    yield server
    server.close()


def is_killed(done: Done) -> bool:
    return done.returncode == -signal.SIGKILL
