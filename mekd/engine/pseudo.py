"""Private images at home: late in step 2 the student learns from them too, as an average of its weights labels them.

Nobody is asked. Self-training with soft labels by an average of the student: Tarvainen and Valpola (2017).
"""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mekd.engine.train import computed_in

#: The decay of the average.
DECAY = 0.995
#: The share of the steps after which the average knows enough.
LATE = 0.5


def average_of(student: nn.Module) -> AveragedModel:
    """An exponential average of the student's weights and statistics, in eval mode."""
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True).eval()


@torch.no_grad()
def pseudo_labels(average: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Probabilities (m, C) by the average, of images (m, ch, S, S)."""
    with computed_in(precision, images.device):
        logits = average(images.contiguous(memory_format=torch.channels_last))
    return logits.float().softmax(1)
