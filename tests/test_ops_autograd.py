"""What autograd may do with a loss whose gradient was computed ahead: upstreams, second passes, second derivatives."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mekd import checks
from mekd.functional import image_l1_loss, kd_loss
from op_grid import DEVICES, GAN_KINDS, IMPLS, OF_EACH_OP, ROW_KINDS, Problem, make, result, truth, within

KINDS = [*ROW_KINDS, "tanh", "finished", "images", *GAN_KINDS]
#: One for each kind of gradient: of rows, of images, of (m,), and two of them. What
#: autograd does with them does not know the op.
GRADIENTS = ["logits", "tanh", "confidence", "discriminator"]


def leaves(problem: Problem) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in problem.students]


def none_of(kind: str) -> str:
    """A loss for each row, where there is one."""
    return "mean" if kind == "discriminator" else "none"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_upstreams(kind: str, impl: str) -> None:
    problem = make(kind, dtype=torch.float64, device=DEVICES[impl])
    exact = [x.to(DEVICES[impl]) for x in truth(problem, none_of(kind))[1:]]
    students = leaves(problem)
    loss = problem.loss(*students, reduction=none_of(kind), impl=impl)

    def grads(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value.sum(), students, retain_graph=True)

    # sum() sends one 1 with stride 0; expand sends sums of them; * a number that is not 1; each row its own.
    rows = torch.arange(1.0, loss.numel() + 1, dtype=torch.float64, device=loss.device).reshape(loss.shape)
    for value, factor in (
        (loss, torch.ones_like(rows)),
        (loss.expand(3, *loss.shape), torch.full_like(rows, 3.0)),
        (loss * -2.5, torch.full_like(rows, -2.5)),
        (loss * 0.0, torch.zeros_like(rows)),
        (loss * rows, rows),
    ):
        for got, wanted in zip(grads(value), exact, strict=True):
            per_row = factor.reshape(factor.shape + (1,) * (wanted.dim() - factor.dim()))
            torch.testing.assert_close(got, wanted * per_row, rtol=1e-10, atol=1e-12)
    # One 1 with stride 0 for all rows, and a transposed one, given by hand.
    upstream = torch.ones((), dtype=torch.float64, device=loss.device).expand(loss.shape)
    for got, wanted in zip(torch.autograd.grad(loss, students, upstream, retain_graph=True), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_two_backward_passes_agree(kind: str, reduction: str, impl: str) -> None:
    problem = make(kind, device=DEVICES[impl])
    if kind == "discriminator" and reduction == "none":
        return  # it has no loss for each sample
    students = leaves(problem)
    loss = problem.loss(*students, reduction=reduction, impl=impl).sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in students if x.grad is not None]
    assert len(first) == len(students)
    # What an optimiser, a clipping or zero_grad(set_to_none=False) does to the gradient it was given.
    for x in students:
        assert x.grad is not None
        x.grad.fill_(float("nan"))
        x.grad = None
    loss.backward(retain_graph=True)
    for x, wanted in zip(students, first, strict=True):
        assert x.grad is not None and torch.equal(x.grad, wanted)
    # And gradients add up.
    loss.backward()
    for x, wanted in zip(students, first, strict=True):
        assert x.grad is not None and torch.equal(x.grad, 2 * wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_that_was_asked_for_is_the_asker_s_own(kind: str, impl: str) -> None:
    problem = make(kind, device=DEVICES[impl])
    students = leaves(problem)
    loss = problem.loss(*students, reduction="mean", impl=impl)
    first = torch.autograd.grad(loss, students, retain_graph=True)
    wanted = [x.clone() for x in first]
    for x in first:
        x.mul_(7.0)
    torch.testing.assert_close(list(torch.autograd.grad(loss, students)), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_hook_that_changes_its_gradient_never_corrupts_the_next_one(kind: str, impl: str) -> None:
    problem = make(kind, device=DEVICES[impl])
    students = [x * 1.0 for x in leaves(problem)]
    loss = problem.loss(*students, reduction="mean", impl=impl)
    wanted = [7 * x for x in torch.autograd.grad(loss, students, retain_graph=True)]
    for x in students:
        x.register_hook(lambda grad: grad.mul_(7.0))
    torch.autograd.grad(loss, students, retain_graph=True)
    try:
        again = torch.autograd.grad(loss, students)
    except RuntimeError as error:
        # torch forbids such hooks: finding out is as good as coping.
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(list(again), wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_student_of_two_losses(kind: str, impl: str) -> None:
    problem, other = (make(kind, dtype=torch.float64, device=DEVICES[impl], seed=seed) for seed in (0, 1))
    other.students = problem.students
    parts = [result(p, impl, "mean")[1:] for p in (problem, other)]
    students = leaves(problem)
    hidden = [x * 1.0 for x in students]
    # Twice the same loss, one of another target, and one that is no loss of ours.
    first = problem.loss(*hidden, reduction="mean", impl=impl)
    second = other.loss(*hidden, reduction="mean", impl=impl)
    (first + first + second + sum(x.sum() for x in hidden)).backward()
    for x, one, two in zip(students, *parts, strict=True):
        torch.testing.assert_close(x.grad, 2 * one + two + 1)
    # And the parts again.
    (again,) = torch.autograd.grad(problem.loss(*hidden, reduction="mean", impl=impl), hidden[:1])
    torch.testing.assert_close(again, parts[0][0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [*GRADIENTS, "in-place"])
def test_a_second_derivative_is_refused(kind: str, impl: str) -> None:
    problem = make(kind, device=DEVICES[impl])
    students = [x * 1.0 for x in leaves(problem)]
    loss = problem.loss(*students, reduction="mean", impl=impl)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*create_graph"):
        torch.autograd.grad(loss, students, create_graph=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "images"])
def test_a_second_derivative_of_the_op_is_refused_too(kind: str) -> None:
    # The autograd that is registered with the dispatcher, which torch.compile and torch.export see.
    from op_schemas import direct

    op, arguments = direct(make(kind), "mean", grad=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*create_graph"):
        torch.autograd.grad(op(*arguments)[0], [x for x in arguments[:1] if x.requires_grad], create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [*OF_EACH_OP, "in-place"])
def test_without_gradients(kind: str, impl: str) -> None:
    problem = make(kind, device=DEVICES[impl])
    wanted = result(problem, impl, "mean")[0]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            students = leaves(problem)
            loss = problem.loss(*students, reduction="mean", impl=impl)
        assert not loss.requires_grad
        assert torch.equal(loss, wanted)
    # A student that wants none, and one of two that does.
    assert not problem.loss(reduction="mean", impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", [0, 1])
def test_one_side_of_the_discriminator_alone(wanted: int, impl: str) -> None:
    # The generator's step needs d_fake's gradient only, and fakes that are detached need none.
    problem = make("discriminator", device=DEVICES[impl])
    both = result(problem, impl, "mean")[1:]
    students = [x.detach().clone() for x in problem.students]
    students[wanted].requires_grad_()
    problem.loss(*students, reduction="mean", impl=impl).backward()
    assert students[1 - wanted].grad is None
    torch.testing.assert_close(students[wanted].grad, both[wanted])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_tensor_on_both_sides_of_the_discriminator(impl: str) -> None:
    d = make("discriminator", dtype=torch.float64, device=DEVICES[impl]).students[0]
    problem = Problem("discriminator", [d, d], {})
    real, fake = result(problem, impl, "mean")[1:]
    d = d.clone().requires_grad_()
    problem.loss(d, d, reduction="mean", impl=impl).backward()
    torch.testing.assert_close(d.grad, real + fake)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [*ROW_KINDS, "tanh", "finished", "images", *GAN_KINDS])
def test_float16_gradients_wait_for_the_grad_scaler(kind: str, impl: str) -> None:
    # Gradients of 1e-8 are below what float16 can hold; what a GradScaler multiplies with is not.
    problem = make(kind, dtype=torch.float16, device=DEVICES[impl])
    small, scale = 1e-8, 65536.0
    exact, plain = (truth(problem, "sum", dtype)[1:] for dtype in (torch.float64, torch.float32))
    if kind in ROW_KINDS or kind in ("tanh", "finished", "images"):
        # In the op itself.
        problem.options["weights"] = torch.full(problem.students[0].shape[:1], small, device=DEVICES[impl])
        after = 1.0
    else:
        # By whoever weighs the losses.
        after = small
    students = leaves(problem)
    loss = problem.loss(*students, reduction="sum", impl=impl) * after
    for got, e, p in zip(torch.autograd.grad(loss * scale, students), exact, plain, strict=True):
        within(got, e * small * scale, p * small * scale, "gradient")
        assert got.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_bfloat16_gradients_of_a_sure_student_are_kept(kind: str, impl: str) -> None:
    # p = 0.999: the gradient is a small difference that bfloat16 exponentials would lose.
    student = torch.tensor([[8.0, 0.0, 0.5, 1.0]], dtype=torch.bfloat16, device=DEVICES[impl])
    problem = make(kind, (1, 4), torch.bfloat16, device=DEVICES[impl], tau=1.0)
    if kind != "jsd-log":
        problem.students = [student]
    for name in ("logits", "teacher"):
        if name in problem.target and kind != "jsd-log":
            problem.target[name] = student + torch.tensor([0.0625, 0.0, 0.0, 0.0]).to(student)
    if "labels" in problem.target:
        problem.target["labels"] = torch.zeros(1, dtype=torch.int64, device=DEVICES[impl])
    (_, grad), exact, plain = result(problem, impl), truth(problem), truth(problem, dtype=torch.float32)
    within(grad, exact[1], plain[1], "gradient")
    if (kind, impl) != ("dkd", "reference"):  # its bfloat16 has a test of its own
        torch.testing.assert_close(grad.cpu().double(), exact[1], rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["tanh", "finished", "images", "in-place"])
def test_the_subgradient_at_ties_is_zero(kind: str, impl: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        a = torch.tensor([[0.0, 0.7, -1.5, 40.0, -40.0, 3.0]], dtype=dtype, device=DEVICES[impl])
        b = a.clone()
        if kind == "finished":
            # Where tanh is exact, and where it is not there is no tie.
            a[0, 1] = a[0, 2] = a[0, 5] = 0.0
            b = a.tanh()
        b[0, -1] = 0.5
        a[0, -1] = 3.0
        problem = make(kind, (1, 6), dtype, device=DEVICES[impl])
        problem.students, problem.target = [a], {"teacher": b}
        grad = result(problem, impl, "sum")[1]
        assert not grad[0, :-1].any(), dtype
        assert grad[0, -1] > 0


# What is left behind by calls in other modes.


@pytest.fixture
def fresh_constants() -> Any:
    """Temperatures that no other test has made tensors of, and that no other test will meet."""
    checks._constant.cache_clear()
    yield
    checks._constant.cache_clear()


@pytest.mark.usefixtures("fresh_constants")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["logits", "dkd"])
def test_training_after_validating_in_inference_mode(kind: str, impl: str) -> None:
    problem = make(kind, device=DEVICES[impl], tau=3.75)
    with torch.inference_mode():
        problem.loss(reduction="mean", impl=impl)
    assert result(problem, impl, "mean")[1].isfinite().all()


@pytest.mark.usefixtures("fresh_constants")
@pytest.mark.parametrize("impl", IMPLS)
def test_training_after_fake_tensors(impl: str) -> None:
    # As torch.export and estimates of memory call it.
    problem = make("logits", device=DEVICES[impl], tau=5.75)
    with FakeTensorMode():
        loss = kd_loss(torch.empty(6, 7), torch.empty(6, 7), tau=5.75)
    assert loss.shape == ()
    assert result(problem, impl, "mean")[1].isfinite().all()


@pytest.mark.parametrize("kind", [*GRADIENTS, "in-place"])
def test_a_step_that_is_traced_or_of_fake_tensors_asks_no_number(kind: str) -> None:
    problem = make(kind)

    def step(*students: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in students]
        loss = problem.loss(*(x * 1 for x in leaves), reduction="mean")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    graph = make_fx(step)(*(torch.zeros_like(x) for x in problem.students))
    torch.testing.assert_close(graph(*problem.students), step(*problem.students))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss, *grads = step(*map(mode.from_tensor, problem.students))
    assert loss.shape == () and [x.shape for x in grads] == [x.shape for x in problem.students]


@pytest.mark.usefixtures("fresh_constants")
def test_nothing_of_torch_func_is_kept() -> None:
    x = torch.randn(7)
    torch.func.grad(lambda x: kd_loss(x, torch.zeros(7), tau=6.75))(x)
    kept = checks.tau_tensor(6.75, x.device)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_is_not_the_value(impl: str) -> None:
    for kind in ("logits", "dkd", "jsd", "tanh", "gan-logits"):
        problem = make(kind, device=DEVICES[impl])
        wanted = result(problem, impl, "mean")
        with torch.autocast(DEVICES[impl], torch.bfloat16):
            got = result(problem, impl, "mean")
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_graph_holds_no_inputs(impl: str) -> None:
    # The gradient is all that backward needs: writing to the teacher afterwards is nobody's business.
    student, teacher = (x.to(DEVICES[impl]) for x in (torch.randn(4, 5), torch.randn(4, 5)))
    student.requires_grad_()
    wanted = torch.autograd.grad(kd_loss(student, teacher, impl=impl), student)[0]
    loss = kd_loss(student, teacher, impl=impl)
    teacher.zero_()
    assert torch.equal(torch.autograd.grad(loss, student)[0], wanted)
    with torch.no_grad():
        loss = image_l1_loss(student, teacher, impl=impl)
    assert loss.grad_fn is None
