"""ForwardKLLoss, ReverseKLLoss and SymmetricKLLoss as in torchtune: of logits and labels that say which rows count.

Losses are float32 for narrower logits, as there. A class that the teacher alone rules out makes the reverse KL
infinite, where torchtune leaves it out.
"""

import torch
from torch import Tensor, nn

from mekd import functional
from mekd.reference import accumulation_dtype


class ForwardKLLoss(nn.Module):
    """The cross-entropy - sum p log q of softmax(teacher) and softmax(student): KL(p || q) plus the teacher's entropy.

    Classes of infinite student logits are left out. ignore_index: rows with this label do not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """The loss of logits (..., C) and labels (...), over the rows that count where normalize is True."""
        mask, reduction = _counting(labels, student_logits, self.ignore_index), "rowmean" if normalize else "sum"
        teacher = teacher_logits.detach().to(accumulation_dtype(teacher_logits))
        # p on the classes that are left, their mass, and the entropy of what is left.
        left = teacher.masked_fill(student_logits.detach().isinf(), -torch.inf)
        mass = (left.logsumexp(-1) - teacher.logsumexp(-1)).exp()
        log_p = left.log_softmax(-1)
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
        entropy = torch.where(mask, mass * entropy, 0.0).sum()
        kl = functional.kd_loss(student_logits, left, weights=mass, mask=mask, reduction=reduction)
        return kl + (entropy / mask.sum().clamp_min(1) if normalize else entropy)


class ReverseKLLoss(nn.Module):
    """KL(softmax(student) || softmax(teacher)). ignore_index: rows with this label do not count."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """The loss of logits (..., C) and labels (...), over the rows that count where normalize is True."""
        mask = _counting(labels, student_logits, self.ignore_index)
        return functional.kd_loss(
            student_logits, teacher_logits.detach(), direction="reverse", mask=mask,
            reduction="rowmean" if normalize else "sum",
        )  # fmt: skip


class SymmetricKLLoss(nn.Module):
    """sym_kd_ratio of ForwardKLLoss and the rest of ReverseKLLoss; ValueError for a ratio outside [0, 1]."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        if not 0.0 <= sym_kd_ratio <= 1.0:
            raise ValueError(f"sym_kd_ratio is {sym_kd_ratio}; it must lie between 0 and 1")
        self.ignore_index, self.sym_kd_ratio = ignore_index, sym_kd_ratio
        self.fkl, self.rkl = ForwardKLLoss(ignore_index), ReverseKLLoss(ignore_index)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """The loss of logits (..., C) and labels (...), over the rows that count where normalize is True."""
        forward, reverse = (loss(student_logits, teacher_logits, labels, normalize) for loss in (self.fkl, self.rkl))
        both: Tensor = self.sym_kd_ratio * forward + (1 - self.sym_kd_ratio) * reverse
        return both


def _counting(labels: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Which rows of logits (..., C) count, by labels of any shape, as there."""
    rows = logits.shape[:-1]
    if labels.numel() != rows.numel():
        raise ValueError(f"labels have shape {tuple(labels.shape)}; they must be {tuple(rows)}, one for each row")
    return (labels != ignore_index).reshape(rows)
