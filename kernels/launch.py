"""The one place where a kernel is started, so that it can be compiled ahead of time by the very same call."""

from collections.abc import Callable
from typing import Any

import torch

from mekd.extension import INTERPRETED

if INTERPRETED:
    from mekd.kernels.interpreted import correct

    correct()

#: What kernels.aot puts here takes the place of a launch: it gets the kernel, the grid, its arguments and its options.
compile_instead: Callable[..., None] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int, **constants: Any
) -> None:
    """Run the kernel once for each point of the grid, on the device of its first argument; an empty grid is nothing."""
    options = {**constants, "num_warps": num_warps, "num_stages": num_stages}
    if compile_instead is not None:
        compile_instead(kernel, grid, *arguments, **options)
    elif grid[0] > 0:
        with torch.cuda.device_of(arguments[0]):  # Triton launches where PyTorch is, not where the tensors are
            kernel[grid](*arguments, **options)
