"""logit_standardized_kd_loss against the formula: (x - mean) / (1e-7 + std) of each row, then kd_loss."""

import math

import pytest
import torch

from mekd.functional import kd_loss, logit_standardized_kd_loss


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return 3 * torch.randn(5, 7, generator=random), 3 * torch.randn(5, 7, generator=random)


def plain(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))


def test_value_and_gradient(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    student.requires_grad_()
    got = logit_standardized_kd_loss(student, teacher, tau=2.0)
    (grad,) = torch.autograd.grad(got, student)
    expected = kd_loss(plain(student), plain(teacher), tau=2.0, impl="reference")
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, student)[0])


def test_a_masked_class_is_as_if_it_were_not_there(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    kept = [0, 1, 3, 4, 6]
    student, teacher = (x.clone() for x in logits)
    student[:, [2, 5]] = teacher[:, [2, 5]] = -math.inf
    student.requires_grad_()
    got = logit_standardized_kd_loss(student, teacher)
    (grad,) = torch.autograd.grad(got, student)
    few = logits[0][:, kept].requires_grad_()
    expected = logit_standardized_kd_loss(few, logits[1][:, kept])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grad[:, kept], torch.autograd.grad(expected, few)[0])
    assert (grad[:, [2, 5]] == 0).all()


@pytest.mark.parametrize("stray", [math.nan, math.inf])
@pytest.mark.parametrize("left_out", ["mask", "weights"])
def test_a_row_that_does_not_count_may_hold_anything(
    logits: tuple[torch.Tensor, torch.Tensor], left_out: str, stray: float
) -> None:
    on = torch.tensor([True, False, True, True, False])
    how = {left_out: on if left_out == "mask" else on.float(), "reduction": "sum"}
    clean, teacher = logits[0].clone().requires_grad_(), logits[1]
    expected = logit_standardized_kd_loss(clean, teacher, **how)  # type: ignore[arg-type]
    expected.backward()
    dirty = logits[0].clone()
    dirty[~on] = stray
    dirty.requires_grad_()
    found = logit_standardized_kd_loss(dirty, teacher.where(on[:, None], stray), **how)  # type: ignore[arg-type]
    found.backward()
    assert torch.equal(found, expected) and clean.grad is not None and dirty.grad is not None
    assert torch.equal(dirty.grad, clean.grad)


def test_equal_logits_have_a_loss_and_a_slope(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student = torch.zeros(2, 7, requires_grad=True)
    logit_standardized_kd_loss(student, logits[1][:2]).backward()
    assert student.grad is not None and student.grad.isfinite().all()
