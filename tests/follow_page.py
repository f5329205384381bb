"""A page's code blocks as one script: what a reader would save, run and type, in the order of the page."""

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e-?\d+)?")


def script(page: str) -> str:
    """Bash: a block with a title is written to that file, python and sh without one are run; text is what is said."""
    parts = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for kind, title, body in BLOCK.findall(page):
        if title or kind == "python":
            target = f"> {shlex.quote(title)}" if title else "| python -"
            parts.append(f"cat <<'END OF BLOCK' {target}\n{body}END OF BLOCK")
        elif kind == "sh":
            parts.append(body)
        else:
            assert kind == "text", f"```{kind} is neither a file (title=), python, sh nor text"
    return "\n".join(parts)


def without_numbers(text: str) -> str:
    return " ".join(NUMBER.sub("#", text).split())


def commands(folder: Path) -> dict[str, str]:
    """An environment in which python, mekd and torchrun are this interpreter's and this checkout's, from folder/bin."""
    programs = folder / "bin"
    programs.mkdir()
    for name, words in {"python": "", "mekd": "-m mekd", "torchrun": "-m torch.distributed.run"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder), "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def follow(path: Path, folder: Path) -> str:
    """Do in folder what the page at path says, with a free port in place of 8000; what it printed.

    Raises AssertionError if a command fails, or a line of a text block is not printed, whatever its numbers.
    """
    page = path.read_text("utf-8").replace("8000", free_port())
    (folder / "page.sh").write_text(script(page))
    (folder / "work").mkdir()
    done = subprocess.run(
        ["bash", str(folder / "page.sh")], cwd=folder / "work", env=commands(folder), text=True, timeout=1800,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    said = without_numbers(done.stdout)
    for kind, _, body in BLOCK.findall(page):
        for line in body.splitlines() if kind == "text" else ():
            assert without_numbers(line) in said, f"not printed: {line}\n{done.stdout}"
    return done.stdout
