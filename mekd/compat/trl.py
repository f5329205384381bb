"""generalized_jsd_loss as in TRL's GKD trainer, a static method there."""

import torch
from torch import Tensor

from mekd import functional
from mekd.checks import SAMPLE_REDUCTIONS, check_choice
from mekd.compat.dtype import as_given
from mekd.reference import kl_term, log_softmax

IGNORED = -100


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | float | Tensor | None = None,
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; beta 0 is KL(p || q), beta 1 is KL(q || p).

    student_logits (q), teacher_logits (p): (B, ..., C); labels (B, ...): -100 where a row does not count.
    num_items_in_batch: what the sum is divided by, whatever reduction says. Else "batchmean" divides by the rows that
    count where there are labels, by B where there are none; "mean" by the elements that count; "sum" by nothing; "none"
    gives each class by itself, (..., C), or (rows that count, C).
    """
    check_choice("reduction", reduction, SAMPLE_REDUCTIONS)
    mask = None if labels is None else labels != IGNORED
    if num_items_in_batch is None and reduction == "none":
        losses = _elements(student_logits, teacher_logits.detach(), beta, temperature)
        return as_given(losses if mask is None else losses[mask], student_logits, teacher_logits)
    how = "sum" if num_items_in_batch is not None else reduction
    if mask is not None and how in ("batchmean", "mean"):
        how, divisor = "rowmean", student_logits.shape[-1] if how == "mean" else 1
    else:
        divisor = 1 if num_items_in_batch is None else num_items_in_batch  # type: ignore[assignment]
    loss = functional.jsd_loss(
        student_logits, teacher_logits.detach(), beta=beta, tau=temperature, mask=mask, reduction=how
    )
    if isinstance(divisor, Tensor):
        divisor = divisor.to(loss.device)
    return as_given(loss / divisor, student_logits, teacher_logits)


def _elements(student: Tensor, teacher: Tensor, beta: float, tau: float) -> Tensor:
    """Each class by itself, in the shape of the logits."""
    log_q, log_p = log_softmax(student, tau), log_softmax(teacher, tau)

    if beta == 0:
        return kl_term(log_p, log_q)
    if beta == 1:
        return kl_term(log_q, log_p)
    share = torch.tensor(beta, dtype=log_q.dtype, device=log_q.device)
    log_m = torch.logaddexp(log_p + share.log(), log_q + torch.log1p(-share))
    return beta * kl_term(log_p, log_m) + (1 - beta) * kl_term(log_q, log_m)
