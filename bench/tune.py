"""Times tiles of the Triton kernels on this GPU, and writes the fastest of each to the table that the kernels read."""

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mekd.files import write_text
from mekd.selftest import OPS, median_seconds
from mekd.testing import Problem, make, result

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ELEMENTS = 1 << 24  # of the student, so that the whole card is busy
MORE = 3 << 14  # classes of a row for which every kernel loops

Measure = Callable[[str, torch.dtype, int], float]


def candidates(tile: list[int], loops: bool) -> Iterator[list[int]]:
    """Tiles around this one, itself first: half and twice its rows and warps and, where it loops, its block."""
    rows, block, warps, stages = tile
    yield tile
    for r in (rows // 2, rows, 2 * rows):
        for b in (block // 2, block, 2 * block) if loops else (block,):
            for w in (warps // 2, warps, 2 * warps):
                for s in (1, 2, 3) if loops else (stages,):
                    if r >= 1 and 1 <= w <= 32 and [r, b, w, s] != tile:
                        yield [r, b, w, s]


def tune(table: dict[str, Any], arch: str, kernels: Sequence[str], measure: Measure, use: Callable[[], None]) -> None:
    """Put the fastest tile of each kernel, dtype and size class into the table, which the kernels read after use().

    An arch that is not there begins with the tiles of the one nearest to it. What does not run counts as slow.
    """
    for kernel in kernels:
        archs = table[kernel]
        if arch not in archs:
            nearest = min(archs, key=lambda name: abs(int(name[3:]) - int(arch[3:])))
            archs[arch] = json.loads(json.dumps(archs[nearest]))
        for dtype in DTYPES:
            sizes = archs[arch][str(dtype).removeprefix("torch.")]
            for size, before in list(sizes.items()):
                classes = MORE if size == "more" else int(size)
                loops = before[1] < classes
                taken = []
                for tile in candidates(before, loops):
                    sizes[size] = tile
                    use()
                    try:
                        taken.append((measure(kernel, dtype, classes), tile))
                    except Exception as error:  # too many registers, say
                        print(f"{kernel} {dtype} {size} {tile}: {type(error).__name__}")
                seconds, sizes[size] = min(taken, default=(float("nan"), before))
                use()
                print(f"{kernel:<20}{dtype!s:<16}{size:>6}  {sizes[size]}, {1e6 * seconds:.1f} us", flush=True)


@functools.lru_cache(maxsize=1)
def problem_of(kernel: str, dtype: torch.dtype, classes: int) -> Problem:
    """One for all tiles: drawing 16 million numbers takes longer than to time them."""
    return make(OPS[kernel][0], (max(1, ELEMENTS // classes), classes), dtype, device="cuda")


def on_this_gpu(kernel: str, dtype: torch.dtype, classes: int) -> float:
    """Seconds of loss and gradient."""
    problem = problem_of(kernel, dtype, classes)
    return median_seconds(lambda: result(problem, "triton", "mean"), torch.device("cuda"), repeats=10)


def main(arguments: Sequence[str]) -> int:
    """Tune and write; 2 without a GPU."""
    from mekd.kernels import tuning

    table = tuning.table()
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=table, metavar="KERNEL", help="these kernels alone")
    parser.add_argument("--out", type=Path, default=tuning.FILE, help="where the table goes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m bench tune: no CUDA device is visible; it times the kernels on the card that they are for")
        return 2
    major, minor = torch.cuda.get_device_capability()
    tune(table, f"sm_{10 * major + minor}", options.only or list(table), on_this_gpu, tuning.tile_of.cache_clear)
    write_text(options.out, tuning.dumps(table))
    print(f"{options.out} written: {torch.cuda.get_device_name()}")
    return 0
