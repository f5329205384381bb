"""image_l1_loss(inplace=True): the gradient lies where the student's pre-activation was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mekd.functional import image_l1_loss
from op_grid import DEVICES, IMPLS, Problem, make, truth, within


def images(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """A leaf, what a generator makes of it, and a teacher's half."""
    problem = make("in-place", (3, 2, 4, 4), dtype, device=device)
    leaf = problem.students[0].requires_grad_()
    return leaf, leaf * 1.5, problem.target["teacher"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
@pytest.mark.parametrize(
    ("tanh", "finished"),
    [
        # What the engine calls.
        (True, False),
        # The teacher's image was drawn before.
        (True, True),
        # A generator that keeps its tanh.
        (False, False),
    ],
)
def test_it_is_the_loss_out_of_place(tanh: bool, finished: bool, reduction: str, impl: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        leaf, _, b = images(dtype, DEVICES[impl])
        # Upstreams of 1, of another number, and of one for each image.
        for factor in (1.0, 3.0, torch.tensor([1.0, -2.0, 0.0], device=DEVICES[impl])):
            factor = factor if reduction == "none" or isinstance(factor, float) else 2.0
            results = []
            for inplace in (False, True):
                loss = image_l1_loss(
                    leaf * 1.5, b, tanh=tanh, finished=finished, reduction=reduction, inplace=inplace, impl=impl
                )
                results.append((loss.detach(), *torch.autograd.grad((loss * factor).sum(), leaf)))
            assert torch.equal(results[0][0], results[1][0])
            # One more rounding where the gradient is no longer 1 times what was stored.
            torch.testing.assert_close(
                results[1][1], results[0][1], rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-6, atol=0
            )


@pytest.mark.parametrize("impl", IMPLS)
def test_no_memory_of_its_size_is_taken(impl: str) -> None:
    _, a, b = images(device=DEVICES[impl])
    before, where = a.detach().clone(), a.data_ptr()
    loss = image_l1_loss(a, b, inplace=True, reduction="sum", impl=impl)
    (grad,) = torch.autograd.grad(loss, a)
    assert grad.data_ptr() == where
    wanted = torch.autograd.grad(image_l1_loss(x := before.requires_grad_(), b, reduction="sum", impl=impl), x)[0]
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_backward_raises(impl: str) -> None:
    _, a, b = images(device=DEVICES[impl])
    loss = image_l1_loss(a, b, inplace=True, impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward.*inplace=False"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_backward_raises_for_another_upstream(impl: str) -> None:
    # The first upstream was multiplied into the only copy there is.
    _, a, b = images(device=DEVICES[impl])
    loss = image_l1_loss(a, b, inplace=True, impl=impl)
    torch.autograd.grad(loss, a, torch.tensor(2.0, device=DEVICES[impl]), retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(loss, a)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_leaf_is_refused(impl: str) -> None:
    leaf, _, b = images(device=DEVICES[impl])
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match=r"student is a leaf.*inplace=True"):
        image_l1_loss(leaf, b, inplace=True, impl=impl)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("view", [lambda x: x.unsqueeze(0)[0], lambda x: x[1:], lambda x: x.flip(0)], ids=range(3))
def test_a_view_of_a_leaf_is_refused(view: Callable[[Tensor], Tensor], impl: str) -> None:
    leaf, a, b = images(device=DEVICES[impl])
    before, teacher = leaf.detach().clone(), view(b).contiguous()
    if view(leaf)._is_view():
        with pytest.raises(ValueError, match=r"student is a view of a leaf.*inplace=True"):
            image_l1_loss(view(leaf), teacher, inplace=True, impl=impl)
    else:  # a copy is nobody else's
        image_l1_loss(view(leaf), teacher, inplace=True, impl=impl).backward()
    assert torch.equal(leaf, before)
    image_l1_loss(view(a), teacher, inplace=True, impl=impl).backward()  # and so is what was computed


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_who_saved_the_pre_activation_finds_out(when: str, impl: str) -> None:
    _, a, b = images(device=DEVICES[impl])
    if when == "before":
        other = a.sin().sum()  # sin saves its input
        image_l1_loss(a, b, inplace=True, impl=impl)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
    else:
        # And so does the loss itself, where somebody else writes.
        loss = image_l1_loss(a, b, inplace=True, impl=impl)
        with torch.no_grad():
            a.mul_(2)
        with pytest.raises(RuntimeError, match="written to after"):
            loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_that_saved_its_output_finds_out(impl: str) -> None:
    # tanh's backward reads its result, which is the pre-activation here.
    leaf, _, b = images(device=DEVICES[impl])
    loss = image_l1_loss(leaf.tanh(), b, tanh=False, inplace=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_view_reaches_its_base(impl: str) -> None:
    # Convolution, then a reshape: the gradient passes through the view, and who saved the base finds out.
    leaf, a, b = images(device=DEVICES[impl])
    (wanted,) = torch.autograd.grad(image_l1_loss(leaf * 1.5, b, reduction="sum", impl=impl), leaf)
    loss = image_l1_loss(a.reshape(3, -1), b.reshape(3, -1), inplace=True, reduction="sum", impl=impl)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, retain_graph=False)[0], wanted)
    leaf, a, b = images(device=DEVICES[impl])
    other = a.sin().sum()
    image_l1_loss(a.reshape(3, -1), b.reshape(3, -1), inplace=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients_nothing_is_overwritten(impl: str) -> None:
    leaf, a, b = images(device=DEVICES[impl])
    wanted = image_l1_loss(a.detach(), b, impl=impl)
    before = a.detach().clone()
    with torch.no_grad():
        assert torch.equal(image_l1_loss(a, b, inplace=True, impl=impl), wanted)
        # A leaf too: nothing is written to it.
        assert image_l1_loss(leaf, b, inplace=True, impl=impl).isfinite()
    with torch.inference_mode():
        assert torch.equal(image_l1_loss(a, b, inplace=True, impl=impl), wanted)
    # A student that wants no gradient.
    assert torch.equal(image_l1_loss(a.detach(), b, inplace=True, impl=impl), wanted)
    assert torch.equal(a, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl: str) -> None:
    leaf, a, b = images(device=DEVICES[impl])
    loss = image_l1_loss(a, b, inplace=True, impl=impl)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_teacher_is_left_alone(impl: str) -> None:
    _, a, b = images(device=DEVICES[impl])
    before = b.clone()
    image_l1_loss(a, b, inplace=True, impl=impl).backward()
    assert torch.equal(b, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_student_that_is_its_own_teacher(impl: str) -> None:
    # Memory that is read and written at once.
    leaf, a, _ = images(device=DEVICES[impl])
    loss = image_l1_loss(a, a.detach(), inplace=True, impl=impl)
    loss.backward()
    assert loss.item() < 1e-6
    assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_layout_that_cannot_be_written_in_place_is_refused_untouched(impl: str) -> None:
    # Batch and channels swapped in memory: the samples do not lie one after another.
    problem = make("in-place", (3, 2, 4, 4), device=DEVICES[impl])
    leaf = problem.students[0].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    a = leaf * 1.5
    before = a.detach().clone()
    try:
        loss = image_l1_loss(a, problem.target["teacher"], inplace=True, reduction="sum", impl=impl)
    except ValueError as error:
        assert "student" in str(error)
        assert torch.equal(a, before)
    else:
        exact = truth(Problem("tanh", [before], problem.target, problem.options), "sum")
        (grad,) = torch.autograd.grad(loss, a)
        torch.testing.assert_close(grad.cpu().double(), exact[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("reduction", "weight"),
    [
        # The default, over as many elements as 64 colour images of 64 pixels have: 1.3e-6 a pixel.
        ("mean", 1.0),
        # A weight that makes gradients of 1e-8.
        ("sum", 1e-8),
    ],
)
def test_float16_gradients_wait_for_the_grad_scaler(reduction: str, weight: float, impl: str) -> None:
    shape = (64, 3 * 64 * 64) if reduction == "mean" else (4, 300)
    weights = torch.full(shape[:1], weight, device=DEVICES[impl])
    problem = make("in-place", shape, torch.float16, device=DEVICES[impl], weights=weights)
    leaf = problem.students[0].requires_grad_()
    (grad,) = torch.autograd.grad(65536.0 * problem.loss(leaf.clone(), reduction=reduction, impl=impl), leaf)
    exact, plain = (65536.0 * truth(problem, reduction, dtype)[1] for dtype in (torch.float64, torch.float32))
    within(grad, exact, plain, "gradient")
    # To the digits that float16 has.
    torch.testing.assert_close(grad.cpu().double(), exact, rtol=2.0**-8, atol=1e-6)
