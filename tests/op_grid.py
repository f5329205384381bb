"""The grid that the tests of the ops share: backends and dtypes; the problems and their truth are in mekd.testing."""

from typing import Any

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
    SKEWED,
    TOPK_KINDS,
    Problem,
    check,
    make,
    result,
    truth,
    weights_of,
    within,
)

__all__ = [
    "BETAS", "DEVICES", "DTYPES", "FUSED", "GAN_KINDS", "IGNORED", "IMAGE_KINDS", "IMPLS", "KERNELS", "KINDS",
    "OF_EACH_OP", "ROW_KINDS", "SHAPES", "SKEWED", "TOPK_KINDS", "TRITON_RUNS", "Problem",
    "check", "compiled_only", "make", "result", "truth", "weights_of", "within",
]  # fmt: skip
#: Every backend by name, and where its tensors live. One more backend is one more entry in each.
DEVICES = {"cpp": "cpu", "reference": "cpu", "triton": "cpu" if extension.INTERPRETED else "cuda"}
TRITON_RUNS = extension.INTERPRETED or torch.cuda.is_available()
#: What has kernels, with blocks, tails, tiles and strides of its own, as far as it runs here.
KERNELS = [
    # Those of csrc/. Interpreted kernels take their place.
    *(
        []
        if extension.INTERPRETED
        else [pytest.param("cpp", marks=pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT))]
    ),
    # Those of kernels/: interpreted in a process of its own, compiled where there is a GPU. Where there is neither, one
    # test says so (test_ops_extension.py) for all.
    *([pytest.param("triton", marks=[] if extension.INTERPRETED else [pytest.mark.gpu])] if TRITON_RUNS else []),
]
#: And what runs where nothing was built: the definition, which knows nothing of the layout of memory.
IMPLS = [*KERNELS, "reference"]
#: One kind for each way in which an op reads its arguments.
OF_EACH_OP = [
    "logits", "probs", "labels", "spread", "dkd", "jsd", "tanh", "finished", "confidence", "gan-logits", "gan-probs",
    "discriminator",
]  # fmt: skip


def compiled_only(*points: Any) -> tuple[Any, ...]:
    """Grid points at the vectors and blocks of the C++ kernels, which interpreted kernels do not have."""
    return () if extension.INTERPRETED else points


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
