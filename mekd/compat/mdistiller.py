"""kd_loss and dkd_loss as in mdistiller, and logit_stand of the logit standardisation built on it."""

from torch import Tensor

from mekd import functional
from mekd.compat.dtype import as_given


def kd_loss(
    logits_student: Tensor, logits_teacher: Tensor, temperature: float | Tensor, logit_stand: bool = False
) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) over dimension 1, the mean of all others.

    logits_student, logits_teacher: (B, C) or (B, C, ...), the dense ones averaged over B and all positions.
    logit_stand=True standardises each row before the division by T (Sun et al., CVPR 2024), for (B, C) alone:
    of more dimensions the original standardises the last one, which is not the classes.
    """
    if not logit_stand:
        loss = functional.kd_loss(logits_student, logits_teacher, tau=temperature, dim=1)
        return as_given(loss, logits_student, logits_teacher)
    if logits_student.dim() != 2:
        raise ValueError(
            f"logits_student has shape {tuple(logits_student.shape)}; with logit_stand=True it must be (B, C)"
        )
    loss = functional.logit_standardized_kd_loss(logits_student, logits_teacher, tau=temperature)
    return as_given(loss, logits_student, logits_teacher)


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float | Tensor,
) -> Tensor:
    """T^2 / B * (alpha * KL of target against rest + beta * KL within the rest), without warm-up (Zhao et al., 2022).

    logits_student, logits_teacher: (B, C); target: B int64 classes in any shape. The rest leaves the target out
    where the original subtracts 1000 from its logit, and both parts are formed from logarithms: gaps at which the
    original gives inf or NaN give their value here. With two classes the second part is 0.
    """
    loss = functional.dkd_loss(
        logits_student, logits_teacher, target.reshape(-1), alpha=alpha, beta=beta, tau=temperature
    )
    return as_given(loss, logits_student, logits_teacher)
