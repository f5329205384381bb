"""What pyproject.toml cannot say: the folder kernels/ is installed as mekd.kernels, and csrc/ is compiled.

The kernels are built twice from the same source, with AVX2 and for any processor, as two libraries, so that no inline
function of one is linked into the other; mekd.extension picks one when it is imported. They use no Python at all, and
so serve every Python, but only the torch that they were built with: its version is in their name, and the package
requires it. What cannot be built ends the installation; MEKD_NO_EXT=1 in the environment goes without the kernels, and
mekd then runs on plain PyTorch.
"""

import importlib.metadata
import importlib.util
import os
import site
import sys
import sysconfig
from pathlib import Path

import setuptools

#: What a build may use, by the name that torch gives the capability, as far as csrc/ compiles for it.
FLAGS = {"AVX2": ["-mavx2", "-mfma", "-mf16c"], "DEFAULT": []}
WITHOUT = "MEKD_NO_EXT=1 in the environment installs mekd without its C++ kernels, on plain PyTorch"


def enough_setuptools(version: str) -> None:
    """SystemExit where setuptools does not know the licence field of pyproject.toml, which it would say in 60 lines."""
    if int(version.split(".")[0]) < 77:
        raise SystemExit(f"mekd: setuptools is {version} and must be 77 or newer: pip install -U setuptools wheel")


def find_torch(outside: str) -> str:
    """Make the torch that mekd will run with importable and return its release; SystemExit where there is none.

    outside: the site-packages of the environment that pip installs into. An isolated build does not see them.
    """
    if importlib.util.find_spec("torch") is None:
        site.addsitedir(outside)
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "mekd: its C++ kernels are compiled for the torch that is installed, and there is none here. Install torch "
            "first: pip install torch, then pip install . again; where the build has an environment of its own (uv, "
            f"python -m build), build with --no-build-isolation or --no-isolation. {WITHOUT}"
        )
    release = importlib.metadata.version("torch").split("+")[0]
    for installed in importlib.metadata.distributions(name="torch", path=[outside]):
        if installed.version.split("+")[0] != release:
            raise SystemExit(
                f"mekd: this isolated build has torch {release}, and torch {installed.version} is installed: kernels "
                f"compiled for one do not load in the other. Build with --no-build-isolation. {WITHOUT}"
            )
    return release


def extensions() -> dict[str, object]:
    """The arguments of setup() for the C++ kernels."""
    release = find_torch(sysconfig.get_path("purelib"))
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Says what to do where the kernels cannot be built."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                raise SystemExit(
                    f"mekd: the C++ kernels could not be built ({error}). They take a compiler for C++20 with OpenMP, "
                    f"g++ 10 or newer; CXX names another one. {WITHOUT}"
                ) from error

    x86 = os.uname().machine in ("x86_64", "AMD64")
    modules = [
        CppExtension(
            f"mekd._cpu_{build.lower()}_torch_{release.replace('.', '_')}",
            ["csrc/all.cpp"],
            depends=sorted(map(str, Path("csrc").glob("*"))),
            py_limited_api=True,
            extra_compile_args=[
                "-O3", "-g0", "-std=c++20", "-fopenmp", "-fvisibility=hidden", f"-DCPU_CAPABILITY={build}",
                f"-DCPU_CAPABILITY_{build}", *flags,
            ],
        )
        for build, flags in FLAGS.items()
        if x86 or build == "DEFAULT"
    ]  # fmt: skip
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
        "install_requires": [f"torch=={release}", "numpy"],
    }


def main() -> None:
    """Build; what lists files alone needs no torch."""
    enough_setuptools(setuptools.__version__)
    without = os.environ.get("MEKD_NO_EXT") == "1"
    if without:
        print(f"mekd: {WITHOUT}", file=sys.stderr)
    plain: dict[str, object] = {"install_requires": ["torch>=2.9", "numpy"]}
    setuptools.setup(
        packages=[*setuptools.find_packages(include=["mekd", "mekd.*"]), "mekd.kernels"],
        package_dir={"mekd": "mekd", "mekd.kernels": "kernels"},
        package_data={"mekd.kernels": ["tuning.json"]},
        **(plain if without or {"sdist", "egg_info"} & set(sys.argv) else extensions()),
    )


if __name__ == "__main__":
    main()
