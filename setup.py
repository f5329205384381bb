"""What pyproject.toml cannot say: the folder kernels/ is installed as mekd.kernels, and csrc/ is compiled.

The kernels are built twice from the same source, with AVX2 and for any processor, as two libraries, so that no inline
function of one is linked into the other; mekd.extension picks one when it is imported. They use no Python at all, and
so serve every Python, but only the torch that they were built with: its version is in their name, and the package
requires it. Without torch or a compiler, or with MEKD_NO_EXT=1 in the environment, mekd is installed without them and
runs on plain PyTorch.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

#: What a build may use, by the name that torch gives the capability. An entry "AVX512" with its flags is all that
#: another build takes.
FLAGS = {"AVX2": ["-mavx2", "-mfma", "-mf16c"], "DEFAULT": []}


def extensions() -> dict[str, object]:
    """The arguments of setup() for the C++ kernels, or none and why."""
    if os.environ.get("MEKD_NO_EXT") == "1":
        print("mekd: MEKD_NO_EXT=1, so the C++ kernels are left out", file=sys.stderr)
        return {}
    if importlib.util.find_spec("torch") is None:
        print("mekd: torch is not here to build against; use --no-build-isolation for the C++ kernels", file=sys.stderr)
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Leaves the kernels out, and says so, where they cannot be built."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                print(f"mekd: the C++ kernels could not be built and are left out: {error}", file=sys.stderr)
                self.extensions = []

    release = torch.__version__.split("+")[0].replace(".", "_")
    x86 = os.uname().machine in ("x86_64", "AMD64")
    modules = [
        CppExtension(
            f"mekd._cpu_{build.lower()}_torch_{release}",
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
        "install_requires": [f"torch=={torch.__version__.split('+')[0]}", "numpy"],
    }


packages = [*find_packages(include=["mekd", "mekd.*"]), "mekd.kernels"]
plain = {"install_requires": ["torch>=2.9", "numpy"]}
setup(
    packages=packages,
    package_dir={"mekd": "mekd", "mekd.kernels": "kernels"},
    package_data={"mekd.kernels": ["tuning.json"]},
    **(extensions() or plain),
)
