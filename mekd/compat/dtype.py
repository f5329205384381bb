"""The dtype of a loss, as PyTorch's own losses have it."""

import torch
from torch import Tensor

from mekd.reference import autocasts


def as_given(loss: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss, computed in float32, in the dtype of both logits; under autocast, which widens softmax, as it is."""
    return loss if autocasts(student) else loss.to(torch.promote_types(student.dtype, teacher.dtype))
