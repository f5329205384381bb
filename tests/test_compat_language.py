"""The losses of ModelOpt, torchtune, TRL and Liger's functions, each against its formula in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.compat import liger, modelopt, torchtune, trl
from test_compat import GAPS, agree, pair, reduced

ROWS: list[tuple[int, ...]] = [
    # Words of a batch, in one line.
    (6, 7),
    # Sentences: B, T and C all differ.
    (3, 4, 11),
    # A small vocabulary, an odd number of words.
    (2, 1001),
]


def labels_of(shape: tuple[int, ...], counting: str) -> Tensor:
    """Labels (...), of which all, some or none count."""
    labels = torch.arange(math.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]
    return {"all": labels, "some": labels.where(labels % 3 != 1, -100), "none": torch.full_like(labels, -100)}[counting]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return p * (log_p - log_q).masked_fill(p == 0, 0.0)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("shape", ROWS)
def test_modelopt(shape: tuple[int, ...], reduction: str, gap: float) -> None:
    def formula(s: Tensor, t: Tensor) -> Tensor:
        losses = 9 * kl((t / 3).log_softmax(-1), (s / 3).log_softmax(-1))
        return losses.sum(-1) if reduction == "none" else reduced(losses, reduction)

    student, teacher = pair(shape, gap)
    agree(modelopt.LogitsDistillationLoss(3.0, reduction), formula, student, teacher)
    teacher.requires_grad_()  # cut, not refused, as in the original
    modelopt.LogitsDistillationLoss(3.0, reduction)(student, teacher)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("counting", ["all", "some", "none"])
@pytest.mark.parametrize("shape", ROWS)
def test_torchtune(shape: tuple[int, ...], counting: str, normalize: bool) -> None:
    labels = labels_of(shape, counting)
    mask = labels != -100

    def over(losses: Tensor) -> Tensor:
        total = (losses * mask).sum()
        return total / mask.sum().clamp_min(1) if normalize else total

    def forward(s: Tensor, t: Tensor) -> Tensor:
        return over(-(t.softmax(-1) * s.log_softmax(-1)).sum(-1))

    def reverse(s: Tensor, t: Tensor) -> Tensor:
        return over(kl(s.log_softmax(-1), t.log_softmax(-1)).sum(-1))

    formulas = {
        torchtune.ForwardKLLoss(): forward,
        torchtune.ReverseKLLoss(): reverse,
        torchtune.SymmetricKLLoss(0.3): lambda s, t: 0.3 * forward(s, t) + 0.7 * reverse(s, t),
    }
    student, teacher = pair(shape)
    for loss, formula in formulas.items():
        if counting == "none":
            assert loss(student, teacher, labels, normalize) == 0
        else:
            agree(lambda s, t, loss=loss: loss(s, t, labels, normalize), formula, student, teacher)
    half = torchtune.ForwardKLLoss()(student.bfloat16(), teacher.bfloat16(), labels, normalize)
    assert half.dtype == torch.float32


def test_torchtune_leaves_out_classes_of_infinite_student_logits() -> None:
    student, teacher = pair((6, 7))
    student[:, 2] = -math.inf
    labels = labels_of((6, 7), "all")
    left = torch.arange(7) != 2
    expected = -(teacher.softmax(-1)[:, left] * student.log_softmax(-1)[:, left]).sum(-1).mean()
    torch.testing.assert_close(torchtune.ForwardKLLoss()(student, teacher, labels), expected)
    teacher[:, 2] = -math.inf
    reverse = kl(student[:, left].log_softmax(-1), teacher[:, left].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(torchtune.ReverseKLLoss()(student, teacher, labels), reverse)


def test_torchtune_takes_labels_of_any_shape() -> None:
    student, teacher = pair((1, 3, 5))
    for loss in (torchtune.ForwardKLLoss(), torchtune.ReverseKLLoss(), torchtune.SymmetricKLLoss()):
        labels = torch.tensor([0, -100, 2])
        assert torch.equal(loss(student, teacher, labels), loss(student, teacher, labels.reshape(1, 3)))
        with pytest.raises(ValueError, match=r"labels have shape \(2,\); they must be \(1, 3\), one for each row"):
            loss(student, teacher, labels[:2])


def test_torchtune_refuses_a_ratio_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"sym_kd_ratio is 1\.1; it must lie between 0 and 1"):
        torchtune.SymmetricKLLoss(1.1)


@pytest.mark.parametrize("counting", ["none given", "all", "some", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("how", ["batchmean", "sum", "mean", "none", 5, "tensor"])
@pytest.mark.parametrize("shape", ROWS)
def test_trl(shape: tuple[int, ...], how: Any, beta: float, counting: str) -> None:
    labels = None if counting == "none given" else labels_of(shape, counting)
    count = torch.tensor(5.0) if how == "tensor" else how if how == 5 else None
    reduction = how if count is None else "batchmean"

    def formula(s: Tensor, t: Tensor) -> Tensor:
        log_q, log_p = (s / 2).log_softmax(-1), (t / 2).log_softmax(-1)
        if beta in (0, 1):
            losses = kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
        else:
            log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
            losses = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        if labels is not None:
            losses = losses[labels != -100]
        if count is not None:
            return losses.sum() / 5
        if reduction == "batchmean":
            return losses.sum() / max(len(losses), 1)
        return losses if reduction == "none" else reduced(losses, reduction)

    student, teacher = pair(shape)
    if counting == "none":
        found = trl.generalized_jsd_loss(student, teacher, labels, beta, 2.0, reduction, count)
        assert found.numel() == 0 if reduction == "none" and count is None else found == 0
        return
    agree(lambda s, t: trl.generalized_jsd_loss(s, t, labels, beta, 2.0, reduction, count), formula, student, teacher)


@pytest.mark.parametrize("counting", ["all", "some"])
def test_liger_functions(counting: str) -> None:
    student, teacher = pair((6, 7))
    log_q, log_p, labels = student.log_softmax(1), teacher.log_softmax(1), labels_of((6, 7), counting)
    assert torch.equal(liger.liger_jsd(log_q, log_p, labels, 0.3), liger.LigerJSD(0.3)(log_q, log_p, labels))
    module = liger.LigerKLDIVLoss(reduction="sum")
    assert torch.equal(liger.liger_kl_div(log_q, log_p.exp(), reduction="sum"), module(log_q, log_p.exp()))
    generator = torch.Generator().manual_seed(3)
    layers = [torch.randn(*size, generator=generator) for size in ((6, 5), (7, 5), (6, 4), (7, 4))]

    def unfused(*parts: Tensor) -> Tensor:
        ours, theirs = F.linear(*parts[:2]) / 2, F.linear(*parts[2:]) / 2
        log_q, log_p = ours.log_softmax(1), theirs.log_softmax(1)
        log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
        losses = (0.3 * kl(log_p, log_m) + 0.7 * kl(log_q, log_m)).sum(1)
        return losses[labels != -100].mean()

    agree(lambda *parts: liger.liger_fused_linear_jsd(*parts, labels, 0.3, temperature=2.0), unfused, *layers)
    with pytest.raises(ValueError, match=r"shift_labels have shape \(5,\); it must be \(6,\)"):
        liger.liger_fused_linear_jsd(*layers, labels[:5])
