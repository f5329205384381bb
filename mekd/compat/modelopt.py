"""LogitsDistillationLoss as in NVIDIA ModelOpt 0.47 (modelopt.torch.distill).

Earlier versions have "batchmean" as their default, and divide it by all rows: they flatten the logits to (N, C) before.
"""

from torch import Tensor, nn

from mekd import functional
from mekd.checks import SAMPLE_REDUCTIONS, check_choice
from mekd.compat.dtype import as_given


class LogitsDistillationLoss(nn.Module):
    """T^2 * KL(softmax(logits_t / T) || softmax(logits_s / T)) over the last dimension.

    reduction: that of F.kl_div, "mean" over all elements, "batchmean" the sum over B, the first dimension alone, "sum";
    with "none" the classes are added up all the same, (B, ...).
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, SAMPLE_REDUCTIONS)
        self._temperature, self._reduction = temperature, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """The loss of logits_s (B, ..., C) against logits_t, whose gradient is cut."""
        loss = functional.kd_loss(logits_s, logits_t.detach(), tau=self._temperature, reduction=self._reduction)
        return as_given(loss, logits_s, logits_t)
