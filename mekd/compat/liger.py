"""Distillation losses as in Liger Kernel, modules and functions, on the CPU too.

Without a layer they take the student's log-probabilities as an input of their own: the gradient is the one with respect
to these, and a log_softmax in front of the loss takes it on to the logits. The teacher's side gets no gradient.
"""

import torch
from torch import Tensor, nn

from mekd import functional
from mekd.checks import SAMPLE_REDUCTIONS, check_choice, check_student, check_teacher
from mekd.linear import linear_jsd_loss
from mekd.reference import accumulation_dtype


class LigerKLDIVLoss(nn.KLDivLoss):
    """KL(p || exp(log_q)): p * (log max(p, eps) - log_q) per element, then the reduction of nn.KLDivLoss.

    eps: what probabilities below it count as inside the logarithm; without effect with log_target=True, where the
    target is log p. reduction: "mean" divides by all elements, "batchmean" by rows, "none" keeps (N, C).
    """

    def __init__(
        self,
        eps: float = 1e-10,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__(size_average, reduce, reduction, log_target)
        check_choice("reduction", self.reduction, SAMPLE_REDUCTIONS)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss of log-probabilities y_pred (N, C) against y_true (N, C), probabilities or log-probabilities."""
        _check_matrix("y_pred", y_pred)
        y_true = y_true.detach()
        if self.log_target and self.reduction != "none":
            return functional.jsd_loss(y_pred, y_true, beta=0.0, log_probs=True, reduction=self.reduction)
        check_student("y_pred", y_pred)
        check_teacher("y_true", y_true, y_pred)
        dtype = accumulation_dtype(y_pred)
        target, log_q = y_true.to(dtype), y_pred.to(dtype)
        p, log_p = (target.exp(), target) if self.log_target else (target, target.clamp_min(self.eps).log())
        losses = p * (log_p - log_q).masked_fill(p == 0, 0.0)
        if self.reduction == "none":
            return losses
        return losses.sum() / {"sum": 1, "batchmean": max(len(p), 1), "mean": max(p.numel(), 1)}[self.reduction]


class LigerJSD(nn.Module):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, summed and divided by the rows that count.

    beta in [0, 1]: 0 is KL(p || q), 1 is KL(q || p). ignore_index: rows with this label do not count.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The loss of log-probabilities log_q (N, C) against log_p (N, C), without the rows that shift_labels ignore.

        shift_labels: (N,), integers, of which only the ignore_index is looked for.
        """
        _check_matrix("log_q", log_q)
        if shift_labels is not None and shift_labels.shape != log_q.shape[:1]:
            raise ValueError(f"shift_labels have shape {tuple(shift_labels.shape)}; it must be ({len(log_q)},)")
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        loss = functional.jsd_loss(log_q, log_p.detach(), beta=self.beta, log_probs=True, mask=mask)
        return loss.to(log_q.dtype)


def liger_jsd(
    input: Tensor, target: Tensor, shift_labels: Tensor | None = None, beta: float = 0.5, ignore_index: int = -100
) -> Tensor:
    """LigerJSD as a function of log-probabilities input and target (N, C)."""
    loss: Tensor = LigerJSD(beta, ignore_index)(input, target, shift_labels)
    return loss


def liger_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """LigerKLDIVLoss as a function; size_average and reduce are there and without effect, as in the original."""
    loss: Tensor = LigerKLDIVLoss(eps, reduction=reduction, log_target=log_target)(input, target)
    return loss


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """LigerJSD of two linear layers' logits, which never exist as a whole: inputs (N, H), weights (C, H).

    accum_dtype: without effect; the weight's gradient is rounded to its dtype after each of a few parts of the rows.
    """
    if shift_labels is not None and shift_labels.shape != student_input.shape[:1]:
        raise ValueError(f"shift_labels have shape {tuple(shift_labels.shape)}; it must be ({len(student_input)},)")
    mask = None if shift_labels is None else shift_labels != ignore_index
    teacher = teacher_input.detach(), teacher_weight.detach()
    return linear_jsd_loss(student_input, student_weight, teacher=teacher, beta=jsd_beta, tau=temperature, mask=mask)


def _check_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (N, C)")
