"""mekd.compat: each loss against its formula, written out here in float64, in value and gradient."""

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.compat import liger, mdistiller, repdistiller, timm, torchdistill

Loss = Callable[..., Tensor]

SHAPES: list[tuple[int, ...]] = [
    # The usual batch.
    (6, 7),
    # One row of the fewest classes that can disagree.
    (1, 2),
    # Many classes, an odd number of them.
    (4, 1001),
]
DENSE: list[tuple[int, ...]] = [
    # Class scores of every pixel: B, H and W all differ, so that no divisor passes for another.
    (2, 5, 3, 4),
    # Class scores of every position of a sequence.
    (3, 4, 2),
]
TAUS = [
    # No temperature.
    1.0,
    # The usual one; its square is no power of two.
    5.0,
    # An int, below which float rounding cannot hide T for T^2.
    2,
    # Sharpens instead of softening.
    0.5,
]
GAPS = [
    # Logits of an ordinary network.
    0.0,
    # Logits of +-600: softmax gives exact zeros, and the logarithm of a softmax overflows.
    600.0,
]


def pair(shape: tuple[int, ...], gap: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher in float32; with a gap each is +gap or -gap, and they agree on half of them."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    return (gap * student.sign(), gap * teacher.sign()) if gap else (student, teacher)


def kl(student: Tensor, teacher: Tensor, tau: float, dim: int = 1) -> Tensor:
    """p (log p - log q) of every class by itself, for finite logits."""
    log_q, log_p = F.log_softmax(student / tau, dim), F.log_softmax(teacher / tau, dim)
    return log_p.exp() * (log_p - log_q)


def agree(ours: Loss, formula: Loss, student: Tensor, *others: Tensor) -> None:
    """Both give the same value, and the same gradient for the student, the formula in float64."""
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    got = ours(leaf, *others)
    wanted = formula(exact, *(x.double() if x.is_floating_point() else x for x in others))
    # Upstream gradients other than 1, one for each element of the loss.
    upstream = torch.linspace(0.5, 2.0, wanted.numel(), dtype=torch.float64).reshape(wanted.shape)
    (got * upstream.to(got.dtype)).sum().backward()
    (wanted * upstream).sum().backward()
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    assert leaf.grad is not None and exact.grad is not None and exact.grad.abs().sum() > 0
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


# mdistiller, RepDistiller and timm.


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", SHAPES + DENSE)
def test_mdistiller_kd_is_the_mean_over_all_positions(shape: tuple[int, ...], tau: float, gap: float) -> None:
    agree(
        lambda s, t: mdistiller.kd_loss(s, t, tau),
        lambda s, t: kl(s, t, tau).sum(1).mean() * tau**2,
        *pair(shape, gap),
    )


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mdistiller_kd_of_standardised_logits(shape: tuple[int, ...], tau: float) -> None:
    def standardised(x: Tensor) -> Tensor:
        centred = x - x.sum(1, keepdim=True) / x.shape[1]
        return centred / (1e-7 + (centred.square().sum(1, keepdim=True) / (x.shape[1] - 1)).sqrt())

    student, teacher = pair(shape)
    if shape[1] == 2:
        # Two standardised classes are +-1 / sqrt 2, without a gradient: let them disagree and see the value alone.
        student, teacher = torch.tensor([[0.0, 3.0]]), torch.tensor([[5.0, -1.0]])
        p = torch.tensor([0.5**0.5, -(0.5**0.5)]).double()
        wanted = kl(-p[None], p[None], tau).sum() * tau**2
        got = mdistiller.kd_loss(student, teacher, tau, True)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
        return
    agree(
        lambda s, t: mdistiller.kd_loss(s, t, tau, logit_stand=True),
        lambda s, t: kl(standardised(s), standardised(t), tau).sum(1).mean() * tau**2,
        student,
        teacher,
    )


def test_mdistiller_standardises_rows_of_classes_alone() -> None:
    with pytest.raises(ValueError, match=r"logits_student has shape \(2, 5, 3, 4\).*logit_stand"):
        mdistiller.kd_loss(*pair((2, 5, 3, 4)), 2.0, logit_stand=True)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", SHAPES + DENSE)
def test_repdistiller_divides_by_the_batch_alone(shape: tuple[int, ...], tau: float, gap: float) -> None:
    agree(
        lambda s, t: repdistiller.DistillKL(tau)(s, t),
        lambda s, t: kl(s, t, tau).sum() * tau**2 / shape[0],
        *pair(shape, gap),
    )


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", SHAPES + DENSE)
def test_timm_has_its_classes_last_and_divides_by_the_batch_alone(
    shape: tuple[int, ...], tau: float, gap: float
) -> None:
    agree(
        lambda s, t: timm.kd_loss(s, t, tau),
        lambda s, t: kl(s, t, tau, -1).sum() * tau**2 / shape[0],
        *pair(shape, gap),
    )


WEIGHTS = [
    # The values of the paper.
    (1.0, 8.0),
    # Target against rest alone, and the rest alone.
    (1.0, 0.0),
    (0.0, 1.0),
    # Neither is 1.
    (0.5, 3.0),
]


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
@pytest.mark.parametrize(
    "shape",
    [
        # The usual batch.
        (6, 7),
        # The rest is one class, of which nothing is left to tell: the second part is 0.
        (5, 2),
        # The rest is the fewest classes that can disagree.
        (5, 3),
        (4, 1001),
    ],
)
def test_mdistiller_dkd(shape: tuple[int, int], alpha: float, beta: float, tau: float, gap: float) -> None:
    rows, classes = shape
    target = torch.arange(rows) * 3 % classes
    others = [[c for c in range(classes) if c != hit] for hit in target.tolist()]

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        hit_q, hit_p = (F.log_softmax(x / tau, 1)[range(rows), target] for x in (student, teacher))
        rest_q, rest_p = (torch.stack([x[c] for x, c in zip(y / tau, others, strict=True)]) for y in (student, teacher))
        miss_q, miss_p = (
            rest.logsumexp(1) - (x / tau).logsumexp(1) for rest, x in ((rest_q, student), (rest_p, teacher))
        )
        two_way = hit_p.exp() * (hit_p - hit_q) + miss_p.exp() * (miss_p - miss_q)
        within = kl(rest_q, rest_p, 1.0).sum(1)
        return (alpha * two_way + beta * within).sum() * tau**2 / rows

    student, teacher = pair(shape, gap)
    if (alpha, shape[1]) == (0.0, 2):
        student.requires_grad_()
        loss = mdistiller.dkd_loss(student, teacher, target, alpha, beta, tau)
        loss.backward()
        assert loss.item() == 0 and student.grad is not None and student.grad.abs().sum() == 0
        return
    if gap:
        # Equal logits would leave a part without a gradient in a row of few classes.
        student[:, 0], teacher[:, 0] = gap, -gap
    agree(lambda s, t: mdistiller.dkd_loss(s, t, target, alpha, beta, tau), formula, student, teacher)


def test_mdistiller_dkd_takes_a_target_of_any_shape() -> None:
    student, teacher = pair((6, 7))
    target = torch.tensor([0, 6, 3, 3, 1, 2])
    wanted = mdistiller.dkd_loss(student, teacher, target, 1.0, 8.0, 4.0)
    torch.testing.assert_close(mdistiller.dkd_loss(student, teacher, target[:, None], 1.0, 8.0, 4.0), wanted)


# torchdistill.


def hooked(ours: torchdistill.KDLoss, targets: Tensor | None = None) -> Loss:
    """The loss as a function of logits, which torchdistill's hooks would put into dictionaries."""
    return lambda s, t: ours({"head": {"output": s}}, {"fc": {"input": t}}, targets)


def torchdistill_loss(tau: float, *arguments: Any, **others: Any) -> torchdistill.KDLoss:
    return torchdistill.KDLoss("head", "output", "fc", "input", tau, *arguments, **others)


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """The reductions of nn.KLDivLoss."""
    if reduction == "none":
        return losses
    return losses.sum() / {"sum": 1, "mean": losses.numel(), "batchmean": losses.shape[0]}[reduction]


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("shape", SHAPES + DENSE)
def test_torchdistill_without_a_hard_part_has_no_factor(
    shape: tuple[int, ...], reduction: str, tau: float, gap: float
) -> None:
    agree(
        hooked(torchdistill_loss(tau, reduction=reduction)),
        lambda s, t: reduced(kl(s, t, tau), reduction),
        *pair(shape, gap),
    )


@pytest.mark.parametrize(
    ("alpha", "beta", "factor"),
    [
        # beta is the rest of alpha.
        (0.3, None, 0.7),
        # A beta of 0 is not a missing one.
        (0.3, 0.0, 0.0),
        # Two weights that do not add up to 1.
        (0.5, 2.0, 2.0),
        # Labels alone.
        (1.0, None, 0.0),
    ],
)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("shape", SHAPES + DENSE)
def test_torchdistill_with_a_hard_part(
    shape: tuple[int, ...], reduction: str, alpha: float, beta: float | None, factor: float
) -> None:
    targets = torch.arange(math.prod(shape) // shape[1]).reshape(shape[0], *shape[2:]) % shape[1]

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        hard = -F.log_softmax(student, 1).gather(1, targets.unsqueeze(1)).squeeze(1)
        hard = hard.sum() if reduction == "sum" else hard.mean()
        return alpha * hard + factor * 16 * reduced(kl(student, teacher, 4.0), reduction)

    agree(hooked(torchdistill_loss(4.0, alpha, beta, reduction), targets), formula, *pair(shape))


@pytest.mark.parametrize(
    ("alpha", "beta", "given"),
    [
        # Targets that nothing weighs.
        (None, None, True),
        (None, 0.5, True),
        # A weight of 0 takes T^2 and beta away too.
        (0, None, True),
        (0.0, 0.5, True),
        # A weight without targets.
        (0.5, 0.5, False),
    ],
)
def test_torchdistill_falls_back_on_the_plain_kl(alpha: float | None, beta: float | None, given: bool) -> None:
    targets = torch.zeros(6, dtype=torch.int64) if given else None
    agree(hooked(torchdistill_loss(4.0, alpha, beta), targets), lambda s, t: kl(s, t, 4.0).sum() / 6, *pair((6, 7)))


def test_torchdistill_hands_its_other_arguments_to_the_cross_entropy() -> None:
    weight = torch.linspace(0.5, 2.0, 7)
    targets = torch.tensor([0, 6, 3, -1, 1, 2])
    loss = torchdistill_loss(4.0, 0.5, weight=weight, ignore_index=-1, label_smoothing=0.1)

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        kept, log_q, w = targets >= 0, F.log_softmax(student, 1), weight.double()
        hard = sum(
            0.9 * w[y] * -row[y] + 0.1 / 7 * (w * -row).sum() for row, y in zip(log_q[kept], targets[kept], strict=True)
        )
        return 0.5 * hard / w[targets[kept]].sum() + 0.5 * 16 * kl(student, teacher, 4.0).sum() / 6

    agree(hooked(loss, targets), formula, *pair((6, 7)))
    # The weight moves and is saved with the loss, under the original's name.
    assert list(loss.state_dict()) == ["cross_entropy_loss.weight"]


@pytest.mark.parametrize("soft", [False, True])
def test_torchdistill_computes_both_parts_of_bfloat16_in_float32(soft: bool) -> None:
    student, teacher = (x.bfloat16() for x in pair((64, 7)))
    targets = teacher.softmax(1) if soft else teacher.argmin(1)
    for weight in (None, torch.linspace(0.5, 2.0, 7)):
        # A cast of whatever owns the loss casts the weights of the classes, as it does in the original.
        loss = torchdistill_loss(4.0, 0.5, weight=weight).bfloat16()
        exact = torchdistill_loss(4.0, 0.5, weight=None if weight is None else weight.bfloat16().double())
        got = hooked(loss, targets)(leaf := student.clone().requires_grad_(), teacher)
        wanted = hooked(exact, targets.double() if soft else targets)(student.double(), teacher.double())
        assert got.dtype == torch.bfloat16  # rounded once, as the original's is
        torch.testing.assert_close(got.detach().double(), wanted, rtol=2**-8, atol=0)
        got.backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_torchdistill_refuses_to_add_a_row_to_a_class() -> None:
    loss = hooked(torchdistill_loss(4.0, 0.5, reduction="none"), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="reduction is 'none' with alpha and targets"):
        loss(*pair((6, 7)))


def test_torchdistill_keeps_masked_classes_at_zero() -> None:
    # Both networks rule a class out: 0 (-inf - -inf) is NaN if it is written down.
    student, teacher = pair((6, 7))
    student[:, 2] = teacher[:, 2] = -math.inf
    student.requires_grad_()
    loss = hooked(torchdistill_loss(4.0, reduction="none"))(student, teacher)
    loss.sum().backward()
    assert loss.isfinite().all() and loss[:, 2].abs().sum() == 0
    assert student.grad is not None and student.grad.isfinite().all()


# What all of them have in common.

ALL: list[Loss] = [
    lambda s, t: mdistiller.kd_loss(s, t, 4.0),
    lambda s, t: mdistiller.dkd_loss(s, t, torch.zeros(6, dtype=torch.int64), 1.0, 8.0, 4.0),
    lambda s, t: repdistiller.DistillKL(4.0)(s, t),
    lambda s, t: timm.kd_loss(s, t, 4.0),
    hooked(torchdistill_loss(4.0)),
    hooked(torchdistill_loss(4.0, reduction="none")),
]


@pytest.mark.parametrize("loss", [*ALL, lambda s, t: mdistiller.kd_loss(s, t, 4.0, logit_stand=True)])
def test_a_teacher_that_wants_a_gradient_is_refused(loss: Loss) -> None:
    student, teacher = pair((6, 7))
    with pytest.raises(ValueError, match=r"requires grad.*detach"):
        loss(student, teacher.requires_grad_())


def liger_jsd(loss: Loss) -> bool:
    return "LigerJSD" in loss.__code__.co_names


@pytest.mark.parametrize(
    "loss",
    [
        *ALL,
        lambda s, t: liger.LigerKLDIVLoss()(s, t),
        lambda s, t: liger.LigerKLDIVLoss(log_target=True)(s, t),
        lambda s, t: liger.LigerJSD()(s, t),
    ],
)
def test_bfloat16_is_computed_in_float32(loss: Loss) -> None:
    student, teacher = (x.bfloat16() for x in pair((6, 7)))
    got = loss(student.requires_grad_(), teacher)
    got.sum().backward()
    exact = loss(student.float(), teacher.float())
    assert exact.dtype == torch.float32
    # Liger's KL is float32 there too.
    torch.testing.assert_close(got, exact.to(got.dtype), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # which widens softmax, and what comes after
        assert loss(student, teacher).dtype == (got.dtype if liger_jsd(loss) else torch.float32)
    assert student.grad is not None and student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("callee", "arguments"),
    [
        # logit_stand is not the original's: a fourth argument, so that calls without it mean what they meant.
        (mdistiller.kd_loss, "logits_student, logits_teacher, temperature, logit_stand=False"),
        (mdistiller.dkd_loss, "logits_student, logits_teacher, target, alpha, beta, temperature"),
        (repdistiller.DistillKL, "T"),
        (repdistiller.DistillKL.forward, "self, y_s, y_t"),
        (timm.kd_loss, "student_logits, teacher_logits, temperature=1.0"),
        (
            torchdistill.KDLoss,
            "student_module_path, student_module_io, teacher_module_path, teacher_module_io, temperature, "
            "alpha=None, beta=None, reduction='batchmean', **kwargs",
        ),
        (torchdistill.KDLoss.forward, "self, student_io_dict, teacher_io_dict, targets=None, *args, **kwargs"),
        # Behind eps are the arguments of nn.KLDivLoss.
        (liger.LigerKLDIVLoss, "eps=1e-10, size_average=None, reduce=None, reduction='mean', log_target=False"),
        (liger.LigerKLDIVLoss.forward, "self, y_pred, y_true"),
        (liger.LigerJSD, "beta=0.5, ignore_index=-100"),
        (liger.LigerJSD.forward, "self, log_q, log_p, shift_labels=None"),
    ],
)
def test_names_order_and_defaults_are_the_originals(callee: Callable[..., Any], arguments: str) -> None:
    bare = [p.replace(annotation=p.empty) for p in signature(callee).parameters.values()]
    assert ", ".join(map(str, bare)) == arguments
