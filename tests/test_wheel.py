"""What is tested is what is installed: the sdist, the wheel that is built from it, and a run of it somewhere else.

The folder that is built has no git and nothing that an earlier build left; the environment shares torch and the rest
with this one, but not this checkout.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from bench.matrix import copy_files
from mekd import extension

pytestmark = pytest.mark.slow
#: All stages for a few steps on the digits; the teacher is trained and exported first.
RUN = {
    "data.name": "digits", "data.size": 16, "teacher.arch": "resnet8", "teacher.steps": 10, "deprivatize.steps": 4,
    "deprivatize.batch": 8, "deprivatize.width": 0.1, "distill.student": "resnet8", "distill.steps": 4,
    "distill.batch": 8, "distill.holdout": 20, "distill.coverage": 0, "evaluate.enabled": "false",
    "engine.device": "cpu",
}  # fmt: skip
IMPORTS = """
import importlib, pkgutil
import mekd, mekd.kernels
from mekd import extension, ops
found = [m.name for m in pkgutil.walk_packages(mekd.__path__, "mekd.") if "._cpu_" not in m.name]  # no Python in them
for name in found:
    importlib.import_module(name)
print("here:", mekd.__file__, mekd.kernels.__file__, extension.LOADED, extension.WHY_NOT, *found, sep="\\n")
"""


class Installed(NamedTuple):
    files: list[str]  # of the checkout
    sdist: Path
    wheel: Path
    bin: Path  # of the environment that the wheel was installed into


def do(*command: object, where: Path, **environment: str) -> str:
    """What a command prints; all of it in the report where it fails."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MEKD_NO_EXT")}
    done = subprocess.run(
        list(map(str, command)), cwd=where, env={**kept, "OMP_NUM_THREADS": "1", **environment}, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    files = copy_files(folder / "tree")
    make_sdist = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    do(sys.executable, "-c", make_sdist, where=folder / "tree")
    (sdist,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    do(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, sdist, where=folder)
    (wheel,) = folder.glob("*.whl")
    do(sys.executable, "-m", "venv", "--without-pip", folder / "env", where=folder)
    python = folder / "env" / "bin" / "python"
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "shared.pth").write_text("\n".join(shared) + "\n")  # without the .pth files that lie there
    install = ("install", "--ignore-installed", "--no-deps", "--no-index", wheel)
    do(*pip, "--python", python, *install, where=folder)
    return Installed(files, sdist, wheel, python.parent)


def package(files: list[str]) -> set[str]:
    """The files of the package by the names that they are installed under."""
    found = {name if name.startswith("mekd/") else f"mekd/{name}" for name in files
             if name.startswith(("mekd/", "kernels/", "configs/"))}  # fmt: skip
    assert {"mekd/oracle/base.py", "mekd/kernels/tuning.json", "mekd/configs/digits.yaml"} <= found
    return found


def test_both_hold_every_file_of_the_package(installed: Installed) -> None:
    with tarfile.open(installed.sdist) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    wanted = {name for name in installed.files if name.startswith(("mekd/", "kernels/", "configs/", "csrc/"))}
    assert (wanted | {"LICENSE", "README.md"}) - packed == set()
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = set(wheel.namelist())
    assert package(installed.files) - names == set()
    beside = {name for name in names if ".dist-info/" not in name and not name.startswith("mekd/")}
    assert not beside  # such as tests/, which would be everybody's


def test_every_module_is_imported_and_the_kernels_load(installed: Installed, tmp_path: Path) -> None:
    out = do(installed.bin / "python", "-c", IMPORTS, where=tmp_path)
    where, kernels, loaded, why_not, *found = out.partition("here:\n")[2].splitlines()
    here = str(installed.bin.parent)
    assert where.startswith(here) and kernels.startswith(here), (where, kernels)
    assert loaded in extension.CAPABILITIES, why_not
    paths = {f"{name.replace('.', '/')}.py" for name in found} | {
        f"{name.replace('.', '/')}/__init__.py" for name in found
    }
    modules = {name for name in package(installed.files) if name.endswith(".py") and not name.endswith("__main__.py")}
    assert modules - paths == {"mekd/__init__.py"}  # which was imported before


#: A user's own script: its first line is right, and its last is what a checker should find.
TYPED = """
import torch
from mekd.functional import kd_loss
loss: torch.Tensor = kd_loss(torch.randn(2, 3), labels=torch.tensor([0, 1]), tau=2.0)
reveal_type(loss)
kd_loss(torch.randn(2, 3), labels=torch.tensor([0, 1]), tau="hot")
"""


def test_its_types_are_seen_by_those_who_use_it(installed: Installed, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed: pip install mypy")
    (tmp_path / "own.py").write_text(TYPED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed.bin / "python", "own.py"],
        cwd=tmp_path, text=True, capture_output=True, timeout=900,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if "own.py" in line and "note" not in line]
    assert len(found) == 1 and 'Argument "tau"' in found[0], done.stdout + done.stderr


def test_it_runs(installed: Installed, tmp_path: Path) -> None:
    words = [word for key, value in RUN.items() for word in (f"--{key}", str(value))]
    out = do(installed.bin / "mekd", "run", "--config", "digits", *words, "--out", tmp_path / "run", where=tmp_path)
    assert "student = teacher on" in out
    assert {"teacher.onnx", "student.onnx", "report.md", "report.html"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
