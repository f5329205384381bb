"""KDLoss as in torchdistill."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mekd import functional
from mekd.checks import check_student, check_teacher
from mekd.compat.dtype import as_given
from mekd.reference import accumulation_dtype, kl_term

IO = Mapping[str, Mapping[str, Tensor]]


class KDLoss(nn.Module):
    """alpha * CE + beta * T^2 * KL over dimension 1; the KL alone, without T^2 and beta, if there is no hard part.

    There is none when alpha is None or 0, or when forward gets no targets. beta: 1 - alpha if it is None. reduction
    is that of nn.KLDivLoss: "batchmean" divides by B, the first dimension alone, and makes the CE a "mean"; "mean"
    divides by all elements; "none" keeps all elements, and then no CE, one per row, can be added. kwargs: arguments
    of nn.CrossEntropyLoss. Both parts are computed in float32. The paths and ios name the logits in the dictionaries
    that torchdistill's hooks fill.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        self.temperature, self.alpha, self.reduction = temperature, alpha, reduction
        self.beta = 1 - alpha if beta is None and alpha is not None else beta
        hard = "mean" if reduction == "batchmean" else reduction
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction=hard, **kwargs)

    def forward(
        self, student_io_dict: IO, teacher_io_dict: IO, targets: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss of logits (B, C, ...), found in the dictionaries, and targets (B, ...) or (B, C, ...)."""
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        if not self.alpha or targets is None:
            return as_given(self._soft(student, teacher, "one"), student, teacher)
        if self.reduction == "none":
            raise ValueError("reduction is 'none' with alpha and targets; a CE per row cannot be added to each class")
        assert self.beta is not None
        loss = self.alpha * self._hard(student, targets) + self.beta * self._soft(student, teacher, "tau2")
        return as_given(loss, student, teacher)

    def _hard(self, student: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy in float32, as the other part is: bfloat16 keeps two digits of it."""
        dtype, own = accumulation_dtype(student), self.cross_entropy_loss
        return F.cross_entropy(
            student.to(dtype),
            targets.to(dtype) if targets.is_floating_point() else targets,
            None if own.weight is None else own.weight.to(dtype),
            ignore_index=own.ignore_index,
            reduction=own.reduction,
            label_smoothing=own.label_smoothing,
        )

    def _soft(self, student: Tensor, teacher: Tensor, scale: str) -> Tensor:
        if self.reduction == "none":
            return _elements(student, teacher, self.temperature)
        return functional.kd_loss(student, teacher, tau=self.temperature, scale=scale, dim=1, reduction=self.reduction)


def _elements(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """p (log p - log q) of each class by itself, in the shape of the logits."""
    check_student("student logits", student)
    check_teacher("teacher logits", teacher, student)
    dtype = accumulation_dtype(student)
    log_q, log_p = (F.log_softmax(x.to(dtype) / tau, dim=1) for x in (student, teacher))
    return kl_term(log_p, log_q)
