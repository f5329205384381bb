"""Which torch mekd runs on: an environment for each, mekd built there, a row in docs/matrix.md.

Takes some minutes and 6 GB for each torch, which are freed again. A torch that has a row is passed over unless named.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "matrix.md"
TORCHES = ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1")
LIMIT_S = 1200
PYTEST = "-m pytest -q -p no:cacheprovider"
#: All stages on the smallest data that there is, the teacher's training and export among them.
RUN = (
    "-m mekd run --data.name digits --data.size 16 --teacher.arch resnet8 --teacher.steps 20 --deprivatize.steps 6 "
    "--deprivatize.batch 8 --deprivatize.width 0.1 --distill.student resnet8 --distill.steps 6 --distill.batch 8 "
    "--distill.holdout 20 --distill.coverage 0 --evaluate.enabled true --evaluate.baseline_steps 4 "
    "--engine.device cpu --out"
)
#: A column, its environment and what python is told: {out} is a folder of its own, + a space within a word.
PARTS = (
    (
        "C++ kernels", {},
        f"{PYTEST} tests/test_ops_values.py tests/test_ops_torch.py tests/test_ops_autograd.py "
        "-k cpp+or+opcheck+or+compiled",
    ),
    ("Triton, interpreted", {"TRITON_INTERPRET": "1"}, f"{PYTEST} tests/test_ops_values.py -k triton+and+reductions"),
    ("Triton, compiled for sm_90", {}, f"{PYTEST} tests/test_kernels_aot.py -k sm_90"),
    ("self-test", {}, "-m mekd selftest --device cpu --only gan_discriminator"),
    ("self-test, interpreted", {}, "-m mekd selftest --device cpu --impl triton --only tempered_kl_topk"),
    ("bench losses", {}, "-m bench losses --quick --repeats 2 --only dkd gan_generator --out {out}"),
    ("bench steps", {}, "-m bench steps --quick --repeats 2"),
    ("run", {}, RUN + " {out}"),
    ("run, two processes", {}, f"-m torch.distributed.run --standalone --nproc-per-node 2 {RUN} {{out}}"),
)  # fmt: skip
VERSIONS = (
    "import importlib.util, platform, numpy; from importlib.metadata import version; "
    "print(platform.python_version(), version('triton') if importlib.util.find_spec('triton') else 'none', "
    "numpy.__version__)"
)
TITLES = ("torch", "Python, triton, numpy", "build", *(title for title, _, _ in PARTS))


def copy_files(to: Path) -> list[str]:
    """Copy what git knows or would take of this tree into a folder without git; returns the files' names."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines()
    names = [name for name in listed if (ROOT / name).is_file()]
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    return names


def said(output: str) -> str:
    """What a part that ended well says of itself: its count of tests or parts, or else that it ran."""
    counts = re.findall(r"\d+ passed|\d+ of \d+ parts passed", output)
    return counts[-1] if counts else "runs"


def why(output: str) -> str:
    """The first line that names an error, or the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(E  +)?\S*(Error|Exception)\b", line)]
    error = [*errors, *lines[-1:], "nothing was printed"][0]
    counts = re.findall(r"\d+ failed(?:, \d+ passed)?", output)
    return f"FAILED: {counts[-1] + ', ' if counts else ''}{error[:160]}".replace("|", "/")


def row(torch: str, python: str) -> dict[str, str]:
    """The cells of one torch by their titles; every part is run, whatever became of those before."""
    cells = dict.fromkeys(TITLES, "not run")
    cells["torch"] = torch
    with tempfile.TemporaryDirectory(prefix="mekd-matrix-") as folder:
        tree, log = Path(folder, "tree"), []
        copy_files(tree)
        own = str(Path(folder, "env", "bin", "python"))

        def do(*command: str, **environment: str) -> tuple[bool, str]:
            begun = time.perf_counter()
            try:
                done = subprocess.run(
                    command, cwd=tree, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S,
                )  # fmt: skip
                well, output = done.returncode == 0, done.stdout
            except subprocess.TimeoutExpired:
                well, output = False, f"nothing more after {LIMIT_S} s"
            log.append(f"$ {' '.join(command)}\n{output}\n")
            print(f"torch {torch}, {time.perf_counter() - begun:.0f} s, {'well' if well else 'FAILED'}: "
                  f"{' '.join(command[1:])[:100]}", flush=True)  # fmt: skip
            return well, output

        pip = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for command in (
            [python, "-m", "venv", str(Path(folder, "env"))],
            [*pip, f"torch=={torch}", "setuptools>=77", "wheel"],
            [*pip, "--no-build-isolation", "-e", ".[run,onnx,plot]", "scikit-learn", "pytest", "hypothesis"],
        ):
            well, output = do(*command)
            if not well:
                cells["build"] = why(output)
                break
        else:
            cells["build"] = "builds"
            cells["Python, triton, numpy"] = ", ".join(do(own, "-c", VERSIONS)[1].split())
            for title, environment, words in PARTS:
                out = str(Path(folder, re.sub(r"\W", "", title)))
                command = [word.replace("+", " ").format(out=out) for word in words.split()]
                well, output = do(own, *command, **environment)
                cells[title] = said(output) if well else why(output)
        logs = ROOT / "results" / "matrix"
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{torch}.log").write_text("".join(log))
    return cells


def put(cells: dict[str, str], page: str) -> str:
    """The page with this row in the place of the one of the same torch, in order."""
    line = f"| {' | '.join(cells[title] for title in TITLES)} |"
    lines = page.splitlines()
    rule = next(i for i, text in enumerate(lines) if re.fullmatch(r"\|(---\|)+", text))
    end = next((i for i in range(rule + 1, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = [*(text for text in lines[rule + 1 : end] if version(text) != version(line)), line]
    head = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    return "\n".join([*lines[: rule - 1], *head, *sorted(rows, key=version), *lines[end:]]) + "\n"


def version(line: str) -> tuple[int, ...]:
    """The torch of a row, in order."""
    return tuple(map(int, line.split("|")[1].split(".")))


def main(arguments: Sequence[str]) -> int:
    """Fill the table; 1 if a part of a torch that was tried failed."""
    parser = argparse.ArgumentParser(prog="python -m bench matrix", description=__doc__)
    parser.add_argument("torches", nargs="*", metavar="TORCH", help=f"releases, {' '.join(TORCHES)} unless named")
    parser.add_argument("--python", default=sys.executable, help="makes the environments")
    options = parser.parse_args(arguments)
    failed = False
    for torch in options.torches or TORCHES:
        if not options.torches and re.search(rf"^\| {re.escape(torch)} \|", PAGE.read_text(), re.MULTILINE):
            print(f"torch {torch} has a row; name it to run it again")
            continue
        cells = row(torch, options.python)
        failed |= any(cell.startswith(("FAILED", "not run")) for cell in cells.values())
        PAGE.write_text(put(cells, PAGE.read_text()))
    print(PAGE.read_text())
    return int(failed)
