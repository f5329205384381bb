"""Black-box knowledge distillation by mapping emulation (MEKD), fast.

``mekd.functional`` and ``mekd.losses`` need nothing but torch. The command line, the oracles and the data
sets import what they need when they are used.
"""

import os

import torch

from mekd import functional, losses

__version__ = "0.1.0"
__all__ = ["functional", "load_student", "losses"]


def load_student(run: str | os.PathLike[str]) -> torch.nn.Module:
    """The student of a run's folder or of a student.safetensors, in eval mode: uint8 pixels (m, ch, S, S) to logits.

    Its preprocessing is inside, its classes are the names of the C. Errors as in mekd.student.load_student.
    """
    from mekd.student import load_student as load

    return load(run)
