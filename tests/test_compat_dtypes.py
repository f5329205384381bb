"""In which dtype a loss of another library comes where student and teacher have each their own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.compat import mdistiller, modelopt, repdistiller, timm, torchdistill, trl

LABELS = torch.zeros(6, dtype=torch.int64)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mdistiller": lambda s, t: mdistiller.kd_loss(s, t, 4.0),
    "standardised": lambda s, t: mdistiller.kd_loss(s, t, 4.0, logit_stand=True),
    "dkd": lambda s, t: mdistiller.dkd_loss(s, t, LABELS.to(s.device), 1.0, 8.0, 4.0),
    "repdistiller": lambda s, t: repdistiller.DistillKL(4.0)(s, t),
    "timm": lambda s, t: timm.kd_loss(s, t, 4.0),
    "torchdistill": lambda s, t: torchdistill.KDLoss("s", "o", "t", "o", 4.0)({"s": {"o": s}}, {"t": {"o": t}}),
    "with labels": lambda s, t: torchdistill.KDLoss("s", "o", "t", "o", 4.0, 0.5)(
        {"s": {"o": s}}, {"t": {"o": t}}, LABELS.to(s.device)
    ),
    "modelopt": lambda s, t: modelopt.LogitsDistillationLoss(4.0)(s, t),
    "trl": lambda s, t: trl.generalized_jsd_loss(s, t, beta=0.0),
    "trl, each": lambda s, t: trl.generalized_jsd_loss(s, t, reduction="none"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        # A frozen teacher that was left as it was, or has been made small.
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_the_dtype_is_the_formula_s(name: str, student: torch.dtype, teacher: torch.dtype) -> None:
    s, t = torch.randn(6, 7).to(student), torch.randn(6, 7).to(teacher)
    plain = F.kl_div(F.log_softmax(s / 4.0, -1), F.softmax(t / 4.0, -1))
    assert LOSSES[name](s, t).dtype == plain.dtype


@pytest.mark.parametrize("name", LOSSES)
def test_without_memory(name: str) -> None:
    s, t = (torch.empty(6, 7, device="meta") for _ in range(2))
    assert LOSSES[name](s, t).is_meta
