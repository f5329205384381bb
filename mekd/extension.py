"""Finds and loads the C++ kernels: the build for this processor, and only by the torch that it was built with."""

import os
import re
from pathlib import Path

import torch

#: A process in which Triton interprets its kernels, on the CPU: they take the place of the C++ kernels there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Instruction sets as torch names what a processor can do, best first; csrc/ is built for some of them.
CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")


def version(torch_version: str = torch.__version__) -> str:
    """The release without what was built locally: 2.14.1 of 2.14.1+cu130."""
    return torch_version.split("+")[0]


def name(build: str) -> str:
    """The module of one build; it carries the torch that it was built with."""
    return f"_cpu_{build.lower()}_torch_{version().replace('.', '_')}"


def _load() -> tuple[str | None, str]:
    if INTERPRETED:
        return None, "TRITON_INTERPRET=1 puts the Triton kernels, interpreted, in the place of its C++ kernels"
    here = Path(__file__).parent
    capability = torch.backends.cpu.get_cpu_capability()
    best = CAPABILITIES.index(capability) if capability in CAPABILITIES else -1
    for build in CAPABILITIES[best:]:
        for path in here.glob(name(build) + ".*"):
            try:
                torch.ops.load_library(path)
            except OSError as error:
                return None, f"{path.name} does not load: {error}"
            return build, ""
    others = sorted({found[1].replace("_", ".") for path in here.glob("_cpu_*")
                     if (found := re.search(r"_torch_([0-9_]+)\.", path.name))})  # fmt: skip
    if others:
        return None, (
            f"its C++ kernels were built for torch {', '.join(others)}, and this is torch {version()}; "
            "install mekd from source again, which compiles them: pip install --force-reinstall --no-deps ."
        )
    return None, "its C++ kernels are not built; install from source, with a C++ compiler and without MEKD_NO_EXT=1"


#: The build that runs, or None and why not. Filled by load(), after the schemas exist.
LOADED, WHY_NOT = None, "mekd.ops has not been imported"


def load() -> None:
    """Load once; never raises: without the kernels the reference runs."""
    global LOADED, WHY_NOT
    LOADED, WHY_NOT = _load()
