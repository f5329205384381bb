"""What holds for all logits, not only for those that somebody thought of."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mekd import extension
from mekd.functional import dkd_loss, image_l1_loss, jsd_loss, kd_loss
from op_grid import DEVICES, IMPLS

#: The same examples every time; no deadline, since the machine may be busy.
FEW = settings(max_examples=8 if extension.INTERPRETED else 20, deadline=None, derandomize=True, database=None)
TAUS = st.sampled_from([1.0, 0.5, 4.0, 20.0])


@st.composite
def two(draw: st.DrawFn, largest: float = 30.0, classes: int = 40) -> tuple[Tensor, Tensor]:
    """Student and teacher, (N, C)."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, classes)))
    numbers = st.floats(-largest, largest, allow_nan=False)
    x, y = (torch.from_numpy(draw(arrays(np.float64, shape, elements=numbers))) for _ in range(2))
    return x, y


def rows(impl: str, student: Tensor, *targets: Tensor, **options: Any) -> Tensor:
    device = DEVICES[impl]
    on: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    targets = tuple(x.to(device) for x in targets)
    return kd_loss(student.to(device), *targets, **on, reduction="none", impl=impl).cpu()


def same(got: Tensor, wanted: Tensor, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(), tau=TAUS)
def test_a_kl_is_not_negative(impl: str, pair: tuple[Tensor, Tensor], tau: float) -> None:
    student, teacher = pair
    assert (rows(impl, student, teacher, tau=tau) >= -1e-12 * tau**2).all()
    # In float32 as well, as far as it has digits; next to each other too.
    s, t = student.float(), teacher.float()
    for other in (s, t + 1e-4 * s):
        assert (rows(impl, other, t, tau=tau, scale="one") >= -1e-6).all()


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(), tau=TAUS, shift=st.floats(-500, 500))
def test_a_student_like_its_teacher_has_nothing_to_learn(
    impl: str, pair: tuple[Tensor, Tensor], tau: float, shift: float
) -> None:
    teacher = pair[1].to(DEVICES[impl])
    targets: list[tuple[Tensor, dict[str, Any]]] = [
        (teacher + shift, {"logits": teacher}),
        (teacher, {"probs": teacher.softmax(-1)}),
    ]
    for student, target in targets:
        student = student.clone().requires_grad_()
        losses = kd_loss(student, **target, tau=tau, scale="one", reduction="none", impl=impl)
        (grad,) = torch.autograd.grad(losses.sum(), student)
        assert losses.abs().max() < 1e-11
        assert grad.abs().max() < 1e-11
    losses = jsd_loss(teacher + shift, teacher, tau=tau, reduction="none", impl=impl)
    assert losses.abs().max() < 1e-11


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(), tau=TAUS, shifts=st.tuples(st.floats(-900, 900), st.floats(-900, 900)))
def test_a_constant_per_row_is_no_difference(
    impl: str, pair: tuple[Tensor, Tensor], tau: float, shifts: tuple[float, float]
) -> None:
    student, teacher = pair
    wanted = rows(impl, student, teacher, tau=tau)
    same(rows(impl, student + shifts[0], teacher + shifts[1], tau=tau), wanted, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(), tau=TAUS)
