"""kd_loss at its edges: nothing to learn, masked classes, gaps that underflow, hardly any difference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kl_formula import IGNORED, KINDS, close, kl_rows, log_softmax, make, softmax
from mekd.functional import kd_loss

NEG_INF = float("-inf")
#: DESIGN section 6: what a float32 result may be off by where nothing else is known of it.
FLOAT32_ERROR = 2.0**-22


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
@pytest.mark.parametrize(
    "lead",
    [
        # A last batch without a row.
        (0,),
        # Sequences of length 0.
        (2, 0),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_costs_nothing(kind: str, lead: tuple[int, ...], reduction: str) -> None:
    student, target, _, _ = make(kind, tau=3.0, lead=lead)
    student.requires_grad_()
    loss = kd_loss(student, **target, tau=3.0, reduction=reduction)
    if reduction == "none":
        assert loss.shape == lead
        loss = loss.sum()
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad is not None and student.grad.shape == (*lead, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_leaves_nothing_to_learn(kind: str) -> None:
    student, target, _, _ = make(kind, tau=3.0, num_classes=1)
    student.requires_grad_()
    loss = kd_loss(student, **target, tau=3.0, reduction="none")
    loss.sum().backward()
    assert student.grad is not None
    close(loss, np.zeros(6))
    close(student.grad, np.zeros((6, 1)))


def test_a_batch_of_ignored_rows_costs_nothing() -> None:
    student = make("labels", 1.0)[0].requires_grad_()
    loss = kd_loss(student, labels=torch.full((6,), IGNORED), reduction="batchmean")
    loss.backward()
    assert student.grad is not None
    assert loss.item() == 0.0
    assert not student.grad.any()


@pytest.mark.parametrize(
    ("own_mask", "teacher_mask"),
    [
        # The teacher rules a class out, the student does not know: 0 log 0.
        ([], [2]),
        # Both mask the same classes: 0 * (-inf - -inf), in the value and in the gradient.
        ([0, 2], [0, 2]),
        # The teacher masks more than the student.
        ([4], [1, 4]),
        # One class is left: both are certain.
        ([0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("kind", ["logits", "probs", "drop"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_logits(kind: str, own_mask: list[int], teacher_mask: list[int], dtype: torch.dtype) -> None:
    student, target, _, _ = make("logits", 2.0, num_classes=5, dtype=dtype)
    teacher = target["logits"].index_fill(1, torch.tensor(teacher_mask, dtype=torch.int64), NEG_INF)
    student = student.index_fill(1, torch.tensor(own_mask, dtype=torch.int64), NEG_INF).requires_grad_()
    probs = teacher.softmax(-1)
    answer = {
        "logits": {"logits": teacher},
        "probs": {"probs": probs},
        "drop": {"topk": probs.topk(5 - len(teacher_mask)), "rest": "drop"},
    }[kind]
    losses = kd_loss(student, **answer, tau=2.0, reduction="none", scale="one")
    losses.sum().backward()

    known = [c for c in range(5) if c not in own_mask]
    p = softmax(teacher.double().numpy() / 2.0)
    exact = student.detach().double().numpy()[:, known]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    close(losses, kl_rows(p[:, known], exact, 2.0), **tolerance)
    gradient = np.zeros_like(p)
    gradient[:, known] = (softmax(exact / 2.0) - p[:, known]) / 2.0
    assert student.grad is not None
    close(student.grad, gradient, **tolerance)


def test_a_student_that_rules_out_the_truth_is_infinitely_wrong() -> None:
    student = torch.tensor([[NEG_INF, 0.0, 1.0]])
    assert kd_loss(student, torch.zeros(1, 3)).item() == float("inf")
    assert kd_loss(student, labels=torch.tensor([0])).item() == float("inf")


def test_masked_logits_beside_labels() -> None:
    student = torch.tensor([[NEG_INF, 0.5, 1.0], [NEG_INF, 2.0, 1.0]], requires_grad=True)
    # The ignored row's stand-in class must not be looked up as a loss of inf.
    loss = kd_loss(student, labels=torch.tensor([2, IGNORED]))
    loss.backward()
    assert student.grad is not None
    q = softmax(np.array([0.5, 1.0]))
    close(loss, -np.log(q[1]), rtol=1e-6)
    close(student.grad, np.array([[0, q[0], q[1] - 1], [0, 0, 0]]), rtol=1e-6, atol=1e-7)


def test_zero_log_zero() -> None:
    student = torch.tensor([[1.0, 2.0, 3.0], [3000.0, -3000.0, 0.0]], requires_grad=True)
    probs = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    losses = kd_loss(student, probs=probs, reduction="none")
    losses.sum().backward()
    exact = student.detach().double().numpy()
    assert student.grad is not None
    close(losses, kl_rows(probs.double().numpy(), exact, 1.0), atol=1e-6)
    close(student.grad, softmax(exact) - probs.double().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        # The student is sure of the wrong class.
        ([600.0, 0.0, 0.0], [0.0, 600.0, 0.0]),
        # The teacher is sure, the student cannot decide.
        ([0.0, 0.0, 0.0], [-600.0, 600.0, -600.0]),
        # The student is sure, the teacher cannot decide: q underflows to 0.
        ([600.0, 0.0, -600.0], [0.0, 0.1, 0.2]),
        # Both are sure of the same class.
        ([600.0, 0.0, -600.0], [599.0, 0.0, -600.0]),
    ],
)
@pytest.mark.parametrize(
    "tau",
    [
        # The gaps as they are.
        1.0,
        # Twice as wide: exp underflows in float64 too.
        0.5,
        # The paper's.
        5.0,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaps_of_600(student: list[float], teacher: list[float], tau: float, dtype: torch.dtype) -> None:
    s = torch.tensor([student], dtype=dtype, requires_grad=True)
    t = torch.tensor([teacher], dtype=dtype)
    loss = kd_loss(s, t, tau=tau, scale="one")
    loss.backward()
    exact_s, exact_t = s.detach().double().numpy(), t.double().numpy()
    # log p as such: p is 0 in float64 where log p is -1200.
    log_p, log_q = log_softmax(exact_t / tau), log_softmax(exact_s / tau)
    wanted = (np.exp(log_p) * (log_p - log_q)).sum(-1)[0]
    assert s.grad is not None
    np.testing.assert_allclose(loss.item(), wanted, rtol=FLOAT32_ERROR, atol=FLOAT32_ERROR)
    close(s.grad, (np.exp(log_q) - np.exp(log_p)) / tau, atol=FLOAT32_ERROR)


def test_gaps_of_600_beside_labels_and_probabilities() -> None:
    student = torch.tensor([[600.0, 0.0, -600.0]], requires_grad=True)
    by_label = kd_loss(student, labels=torch.tensor([2]))
    by_probs = kd_loss(student, probs=torch.tensor([[0.0, 0.0, 1.0]]))
    by_topk = kd_loss(student, topk=(torch.tensor([[1.0]]), torch.tensor([[2]])))
    for loss in (by_label, by_probs, by_topk):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 1200.0
        torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0, -1.0]]))


@pytest.mark.parametrize(
    ("spread", "offset"),
    [
        # A student at the end of its training: the KL is the small difference of large terms.
        (3.0, 0.0),
        # All classes alike, p = 1 / C: so is every term of the sum.
        (1e-3, 0.0),
        # The same far from 0, where float32 has few digits left behind the point.
        (1e-3, 1000.0),
    ],
)
@pytest.mark.parametrize("noise", [1e-2, 1e-3])
def test_near_equal_logits_in_float32(spread: float, offset: float, noise: float) -> None:
    random = np.random.default_rng(3)
    teacher = torch.from_numpy(offset + spread * random.standard_normal((8, 100))).float()
    student = teacher + torch.from_numpy(noise * random.standard_normal((8, 100))).float()
    student.requires_grad_()
    losses = kd_loss(student, teacher, reduction="none")
    losses.sum().backward()
    exact, p = student.detach().double().numpy(), softmax(teacher.double().numpy())
    wanted = kl_rows(p, exact, 1.0)
    assert student.grad is not None
    # What plain float32 arithmetic loses bounds what may be lost.
    plain = student.detach().clone().requires_grad_()
    eager = F.kl_div(plain.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    eager.sum().backward()
    assert plain.grad is not None
    for got, plainly, exactly in ((losses, eager, wanted), (student.grad, plain.grad, softmax(exact) - p)):
        allowed = 2 * np.abs(plainly.detach().double().numpy() - exactly).max() + FLOAT32_ERROR
        assert np.abs(got.detach().double().numpy() - exactly).max() <= allowed


def test_near_equal_logits_in_float64() -> None:
    teacher = torch.from_numpy(np.random.default_rng(4).standard_normal((8, 100)))
    step = torch.from_numpy(np.random.default_rng(5).standard_normal((8, 100)))
    p = softmax(teacher.numpy())
    # The second-order expansion of the KL, exact to 1e-12 here: half the variance of the step under p.
    mean = (p * step.numpy()).sum(-1, keepdims=True)
    wanted = 0.5 * (p * (step.numpy() - mean) ** 2).sum(-1) * 1e-8
    close(kd_loss(teacher + 1e-4 * step, teacher, reduction="none"), wanted, rtol=1e-3)
