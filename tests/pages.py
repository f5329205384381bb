"""A page's code blocks as one script: what a reader would save, run and type, in the order of the page."""

import os
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


def follow(path: Path, folder: Path, **replaced: str) -> str:
    """Do in folder what the page at path says, on a free port; what it printed.

    Raises AssertionError if a command fails, or a line of a text block is not printed, whatever its numbers.
    """
    page = path.read_text("utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for old, new in {"8000": port, **replaced}.items():
        assert old not in replaced or old in page, f"{path.name} does not say {old}"
        page = page.replace(old, new)
    commands = folder / "bin"
    commands.mkdir()
    for name, words in {"python": "", "mekd": "-m mekd", "torchrun": "-m torch.distributed.run"}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (commands / name).chmod(0o755)
    work = folder / "work"
    work.mkdir()
    environment = {
        "PATH": f"{commands}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder),
        "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    (folder / "page.sh").write_text(script(page))
    # Of its own file: whoever is at no terminal must not read what is left of the script.
    typed = ["bash", str(folder / "page.sh")]
    with open(os.devnull) as nothing:
        done = subprocess.run(
            typed, cwd=work, env=environment, text=True, stdin=nothing, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900
        )
    assert done.returncode == 0, done.stdout
    said = without_numbers(done.stdout)
    for kind, _, body in BLOCK.findall(page):
        for line in body.splitlines() if kind == "text" else ():
            assert without_numbers(line) in said, f"not printed: {line}\n{done.stdout}"
    return done.stdout
