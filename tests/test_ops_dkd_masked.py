"""An empty remainder: nothing left beside the target, no second class, rows that weigh nothing. Nowhere is it 0 / 0."""

import pytest
import torch

from mekd.functional import dkd_loss, jsd_loss, kd_loss, logit_standardized_kd_loss
from op_grid import DEVICES, IMPLS, ROW_KINDS, Problem, check, make, result

INF = float("inf")
DTYPES = [torch.float32, torch.float64]


def loss_and_grad(student: list[list[float]], teacher: list[list[float]], labels: list[int], impl: str,
                  dtype: torch.dtype, **options: float) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    device = DEVICES[impl]
    s = torch.tensor(student, dtype=dtype, device=device, requires_grad=True)
    t = torch.tensor(teacher, dtype=dtype, device=device)
    y = torch.tensor(labels, device=device)
    loss = dkd_loss(s, t, y, tau=1.0, reduction="none", impl=impl, **options)
    (grad,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach().cpu(), grad.cpu()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_teacher_that_leaves_the_target_alone(dtype: torch.dtype, impl: str) -> None:
    student, teacher = [[1.0, 0.5, 0.0], [0.0, 2.0, 1.0]], [[2.0, -INF, -INF], [1.0, 0.0, -1.0]]
    for alpha, beta in ((1.0, 8.0), (1.0, 0.0), (2.0, 1.0)):
        loss, grad = loss_and_grad(student, teacher, [0, 1], impl, dtype, alpha=alpha, beta=beta)
        # What is left is alpha times the cross-entropy of the target; the row beside it is what it is alone.
        q = torch.tensor(student[0], dtype=dtype).softmax(-1)
        assert loss[0].item() == pytest.approx(alpha * 0.6803, abs=1e-4 * alpha)
        torch.testing.assert_close(loss[0], -alpha * q[0].log())
        torch.testing.assert_close(grad[0], alpha * (q - torch.tensor([1.0, 0.0, 0.0], dtype=dtype)))
        other, other_grad = loss_and_grad(student[1:], teacher[1:], [1], impl, dtype, alpha=alpha, beta=beta)
        assert torch.equal(loss[1:], other) and torch.equal(grad[1:], other_grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "classes",
    [
        # One tile of the kernels.
        5,
        # Blocks of them: one is empty, or all are.
        2500,
    ],
)
def test_remainders_that_one_side_or_both_rule_out(classes: int, dtype: torch.dtype, impl: str) -> None:
    gone = [0.5] + [-INF] * (classes - 1)
    full = [0.1 * (c % 7) for c in range(classes)]
    p_miss = 1 - torch.tensor(full, dtype=dtype).softmax(-1)[0]
    # Both: nothing is left to tell apart.
    loss, grad = loss_and_grad([gone], [gone], [0], impl, dtype)
    assert loss.item() == 0 and not grad.any()
    # The student alone: it rules out what the teacher gives, which costs without end; the slope is finite.
    loss, grad = loss_and_grad([gone], [full], [0], impl, dtype, alpha=2.0)
    assert loss.item() == INF
    torch.testing.assert_close(grad[0, 0], 2 * p_miss)
    assert not grad[0, 1:].any()
    # ... and where that part weighs nothing, it costs nothing.
    loss, grad = loss_and_grad([gone], [full], [0], impl, dtype, alpha=0.0)
    assert loss.item() == 0 and not grad.any()
    # The target's own class is masked by the teacher, and by both.
    for masks in ((False, True), (True, True)):
        rows = [[-INF if hide else full[0], *full[1:]] for hide in masks]
        loss, grad = loss_and_grad(rows[:1], rows[1:], [0], impl, dtype)
        assert loss.isfinite().all() and grad.isfinite().all()
        assert (loss > 0).item() == (not masks[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_class_and_two(impl: str) -> None:
    for classes in (1, 2):
        problem = make("dkd", (4, classes), device=DEVICES[impl], beta=3.0)
        loss, grad = check(problem, impl)
        assert classes == 2 or (not loss.any() and not grad.any())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_row_of_weight_0_may_hold_anything(kind: str, impl: str) -> None:
    for filling in (float("nan"), INF, -INF):
        weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0], device=DEVICES[impl])
        clean = make(kind, device=DEVICES[impl], weights=weights)
        dirty = Problem(kind, [clean.students[0].clone()], clean.target, clean.options)
        dirty.students[0][1] = filling
        # It still is a row that counts.
        for reduction in ("none", "rowmean"):
            wanted, got = (result(problem, impl, reduction) for problem in (clean, dirty))
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
            assert not got[1][1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_distance_without_end_that_weighs_nothing(impl: str) -> None:
    problem = make("images", device=DEVICES[impl], weights=torch.tensor([0.0, 1.0, 1.0, 1.0], device=DEVICES[impl]))
    problem.students[0][0, 0, 0, 0] = INF
    loss, grad = result(problem, impl, "mean")
    assert loss.isfinite() and grad.isfinite().all() and not grad[0].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_class_that_is_left(impl: str) -> None:
    # A row of one class that is not masked: every loss is 0, with a gradient of 0.
    device = DEVICES[impl]
    x = torch.tensor([[-INF, 3.0, -INF, -INF]], device=device)
    for loss in (
        lambda s: kd_loss(s, x, impl=impl),
        lambda s: kd_loss(s, topk=(torch.ones(1, 1, device=device), torch.ones(1, 1, dtype=torch.int64, device=device)),
                          rest="drop", impl=impl),
        lambda s: jsd_loss(s, x, impl=impl),
        lambda s: logit_standardized_kd_loss(s, x, impl=impl),
        lambda s: dkd_loss(s, x, torch.tensor([1], device=device), impl=impl),
    ):  # fmt: skip
        s = x.clone().requires_grad_()
        value = loss(s)
        value.backward()
        assert value.item() == 0 and s.grad is not None and not s.grad.any()
