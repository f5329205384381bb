"""Where Triton's interpreter differs from a GPU, it is set right here: imported in interpreter processes alone."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _rounding(self: Any, source: TensorHandle, dtype: Any) -> TensorHandle:
    """The hardware rounds to bfloat16; interpreted, the last bits would be cut off."""
    if dtype.scalar != tl.bfloat16:
        return _cast(self, source, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data, np.float32)).bfloat16()
    return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def correct() -> None:
    """Round to bfloat16; leave tensors of the CPU, which are not copied, in peace; say nothing of masked infinities."""
    InterpreterBuilder.create_fp_trunc = _rounding
    GridExecutor._restore_args_dev = lambda self, *arguments: None
    np.seterr(all="ignore")
