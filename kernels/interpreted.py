"""Where Triton's interpreter differs from a GPU, it is set right here: imported in interpreter processes alone."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle

_cast = InterpreterBuilder.cast_impl
_sum = ReduceOps.sum


def _rounding(self: Any, source: TensorHandle, dtype: Any) -> TensorHandle:
    """The hardware rounds to bfloat16; interpreted, the last bits would be cut off."""
    if dtype.scalar != tl.bfloat16:
        return _cast(self, source, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data, np.float32)).bfloat16()
    return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _in_a_tree(self: Any, x: tl.tensor) -> tl.tensor:
    """Threads add in pairs; one after the other, the roundings of equal terms would all go the same way."""
    if self.axis is None:
        return _sum(self, x)
    terms = np.moveaxis(x.handle.data, self.axis, 0)
    while len(terms) > 1:  # always a power of two
        terms = terms[::2] + terms[1::2]
    return self.to_tensor(np.expand_dims(terms[0], self.axis) if self.keep_dims else terms[0], x.dtype)


def correct() -> None:
    """Round and add as a GPU does; copy no tensor of the CPU onto itself; say nothing of infinities."""
    InterpreterBuilder.create_fp_trunc = _rounding
    ReduceOps.sum = _in_a_tree
    GridExecutor._restore_args_dev = lambda self, *arguments: None
    np.seterr(all="ignore")
