"""What is shipped: the sdist, and the wheel that is built from it, audited; their sizes, and the Linux they need.

The wheel is built by g++ of this machine with csrc/manylinux.h before the kernels; auditwheel gives it its tag. Every
audit is a line; the first word of what failed is FAILED, and the exit status is then 1.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from bench.matrix import ROOT, copy_files

PLATFORM = f"manylinux_2_28_{platform.machine()}"
#: Of torch, which is always there before the kernels are loaded.
THEIRS = ("libtorch*.so", "libc10*.so")


def build(out: Path) -> tuple[Path, Path]:
    """The sdist and the wheel of it, as PLATFORM where auditwheel can say so; SystemExit with what was printed."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tree, raw = Path(folder) / "tree", Path(folder) / "raw"
        copy_files(tree)
        first = f"-include {tree / 'csrc' / 'manylinux.h'}"
        words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(raw), str(tree)]
        _must(words, CFLAGS=f"{os.environ.get('CFLAGS', '')} {first}".strip())
        (sdist,), (wheel,) = raw.glob("*.tar.gz"), raw.glob("*.whl")
        excluded = [word for name in THEIRS for word in ("--exclude", name)]
        _must(["auditwheel", "repair", "--plat", PLATFORM, *excluded, "-w", str(raw / "tagged"), str(wheel)])
        (tagged,) = (raw / "tagged").glob("*.whl")
        return sdist.rename(out / sdist.name), tagged.rename(out / tagged.name)


def audits(sdist: Path, wheel: Path, unpacked: Path) -> dict[str, list[str]]:
    """What is asked of the two, by what it says of them."""
    zipfile.ZipFile(wheel).extractall(unpacked)
    return {
        "of Python no more than its stable ABI": ["abi3audit", "--strict", "--summary", str(wheel)],
        "of torch no more than its stable ABI": ["torch-abi-audit", "--check", "torch", str(unpacked / "mekd")],
        "the page of the project is well formed": ["twine", "check", "--strict", str(sdist), str(wheel)],
        "the workflows ask for no more than they need": ["zizmor", "--offline", "--quiet", str(ROOT / ".github")],
        "pyproject.toml is valid": ["validate-pyproject", str(ROOT / "pyproject.toml")],
        "the sdist has every file that git has": ["check-manifest", "--no-build-isolation", str(ROOT)],
    }


def _run(words: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # whose kernels/ is no package
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        return subprocess.run(
            words, cwd=ROOT, env={**kept, "PATH": path, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except FileNotFoundError:
        raise SystemExit(f"{words[0]} is not installed: pip install 'mekd[dist]'") from None


def _must(words: Sequence[str], **environment: str) -> None:
    done = _run(words, **environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {done.returncode}:\n{done.stdout[-6000:]}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench wheels", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the sdist and the wheel are put")
    options = parser.parse_args(arguments)
    sdist, wheel = build(options.out)
    for path in (sdist, wheel):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path.name}")
    failed = 0
    with tempfile.TemporaryDirectory() as unpacked:
        for what, words in audits(sdist, wheel, Path(unpacked)).items():
            done = _run(words)
            failed += done.returncode != 0
            print(f"{'FAILED' if done.returncode else 'passed'}  {words[0]}: {what}")
            if done.returncode:
                print(done.stdout[-4000:])
    return int(failed > 0)
