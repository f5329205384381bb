"""A stored gradient times what comes from above, in place: all that a backward on a GPU may have to do."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mekd.kernels.launch import launch

BLOCK = 2048


@triton.jit
def scale_kernel(x, factor, count, A: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor).to(A)
    if by != 1:  # which the device alone can know: the host would have to wait for it
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=0).to(A)
        tl.store(x + at, value * by, mask=at < count)


def scale_(x: Tensor, factor: Tensor) -> None:
    """Write x times factor (0-d) over x, whose elements lie without gaps; where factor is 1, x is not touched."""
    launch(
        scale_kernel, (triton.cdiv(x.numel(), BLOCK),), x, factor, x.numel(),
        A=tl.float64 if x.dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
