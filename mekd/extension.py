"""Finds and loads the C++ kernels: the build for this processor."""

import os
from pathlib import Path

import torch

#: A process in which Triton interprets its kernels, on the CPU: they take the place of the C++ kernels there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Instruction sets as torch names what a processor can do, best first; csrc/ is built for each.
CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")
#: The oldest torch with the stable ABI that they are built on.
OLDEST = (2, 10)


def name(build: str) -> str:
    """The module of one build."""
    return f"_cpu_{build.lower()}"


def possible() -> tuple[str, ...]:
    """The builds that this processor can run, as torch knows it, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    return CAPABILITIES[CAPABILITIES.index(capability) if capability in CAPABILITIES else -1 :]


def _load() -> tuple[str | None, str]:
    if INTERPRETED:
        return None, "TRITON_INTERPRET=1 puts the Triton kernels, interpreted, in the place of its C++ kernels"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return None, f"its C++ kernels take torch {oldest} or newer, and this is torch {torch.__version__}"
    here = Path(__file__).parent
    chosen = os.environ.get("MEKD_CPU", "").upper()
    if chosen and chosen not in possible():
        allowed = ", ".join(possible()).lower()
        return None, f"MEKD_CPU in the environment is {chosen.lower()!r}; this processor can run {allowed}"
    for build in [chosen] if chosen else possible():
        for path in here.glob(name(build) + ".*"):
            try:
                torch.ops.load_library(path)
            except OSError as error:
                return None, f"{path.name} does not load: {error}"
            return build, ""
    how = "install from source"
    if (here.parent / "csrc").is_dir():  # a clone, which Python takes before what is installed
        how = f"pip install -e {here.parent}, as Python takes mekd from this clone"
    return None, f"its C++ kernels are not built; {how}, with a C++ compiler and without MEKD_NO_EXT=1"


#: The build that runs, or None and why not. Filled by load(), after the schemas exist.
LOADED, WHY_NOT = None, "mekd.ops has not been imported"


def load() -> None:
    """Load once; never raises: without the kernels the reference runs."""
    global LOADED, WHY_NOT
    LOADED, WHY_NOT = _load()
