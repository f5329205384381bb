"""What a reduction divides by: "batchmean" and "mean" as F.kl_div does, "rowmean" by the rows that count."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from mekd import functional
from mekd.compat import mdistiller, timm
from mekd.compat.repdistiller import DistillKL
from op_grid import DEVICES, GAN_KINDS, IMPLS, KINDS, ROW_KINDS, check, make, result

TAU = 3.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        # A batch of images.
        ((6, 7), -1),
        # Dense predictions: the batch, not the pixels.
        ((2, 7, 3, 5), 1),
        # Tokens of a language model.
        ((2, 4, 7), -1),
        # One row alone: F.kl_div has no other dimension 0 than its classes.
        ((7,), -1),
    ],
)
# torch warns that its "mean" divides by all elements, which is what is held against here.
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_as_kl_div_does(shape: tuple[int, ...], dim: int, impl: str) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(shape, device=DEVICES[impl]) for _ in range(2))
    for reduction in ("batchmean", "mean", "sum"):
        a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
        loss = functional.kd_loss(a, teacher, tau=TAU, dim=dim, reduction=reduction, impl=impl)
        wanted = TAU**2 * F.kl_div(
            (b / TAU).log_softmax(dim), (teacher / TAU).log_softmax(dim), log_target=True, reduction=reduction
        )
        torch.testing.assert_close(loss, wanted)
        loss.backward(), wanted.backward()
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_what_counts_and_what_does_not(kind: str, impl: str) -> None:
    # 6 rows of 2 samples, of which 3 count and one of those has no weight: sum / 3, sum / 2 and sum / all elements.
    device = DEVICES[impl]
    mask = torch.tensor([[True, False, True], [False, True, False]], device=device)
    weights = torch.tensor([[0.5, 2.0, 0.0], [1.0, 3.0, 1.0]], device=device)
    problem = make(kind, (2, 3, 7), device=device, mask=mask, weights=weights)
    whole = result(problem, impl, "sum")
    for reduction, divisor in (("rowmean", 3), ("batchmean", 2), ("mean", 42)):
        loss, grad = check(problem, impl, reduction)
        torch.testing.assert_close([divisor * loss, divisor * grad], whole)
    nobody = torch.zeros_like(mask)
    assert not check(make(kind, (2, 3, 7), device=device, mask=nobody), impl, "rowmean")[0]
    for reduction in ("rowmean", "batchmean"):
        for shape in ((0, 7), (3, 0, 7)):
            assert not check(make(kind, shape, device=device), impl, reduction)[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_discriminator_of_patches_has_images_to_divide_by(impl: str) -> None:
    problem = make("gan-label", (12, 7), device=DEVICES[impl])
    problem.students = [problem.students[0].reshape(3, 1, 2, 2)]
    (total, _), (mean, _), (batch, _) = (result(problem, impl, name) for name in ("sum", "mean", "batchmean"))
    torch.testing.assert_close(total, 12 * mean)
    torch.testing.assert_close(total, 3 * batch)


def test_rowmean_is_the_default_where_there_are_rows() -> None:
    for name in ("kd_loss", "dkd_loss", "jsd_loss"):
        assert inspect.signature(getattr(functional, name)).parameters["reduction"].default == "rowmean"
    for kind in KINDS:
        problem = make(kind)
        if kind in ROW_KINDS:
            assert torch.equal(problem.loss(), problem.loss(reduction="rowmean"))
        else:
            with pytest.raises(ValueError, match="reduction is 'rowmean'"):
                students = [x * 1 for x in problem.students]
                problem.loss(*students, reduction="rowmean")
            assert kind in GAN_KINDS or torch.equal(problem.loss(), problem.loss(reduction="mean"))
    s, t = torch.randn(4, 3, 7), torch.randn(4, 3, 7)
    standardized = functional.logit_standardized_kd_loss
    torch.testing.assert_close(standardized(s, t, reduction="batchmean"), 3 * standardized(s, t))


def test_other_libraries_divide_dense_predictions_by_theirs() -> None:
    torch.manual_seed(1)
    s, t = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    total = functional.kd_loss(s, t, tau=TAU, dim=1, reduction="sum")
    torch.testing.assert_close(DistillKL(TAU)(s, t), total / 2)
    torch.testing.assert_close(mdistiller.kd_loss(s, t, TAU), total / (2 * 3 * 4))
    torch.testing.assert_close(timm.kd_loss(s.movedim(1, -1), t.movedim(1, -1), TAU), total / 2)


@pytest.mark.parametrize("kind", ["logits", "labels", "spread", "dkd", "jsd"])
def test_a_compiled_batch_of_another_size_has_another_divisor(kind: str) -> None:
    loss = torch.compile(lambda p, s: p.loss(s, reduction="batchmean"), fullgraph=True, dynamic=True, backend="eager")
    for batch in (2, 5):
        problem = make(kind, (batch, 3, 7))
        torch.testing.assert_close(loss(problem, problem.students[0]), problem.loss(reduction="sum") / batch)
