"""The grid that the tests of the ops share: backends and dtypes; the problems and their truth are in mekd.testing."""

import pytest
import torch

from mekd import extension
from mekd.testing import (
    BETAS,
    GAN_KINDS,
    IGNORED,
    IMAGE_KINDS,
    KINDS,
    ROW_KINDS,
    SHAPES,
    Problem,
    check,
    make,
    result,
    truth,
    within,
)

__all__ = [
    "BETAS", "DEVICES", "DTYPES", "FUSED", "GAN_KINDS", "IGNORED", "IMAGE_KINDS", "IMPLS", "KINDS", "ROW_KINDS",
    "SHAPES", "TRITON_RUNS", "Problem", "check", "make", "result", "truth", "within",
]  # fmt: skip
#: Every backend by name, and where its tensors live. One more backend is one more entry in each.
DEVICES = {"cpp": "cpu", "reference": "cpu", "triton": "cpu" if extension.INTERPRETED else "cuda"}
TRITON_RUNS = extension.INTERPRETED or torch.cuda.is_available()
IMPLS = [
    # The kernels of csrc/.
    pytest.param("cpp", marks=pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT)),
    # What runs where nothing was built, and beyond the CPU.
    "reference",
    # The kernels of kernels/: interpreted in a process of its own, compiled where there is a GPU.
    pytest.param(
        "triton",
        marks=[
            *([] if extension.INTERPRETED else [pytest.mark.gpu]),
            pytest.mark.skipif(not TRITON_RUNS, reason="no GPU here; TRITON_INTERPRET=1 interprets, as make test does"),
        ],
    ),
]
DTYPES = [
    # Scientific users, and gradcheck.
    torch.float64,
    # Training.
    torch.float32,
    # Autocast: the gradient is rounded once.
    torch.bfloat16,
    # Autocast with a GradScaler.
    torch.float16,
]
#: What the ops themselves check, beside what functional does, is checked by the fused kernels.
FUSED = extension.LOADED is not None or extension.INTERPRETED