def test_logits_log_probabilities_and_probabilities_are_one_teacher(
    impl: str, pair: tuple[Tensor, Tensor], tau: float
) -> None:
    student, teacher = pair
    wanted = rows(impl, student, teacher, tau=tau)
    same(rows(impl, student, teacher.log_softmax(-1), tau=tau), wanted)
    same(rows(impl, student, probs=teacher.softmax(-1), tau=tau), wanted)


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(), tau=TAUS, seed=st.integers(0, 99))
def test_all_classes_named_are_the_probabilities(impl: str, pair: tuple[Tensor, Tensor], tau: float, seed: int) -> None:
    student, teacher = pair
    probs = teacher.softmax(-1)
    random = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(probs.shape[1], generator=random) for _ in probs])
    device = DEVICES[impl]
    wanted = rows(impl, student, probs=probs, tau=tau)
    for rest in ("spread", "drop"):
        answer = (probs.gather(1, order).to(device), order.to(device))
        got = kd_loss(student.to(device), topk=answer, rest=rest, tau=tau, reduction="none", impl=impl)
        same(got.cpu(), wanted)


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(), tau=TAUS, seed=st.integers(0, 99))
def test_a_label_is_a_probability_of_one(impl: str, pair: tuple[Tensor, Tensor], tau: float, seed: int) -> None:
    student = pair[0]
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, student.shape[1], student.shape[:1], generator=random)
    onehot = torch.nn.functional.one_hot(labels, student.shape[1]).double()
    same(rows(impl, student, labels=labels, tau=tau), rows(impl, student, probs=onehot, tau=tau))


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(classes=70), tau=TAUS, seed=st.integers(0, 99))
def test_classes_and_rows_have_no_order(impl: str, pair: tuple[Tensor, Tensor], tau: float, seed: int) -> None:
    # Where in a vector or a tile a number lies is not its value.
    student, teacher = (x.to(DEVICES[impl]) for x in pair)
    random = torch.Generator().manual_seed(seed)
    classes = torch.randperm(student.shape[1], generator=random).to(student.device)
    order = torch.randperm(len(student), generator=random).to(student.device)

    def both(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s = s.detach().clone().requires_grad_()
        losses = kd_loss(s, t, tau=tau, reduction="none", impl=impl)
        return losses.detach(), torch.autograd.grad(losses.sum(), s)[0]

    losses, grad = both(student, teacher)
    got, got_grad = both(student[order][:, classes], teacher[order][:, classes])
    same(got, losses[order])
    same(got_grad, grad[order][:, classes])
    # Nor has a row neighbours.
    alone, alone_grad = both(student[:1], teacher[:1])
    same(alone, losses[:1])
    same(alone_grad, grad[:1])


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(), tau=TAUS, seed=st.integers(0, 99))
def test_decoupled_parts_make_the_whole(impl: str, pair: tuple[Tensor, Tensor], tau: float, seed: int) -> None:
    # KL = target against the rest + (1 - p_target) * KL within the rest: equation 7 of Zhao et al., 2022.
    student, teacher = (x.to(DEVICES[impl]) for x in pair)
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, student.shape[1], student.shape[:1], generator=random).to(student.device)

    def part(alpha: float, beta: float) -> Tensor:
        return dkd_loss(student, teacher, labels, alpha=alpha, beta=beta, tau=tau, reduction="none", impl=impl)

    others = (teacher / tau).softmax(-1).scatter(1, labels.unsqueeze(1), 0.0).sum(-1)
    wanted = kd_loss(student, teacher, tau=tau, reduction="none", impl=impl)
    same(part(1.0, 0.0) + others * part(0.0, 1.0), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(), tau=TAUS, beta=st.floats(0.05, 0.95))
def test_a_jensen_shannon_divergence_is_bounded_and_turns_around(
    impl: str, pair: tuple[Tensor, Tensor], tau: float, beta: float
) -> None:
    student, teacher = (x.to(DEVICES[impl]) for x in pair)

    def jsd(a: Tensor, b: Tensor, by: float, log_probs: bool = False) -> Tensor:
        return jsd_loss(a, b, beta=by, tau=tau, log_probs=log_probs, reduction="none", impl=impl)

    losses = jsd(student, teacher, beta)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (losses >= -1e-12).all() and (losses <= entropy + 1e-12).all()
    same(jsd(teacher, student, 1 - beta), losses, rtol=1e-8)
    log_q, log_p = ((x / tau).log_softmax(-1) for x in (student, teacher))
    same(jsd(log_q, log_p, beta, log_probs=True), losses, rtol=1e-8)
    # At its ends it is the KL, of either side.
    same(jsd(student, teacher, 0.0), kd_loss(student, teacher, tau=tau, scale="one", reduction="none", impl=impl))
    same(jsd(student, teacher, 1.0), kd_loss(teacher, student, tau=tau, scale="one", reduction="none", impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@FEW
@given(pair=two(largest=8.0))
def test_a_distance_of_images_is_symmetric_and_at_most_two(impl: str, pair: tuple[Tensor, Tensor]) -> None:
    a, b = (x.to(DEVICES[impl]) for x in pair)
    distance = image_l1_loss(a, b, reduction="none", impl=impl)
    same(image_l1_loss(b, a, reduction="none", impl=impl), distance)
    same(image_l1_loss(-a, -b, reduction="none", impl=impl), distance)
    assert (distance >= 0).all() and (distance <= 2 * a.shape[1]).all()
    same(image_l1_loss(a, b.tanh(), finished=True, reduction="none", impl=impl), distance)
    same(image_l1_loss(a.tanh(), b.tanh(), tanh=False, reduction="none", impl=impl), distance)
