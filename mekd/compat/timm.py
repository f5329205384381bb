"""kd_loss as in timm, which has no loss function or module for it.

The formula is the one inside timm.task.LogitDistillationTask, a training task that holds both networks; kd_loss is
the name under which the task's output holds the value, and temperature is the task's argument.
"""

from torch import Tensor

from mekd import functional
from mekd.compat.dtype import as_given


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """T^2 / B * KL(softmax(teacher / T) || softmax(student / T)) over the last dimension, the sum of all others.

    student_logits, teacher_logits: (B, C) or (B, ..., C). The divisor is B, the first dimension alone ("batchmean").
    A task's loss is task_loss_weight * cross-entropy + distill_loss_weight * this, both weights 1 by default; of a task
    that is given task_loss_weight alone, distill_loss_weight is 1 - task_loss_weight.
    """
    loss = functional.kd_loss(student_logits, teacher_logits, tau=temperature, reduction="batchmean")
    return as_given(loss, student_logits, teacher_logits)
