"""What pyproject.toml cannot say: the folder kernels/ is installed as mekd.kernels, and csrc/ is compiled.

The kernels are built once for each instruction set from the same source, as libraries of their own, so that no inline
function of one is linked into another; mekd.extension picks one when it is imported. They use no Python, and of PyTorch
its stable ABI alone, so that one build serves every Python and every torch from 2.10 on. What cannot be built ends the
installation; MEKD_NO_EXT=1 in the environment goes without the kernels, and mekd then runs on plain PyTorch.
"""

import importlib.metadata
import importlib.util
import os
import platform
import site
import sys
import sysconfig
from pathlib import Path

import setuptools

#: What a build may use, by the name that torch gives the capability, as far as csrc/ compiles for it.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "DEFAULT": [],
}
#: The oldest torch whose stable ABI has what csrc/torch.h uses.
OLDEST = (2, 10)
WITHOUT = "MEKD_NO_EXT=1 in the environment installs mekd without its C++ kernels, on plain PyTorch"


def enough_setuptools(version: str) -> None:
    """SystemExit where setuptools does not know the licence field of pyproject.toml, which it would say in 60 lines."""
    if int(version.split(".")[0]) < 77:
        raise SystemExit(f"mekd: setuptools is {version} and must be 77 or newer: pip install -U setuptools wheel")


def find_torch(outside: str) -> None:
    """Make the torch whose headers are compiled with importable; SystemExit where there is none, or too old a one.

    outside: the site-packages of the environment that pip installs into. An isolated build does not see them.
    """
    if importlib.util.find_spec("torch") is None:
        site.addsitedir(outside)
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "mekd: its C++ kernels are compiled with the headers of torch, and there is none here. Install torch "
            "first: pip install torch, then pip install . again; where the build has an environment of its own (uv, "
            f"python -m build), build with --no-build-isolation or --no-isolation. {WITHOUT}"
        )
    release = importlib.metadata.version("torch")
    if tuple(map(int, release.split(".")[:2])) < OLDEST:
        raise SystemExit(
            f"mekd: torch is {release}, and its C++ kernels take {'.'.join(map(str, OLDEST))} or newer: "
            f"pip install -U torch. {WITHOUT}"
        )


def extensions() -> dict[str, object]:
    """The arguments of setup() for the C++ kernels."""
    find_torch(sysconfig.get_path("purelib"))
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Says what to do where the kernels cannot be built."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                raise SystemExit(
                    f"mekd: the C++ kernels could not be built ({error}). They take a compiler for C++20, "
                    f"g++ 10 or clang 12 or newer; CXX names another one. {WITHOUT}"
                ) from error

    x86 = platform.machine() in ("x86_64", "AMD64")
    modules = [
        CppExtension(
            f"mekd._cpu_{build.lower()}",
            ["csrc/all.cpp"],
            depends=sorted(map(str, Path("csrc").glob("*"))),
            py_limited_api=True,
            # First: libtorch exports parts of its own libstdc++, which another torch may not.
            libraries=["stdc++"] if sys.platform == "linux" else [],
            extra_compile_args=[
                "-O3", "-g0", "-std=c++20", "-fvisibility=hidden",
                f"-DTORCH_TARGET_VERSION=0x{OLDEST[0]:02x}{OLDEST[1]:02x}000000000000", *flags,
            ],
        )
        for build, flags in FLAGS.items()
        if x86 or build == "DEFAULT"
    ]  # fmt: skip
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
        "install_requires": [f"torch>={OLDEST[0]}.{OLDEST[1]}", "numpy"],
    }


def main() -> None:
    """Build; what lists files alone needs no torch."""
    enough_setuptools(setuptools.__version__)
    without = os.environ.get("MEKD_NO_EXT") == "1"
    if without:
        print(f"mekd: {WITHOUT}", file=sys.stderr)
    plain: dict[str, object] = {"install_requires": ["torch>=2.9", "numpy"]}
    setuptools.setup(
        packages=[*setuptools.find_packages(include=["mekd", "mekd.*"]), "mekd.kernels", "mekd.configs"],
        package_dir={"mekd": "mekd", "mekd.kernels": "kernels", "mekd.configs": "configs"},
        package_data={
            "mekd": ["py.typed"],
            "mekd.kernels": ["tuning.json"],
            "mekd.page": ["page.css", "page.js"],
            "mekd.configs": ["*.yaml"],
        },
        **(plain if without or {"sdist", "egg_info"} & set(sys.argv) else extensions()),
    )


if __name__ == "__main__":
    main()
