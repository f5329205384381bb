"""The dtype of a loss, as PyTorch's own losses have it."""

import torch
from torch import Tensor


def as_given(loss: Tensor, student: Tensor) -> Tensor:
    """The loss, computed in float32, in the dtype of the student; under autocast, which widens softmax, as it is."""
    return loss if torch.is_autocast_enabled(student.device.type) else loss.to(student.dtype)
