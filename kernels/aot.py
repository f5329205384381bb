"""Compiling ahead of time, on a machine without a GPU: the launchers run on meta tensors, and every launch compiles.

The specialisation is the one that a real GPU would get from the same call: Triton looks at the same arguments, and meta
tensors count as aligned, as what PyTorch allocates is. TRITON_INTERPRET=1 rules it out.
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from mekd.extension import INTERPRETED
from mekd.kernels import launch as starter


class Limits(NamedTuple):
    """What one multiprocessor holds at most."""

    warps: int
    blocks: int
    shared: int


#: From the table of technical specifications per compute capability in NVIDIA's CUDA C++ Programming Guide.
ARCHS = {
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
    "sm_100": Limits(64, 32, 228 << 10),
    "sm_120": Limits(48, 24, 100 << 10),
}
#: AMD's, of which no sheet is read off: that the kernels compile for it is what is known.
COMPILED_ALONE = ("gfx942",)
REGISTERS = 65536  # of a multiprocessor; a warp takes them by 256
RESERVED_SHARED = 1024  # bytes of each block that the system keeps
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One launch that was compiled: the kernel's name, its arguments by name, and what the compiler gave."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any


class Resources(NamedTuple):
    """What a kernel takes of a multiprocessor: registers and spilt bytes of a thread, shared memory of a block."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float


class _Driver:
    """Stands in for a GPU of this architecture."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        # Triton keeps what it compiled by device: no GPU has this name.
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        if self.arch.startswith("gfx"):
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[list[Launch]]:
    """Within it launchers compile for arch and launch nothing; yields the list of what they would have launched.

    ValueError for an unknown arch; RuntimeError where Triton only interprets.
    """
    if arch not in (*ARCHS, *COMPILED_ALONE):
        known = ", ".join(map(repr, (*ARCHS, *COMPILED_ALONE)))
        raise ValueError(f"arch is {arch!r}; it must be one of {known}")
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set, so that nothing can be compiled; unset it and start anew")
    launches: list[Launch] = []

    def compile_instead(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        names = dict(zip(kernel.arg_names, arguments, strict=False))
        names |= {name: value for name, value in options.items() if name in kernel.arg_names}
        launches.append(Launch(kernel.fn.__name__, grid, names, compiled))

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(arch))
    starter.compile_instead = compile_instead
    try:
        yield launches
    finally:
        starter.compile_instead = None
        triton.runtime.driver._active = active


def resources(launch: Launch) -> Resources:
    """Read off the machine code with the tools that Triton brings along."""
    usage = _tool("cuobjdump", "-res-usage", launch.compiled.asm["cubin"])
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if "REG" not in used:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage.strip()!r}")
    metadata = launch.compiled.metadata
    share = occupancy(f"sm_{metadata.target.arch}", used["REG"], metadata.shared, metadata.num_warps)
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], metadata.shared, share)


def access_widths(launch: Launch) -> tuple[dict[int, int], dict[int, int]]:
    """How many loads from global memory, and stores to it, there are of each width in bits, in the machine code."""
    code = _tool("nvdisasm", "-c", launch.compiled.asm["cubin"])
    return widths(code, "LDG|LDGSTS"), widths(code, "STG")


@functools.cache
def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOLS / name, option, file.name], capture_output=True, text=True, check=True).stdout


def widths(code: str, names: str) -> dict[int, int]:
    """Bits of each of these instructions in disassembled machine code; one that names no width moves 32."""
    found: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b(?:{names})((?:\.\w+)+)", code):
        named = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", modifiers)
        found[int(named[1]) if named else 32] += 1
    return dict(found)


def occupancy(arch: str, registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's warps that blocks of so many warps can fill, by registers and shared memory."""
    limits = ARCHS[arch]
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    by_shared = limits.shared // (shared + RESERVED_SHARED)
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps
