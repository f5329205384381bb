"""DistillKL as in RepDistiller."""

from torch import Tensor, nn

from mekd import functional
from mekd.compat.dtype import as_given


class DistillKL(nn.Module):
    """T^2 / B * KL(softmax(y_t / T) || softmax(y_s / T)) over dimension 1, the sum of all others.

    y_s: the student's logits (B, C) or (B, C, ...); y_t: the teacher's, of the same shape. The divisor is B, the
    first dimension alone, as in RepDistiller's criterion of this name.
    """

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """The loss of y_s (B, C, ...) against y_t."""
        return as_given(functional.kd_loss(y_s, y_t, tau=self.T, dim=1, reduction="batchmean"), y_s, y_t)
