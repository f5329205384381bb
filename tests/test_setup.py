"""setup.py: the C++ kernels are built with the headers of a torch, or the installation ends and says how."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from mekd import extension

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mekd_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# An isolated build sees its own packages alone: torch is found in those of the environment that is installed into.
ISOLATED = """
import sys, types
sys.modules["setuptools"] = types.ModuleType("setuptools")
import importlib.util
spec = importlib.util.spec_from_file_location("mekd_setup", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert importlib.util.find_spec("torch") is None
module.find_torch(sys.argv[2])
print(importlib.util.find_spec("torch") is not None)
"""


def test_an_isolated_build_finds_the_torch_that_is_installed() -> None:
    command = [sys.executable, "-S", "-c", ISOLATED, str(ROOT / "setup.py"), sysconfig.get_path("purelib")]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=kept)
    assert done.stdout.split() == ["True"], done.stderr


def test_without_torch_it_says_what_to_install_first(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"Install torch first.*--no-build-isolation.*MEKD_NO_EXT=1"):
        setup.find_torch(str(tmp_path))


def test_a_torch_without_the_stable_abi_is_refused(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.importlib.metadata, "version", lambda name: "2.9.1+cpu")
    with pytest.raises(
        SystemExit, match=r"torch is 2\.9\.1\+cpu, and its C\+\+ kernels take 2\.10 or newer.*MEKD_NO_EXT=1"
    ):
        setup.find_torch("")


def test_setup_and_the_package_agree_on_the_oldest_torch(setup: ModuleType) -> None:
    assert setup.OLDEST == extension.OLDEST and set(setup.FLAGS) == set(extension.CAPABILITIES)


def test_an_old_setuptools_is_named(setup: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"setuptools is 65\.5\.0 and must be 77 or newer: pip install -U setuptools"):
        setup.enough_setuptools("65.5.0")
    setup.enough_setuptools("77.0.3")


def test_kernels_that_do_not_compile_end_the_installation(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no C++20 here' >&2\nexit 1\n")
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path / "o", "--build-lib", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CXX": str(compiler), "CC": str(compiler), "MEKD_NO_EXT": "0"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "C++ kernels could not be built" in done.stderr and "MEKD_NO_EXT=1" in done.stderr
