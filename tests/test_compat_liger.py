"""mekd.compat.liger: losses of log-probabilities, with gradients with respect to these."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.compat.liger import LigerJSD, LigerKLDIVLoss
from test_compat import GAPS, agree, pair, reduced

SHAPES = [
    # The usual batch.
    (6, 7),
    # One row of the fewest classes that can disagree.
    (1, 2),
    # A small vocabulary, an odd number of words.
    (4, 1001),
]
BETAS = [
    # The limits: KL(p || q) and KL(q || p).
    0.0,
    1.0,
    # The symmetric one.
    0.5,
    # One that tells beta from 1 - beta.
    0.1,
]


def log_pair(shape: tuple[int, int], gap: float = 0.0) -> tuple[Tensor, Tensor]:
    """log q and log p in float32; log q does not sum to one, as an input by itself need not."""
    student, teacher = pair(shape, gap)
    if gap:
        # Somewhere they disagree: by logits of 1200 of the one side, where the other side is sure.
        student[:, 0], teacher[:, 0] = gap, -gap
        student[:, 1], teacher[:, 1] = -gap, gap
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    return (log_q if gap else log_q + 0.1 * student.sin()), log_p


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_the_formula(shape: tuple[int, int], log_target: bool, reduction: str, gap: float) -> None:
    log_q, log_p = log_pair(shape, gap)

    def formula(log_q: Tensor, target: Tensor) -> Tensor:
        p = target.exp() if log_target else target
        return reduced(p * ((target if log_target else p.clamp(min=1e-10).log()) - log_q), reduction)

    loss = LigerKLDIVLoss(reduction=reduction, log_target=log_target)
    agree(loss, formula, log_q, log_p if log_target else log_p.exp())


@pytest.mark.parametrize(
    "eps",
    [
        # Larger than half of the probabilities: it counts inside the logarithm, not outside.
        0.1,
        # The logarithm of every probability is 0.
        1.0,
    ],
)
def test_eps_is_a_floor_inside_the_logarithm(eps: float) -> None:
    log_q, log_p = log_pair((6, 7))
    agree(
        LigerKLDIVLoss(eps, reduction="sum"),
        lambda q, p: (p * (torch.where(p < eps, eps, p).log() - q)).sum(),
        log_q,
        log_p.exp(),
    )
    # With log-probabilities there is nothing to protect.
    agree(
        LigerKLDIVLoss(eps, reduction="sum", log_target=True),
        lambda q, p: (p.exp() * (p - q)).sum(),
        log_q,
        log_p,
    )


def test_the_legacy_arguments_are_those_of_torch() -> None:
    assert LigerKLDIVLoss().reduction == "mean"
    with pytest.warns(UserWarning, match="deprecated"):
        assert LigerKLDIVLoss(1e-10, False).reduction == "sum"
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        LigerKLDIVLoss(reduction="avg")


def divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence of every row."""
    q, p = log_q.exp(), log_p.exp()
    if beta in (0, 1):
        return (p * (log_p - log_q) if beta == 0 else q * (log_q - log_p)).sum(1)
    # log m through the larger of its terms: m itself is 0 where both are.
    top = torch.maximum(log_p, log_q).detach()
    log_m = top + (beta * (log_p - top).exp() + (1 - beta) * (log_q - top).exp()).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(1)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_jsd_is_the_formula(shape: tuple[int, int], beta: float, gap: float) -> None:
    agree(LigerJSD(beta), lambda q, p: divergence(q, p, beta).mean(), *log_pair(shape, gap))


@pytest.mark.parametrize("ignored", [-100, 3])
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_leaves_out_ignored_rows(beta: float, ignored: int) -> None:
    # Labels are only compared with the ignored one, which may be a class; others are in and out of the classes.
    labels = torch.tensor([0, ignored, 6, 1000, ignored, -1])
    log_q, log_p = log_pair((6, 7))
    # Padding may hold anything.
    log_q[1], log_p[4] = math.nan, math.inf
    kept = labels != ignored
    loss = LigerJSD(beta, ignored)
    agree(lambda q, p: loss(q, p, labels), lambda q, p: divergence(q[kept], p[kept], beta).sum() / 4, log_q, log_p)
    agree(
        lambda q, p: loss(q, p, labels.int()), lambda q, p: divergence(q[kept], p[kept], beta).sum() / 4, log_q, log_p
    )


def test_jsd_of_ignored_rows_alone_is_zero() -> None:
    log_q, log_p = log_pair((6, 7))
    loss = LigerJSD()(log_q.requires_grad_(), log_p, torch.full((6,), -100))
    loss.backward()
    assert loss.item() == 0
    assert log_q.grad is not None and log_q.grad.abs().sum() == 0


def test_the_chain_to_the_logits_is_the_callers() -> None:
    student, teacher = pair((6, 7))
    agree(
        lambda s, t: LigerJSD(0.3)(F.log_softmax(s, 1), F.log_softmax(t, 1)),
        lambda s, t: divergence(F.log_softmax(s, 1), F.log_softmax(t, 1), 0.3).mean(),
        student,
        teacher,
    )


LOSSES = [
    LigerJSD(),
    LigerKLDIVLoss(),
    # The two that do not go the same way.
    LigerKLDIVLoss(log_target=True),
    LigerKLDIVLoss(log_target=True, reduction="none"),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teachers_side_gets_no_gradient(loss: torch.nn.Module) -> None:
    log_q, log_p = (x.requires_grad_() for x in log_pair((6, 7)))
    loss(log_q, log_p).sum().backward()
    assert log_q.grad is not None and log_p.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_a_class_that_both_rule_out_counts_nothing(loss: torch.nn.Module) -> None:
    # -inf - -inf, and 0 times it, are NaN if they are written down.
    log_q, log_p = log_pair((6, 7))
    log_q[:, 2] = log_p[:, 2] = -math.inf
    target = log_p if isinstance(loss, LigerJSD) or loss.log_target else log_p.exp()
    got = loss(log_q.requires_grad_(), target)
    got.sum().backward()
    assert got.isfinite().all()
    assert log_q.grad is not None and log_q.grad.isfinite().all() and log_q.grad[:, 2].abs().sum() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_other_shapes_are_refused(loss: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"has shape \(2, 3, 7\); it must be \(N, C\)"):
        loss(*pair((2, 3, 7)))
    with pytest.raises(ValueError, match=r"\(6, 7\)"):
        loss(pair((6, 7))[0], pair((6, 8))[1])


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shift_labels have shape \(2, 3\); it must be \(6,\)"):
        LigerJSD()(*log_pair((6, 7)), torch.zeros(2, 3, dtype=torch.int64))
