"""Which tile, how many warps and stages a kernel gets: a table. Nothing is tried out while a model trains."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mekd.extension import INTERPRETED


class Tile(NamedTuple):
    """What one program takes: rows, and classes at a time; fewer than there are means that it loops over them."""

    rows: int
    block: int
    warps: int
    stages: int


FILE = Path(__file__).with_name("tuning.json")
#: The longest row that one program holds in registers; a class more, and it loops.
LONGEST = 16384
SMALLEST = 16
NEAREST = 90


def tile(kernel: str, dtype: torch.dtype, classes: int) -> Tile:
    """The entry for this kernel, dtype and class count on the current device's architecture."""
    size = 1 << max(classes - 1, SMALLEST - 1).bit_length()
    arch, most = _arch()
    found = tile_of(kernel, str(dtype).removeprefix("torch."), str(size) if classes <= LONGEST else "more", arch)
    return found if found.warps <= most else found._replace(warps=most)


@functools.cache
def tile_of(kernel: str, dtype: str, size: str, arch: int) -> Tile:
    """The entry by its names, of the arch that is nearest; looked up once."""
    archs = table()[kernel]
    nearest = min(archs, key=lambda name: abs(int(name.removeprefix("sm_")) - arch))
    return Tile(*archs[nearest][dtype][size])


@functools.cache
def table() -> dict[str, Any]:
    """kernel -> arch -> dtype -> size class -> [rows, block, warps, stages], as in the file."""
    return json.loads(FILE.read_text("utf-8"))


def dumps(content: dict[str, Any]) -> str:
    """The table as the file holds it: a line for each dtype."""
    kernels = (
        f" {json.dumps(kernel)}: {{\n"
        + ",\n".join(
            f"  {json.dumps(arch)}: {{\n"
            + ",\n".join(f"   {json.dumps(dtype)}: {json.dumps(sizes)}" for dtype, sizes in dtypes.items())
            + "\n  }"
            for arch, dtypes in archs.items()
        )
        + "\n }"
        for kernel, archs in content.items()
    )
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def _arch() -> tuple[int, int]:
    """90 for sm_90, of the device that Triton compiles for, and the most warps of a block there.

    Interpreted, any will do; of an architecture that has no number, as AMD's, nothing was tried, and it gets sm_90's.
    """
    if INTERPRETED:
        return NEAREST, 32
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return target.arch if isinstance(target.arch, int) else NEAREST, 1024 // target.warp_size
