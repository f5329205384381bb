"""Which way the divergence looks: forward, reverse, symmetric, skewed, for every target that has no zeros."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd import extension, reference
from mekd.functional import kd_loss
from mekd.linear import linear_kd_loss

N, C, TAU = 9, 12, 2.0


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = logits(0), logits(1)
PROBS = TEACHER.softmax(-1)
VALUES, INDICES = (0.9 * PROBS).topk(4)
ABSENT = INDICES.where((torch.arange(N) % 3 > 0).unsqueeze(-1) | (torch.arange(4) < 3), -1)
#: Each target, and the log-probabilities of both sides that are compared, over all classes or over buckets.
TARGETS: dict[str, tuple[dict[str, Any], Tensor, Any]] = {
    "logits": ({"logits": TEACHER}, (TEACHER / TAU).log_softmax(-1), None),
    "probs": ({"probs": PROBS}, (TEACHER / TAU).log_softmax(-1), None),
    "spread": (
        {"topk": (VALUES, INDICES)},
        (reference.fill_topk(VALUES, INDICES, C).log() / TAU).log_softmax(-1),
        None,
    ),
    "tail": (
        {"topk": (VALUES, ABSENT), "rest": "tail"}, reference.buckets(STUDENT, VALUES, ABSENT, TAU)[0], ABSENT
    ),
}  # fmt: skip


def of_student(student: Tensor, named: Tensor | None) -> Tensor:
    """log q over all classes, or over the named ones and what is left of the mass."""
    q = (student / TAU).softmax(-1)
    if named is None:
        return q.log()
    mine = q.gather(-1, named.clamp_min(0)).masked_fill(named < 0, 0.0)
    return torch.cat([mine, 1 - mine.sum(-1, keepdim=True)], -1).log()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -math.inf, 0.0).sum(-1)


def mixed(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    return (share * log_a.exp() + (1 - share) * log_b.exp()).log()


def by_hand(student: Tensor, target: str, direction: str, skew: float) -> Tensor:
    log_p, log_q = TARGETS[target][1], of_student(student, TARGETS[target][2])
    forward, reverse = kl(log_p, mixed(log_p, log_q, skew)), kl(log_q, mixed(log_q, log_p, skew))
    return TAU**2 * {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[direction]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("skew", [0.0, 0.1, 0.7])
def test_the_formula(target: str, direction: str, skew: float) -> None:
    mask = torch.arange(N) % 4 != 1
    for more in ({}, {"mask": mask}):
        ours, plain = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
        given = TARGETS[target][0]
        found = kd_loss(ours, **given, tau=TAU, direction=direction, skew=skew, reduction="none", **more)
        expected = by_hand(plain, target, direction, skew) * (mask if more else 1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-8, atol=1e-11)


def test_reverse_is_forward_with_the_sides_swapped() -> None:
    for skew in (0.0, 0.3):
        there = kd_loss(STUDENT, TEACHER, tau=TAU, direction="reverse", skew=skew)
        torch.testing.assert_close(there, kd_loss(TEACHER, STUDENT, tau=TAU, skew=skew))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_skew_takes_the_divergence_down_and_keeps_it_finite(direction: str) -> None:
    far = TEACHER.clone()
    far[:, 0] -= 3000
    found = [
        kd_loss(*((far, TEACHER) if direction == "forward" else (TEACHER, far)), direction=direction, skew=skew)
        for skew in (0.0, 0.1, 0.5, 0.9)
    ]
    assert all(a > b >= 0 for a, b in itertools.pairwise(found))
    # No more than -log of the share that is its own.
    assert found[1] <= -math.log(0.1)


@pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_near_equality_digits_are_left(direction: str, dtype: torch.dtype) -> None:
    # The part of each class is near its derivative times the gap, ten thousand times the sum: rounding would be left.
    teacher = TEACHER.to(dtype)
    student = (teacher + 1e-2 * logits(5).to(dtype)).detach()
    found = kd_loss(student, teacher, direction=direction, skew=0.1, reduction="none", impl="cpp").double()
    exact = kd_loss(student.double(), teacher.double(), direction=direction, skew=0.1, reduction="none")
    torch.testing.assert_close(found, exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("skew", [0.0, 0.1])
def test_what_a_reduction_divides_by(target: str, direction: str, skew: float) -> None:
    # As kd_loss has it, whether the op sees classes or buckets.
    how: dict[str, Any] = {"tau": TAU, "direction": direction, "skew": skew}
    given = TARGETS[target][0]
    total = kd_loss(STUDENT, **given, **how, reduction="sum")
    for reduction, divisor in (("rowmean", N), ("batchmean", N), ("mean", N * C)):
        torch.testing.assert_close(divisor * kd_loss(STUDENT, **given, **how, reduction=reduction), total)
    # Of one row, dimension 0 is that of the classes; and they may be elsewhere.
    for turned, dim, first in ((lambda x: x[0], -1, C), (lambda x: x.mT, 0, N)):
        some = {k: tuple(map(turned, v)) if k == "topk" else v if k == "rest" else turned(v) for k, v in given.items()}
        total = kd_loss(turned(STUDENT), **some, **how, dim=dim, reduction="sum")
        mean, batch = (kd_loss(turned(STUDENT), **some, **how, dim=dim, reduction=x) for x in ("mean", "batchmean"))
        torch.testing.assert_close(turned(STUDENT).numel() * mean, total)
        torch.testing.assert_close(first * batch, total)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("left_out", ["mask", "weights"])
@pytest.mark.parametrize("stray", [math.nan, math.inf])
def test_a_row_that_does_not_count_may_hold_anything(target: str, direction: str, left_out: str, stray: float) -> None:
    on = torch.arange(N) % 4 != 1
    how: dict[str, Any] = {"tau": TAU, "direction": direction, left_out: on if left_out == "mask" else on.double()}
    given = TARGETS[target][0]
    clean, dirty = STUDENT.clone().requires_grad_(), STUDENT.clone()
    expected = kd_loss(clean, **given, **how)
    expected.backward()
    dirty[~on] = stray
    dirty.requires_grad_()
    spoilt = {
        k: (v[0].where(on[:, None], stray), v[1].where(on[:, None], 10**9)) if k == "topk"
        else v if k == "rest" else v.where(on[:, None], stray)
        for k, v in given.items()
    }  # fmt: skip
    found = kd_loss(dirty, **spoilt, **how)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dirty.grad, clean.grad)


@pytest.mark.parametrize("target", ["logits", "probs", "spread"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_of_a_layer_whose_logits_are_not_there(target: str, direction: str) -> None:
    hidden, weight = logits(7)[:, :5].clone().requires_grad_(), torch.randn(C, 5, dtype=torch.float64)
    how = {**TARGETS[target][0], "tau": TAU, "direction": direction, "skew": torch.tensor(0.2)}
    ours, plain = linear_kd_loss(hidden, weight, **how), kd_loss(F.linear(hidden, weight), **how)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (ours, plain)))


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("tau", [TAU, torch.tensor(TAU)])
def test_a_temperature_of_the_teacher_s_own(tau: float | Tensor, direction: str) -> None:
    how: dict[str, Any] = {"tau": tau, "direction": direction}
    warmer = TEACHER * TAU / 5.0
    expected = kd_loss(STUDENT, warmer, **how)
    torch.testing.assert_close(kd_loss(STUDENT, TEACHER, tau_teacher=5.0, **how), expected)
    torch.testing.assert_close(kd_loss(STUDENT, probs=PROBS, tau_teacher=5.0, **how), expected)
    if direction != "symmetric":
        hidden, weight, bias = logits(7)[:, :5], torch.randn(C, 5, dtype=torch.float64), logits(8)[0]
        head = logits(9)[:, :4], torch.randn(C, 4, dtype=torch.float64), logits(6)[0]
        ours = linear_kd_loss(hidden, weight, bias, teacher=head, tau_teacher=5.0, **how)
        theirs = kd_loss(F.linear(hidden, weight, bias), F.linear(*head), tau_teacher=5.0, **how)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"direction": "backward"}, "direction is 'backward'; it must be one of 'forward', 'reverse', 'symmetric'"),
        ({"tau_teacher": 0.0}, "tau_teacher is 0.0; it must be above 0"),
        (
            {"logits": None, "topk": (VALUES, INDICES), "tau_teacher": 2.0},
            "tau_teacher is given without logits or probs",
        ),
        ({"tau": torch.tensor(2.0, requires_grad=True)}, "tau requires grad, which the losses do not give"),
        ({"skew": 1.0}, "skew is 1.0; it must be at least 0 and below 1"),
        ({"skew": -0.1}, "skew is -0.1"),
        ({"logits": None, "labels": torch.zeros(N, dtype=torch.long), "direction": "reverse"}, "'reverse' .* labels"),
        (
            {"logits": None, "labels": torch.zeros(N, dtype=torch.long), "direction": "symmetric"},
            "'symmetric' and skew",
        ),
        ({"logits": None, "topk": (VALUES, INDICES), "rest": "drop", "skew": 0.1}, "skew 0.1 with topk with rest='dr"),
        ({"logits": None, "probs": 2 * PROBS, "direction": "reverse"}, "probs sum to 2; a row of probabilities sums"),
        ({"logits": None, "topk": (VALUES, INDICES + C), "direction": "reverse"}, "topk indices hold"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kd_loss(STUDENT, **{"logits": TEACHER, **arguments})


def test_a_layer_takes_no_tail_in_reverse() -> None:
    with pytest.raises(ValueError, match="takes all logits: use kd_loss"):
        linear_kd_loss(STUDENT, torch.eye(C).double(), topk=(VALUES, INDICES), rest="tail", direction="reverse")
