"""The code that the generator draws from is made alike of student and teacher."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mekd.losses import MEKDLoss
from small_generator import CLASSES, FLOOR, Plain, Rows, WithPreactivation, answer_of, centre, image, inputs


@pytest.mark.parametrize(
    ("code", "target", "offset"),
    [
        # Logits against the very same logits.
        ("logits", "logits", 0.0),
        ("log_probs", "logits", 0.0),
        ("standardized", "logits", 0.0),
        # Logits against the probabilities that an API makes of them.
        ("log_probs", "probs", 0.0),
        ("standardized", "probs", 0.0),
        # ... and against all of them, sorted.
        ("log_probs", "topk", 0.0),
        ("standardized", "topk", 0.0),
        # A constant per row, which softmax ignores, is no difference where the code is centred.
        ("log_probs", "logits", 2.0),
        ("standardized", "logits", 2.0),
        ("log_probs", "probs", 2.0),
        ("standardized", "probs", 2.0),
    ],
)
def test_a_student_that_agrees_draws_the_same_image(code: str, target: str, offset: float) -> None:
    _, teacher = inputs()
    probs = teacher.softmax(-1)
    answers: dict[str, Any] = {"logits": teacher, "probs": probs, "topk": probs.sort(descending=True)}
    student = (teacher + offset).requires_grad_()
    image_term, kl_term = MEKDLoss(WithPreactivation(), code=code).terms(student, **{target: answers[target]})
    assert image_term.item() == pytest.approx(0, abs=1e-6)
    assert kl_term.item() == pytest.approx(0, abs=1e-6)


def test_a_student_sure_of_the_label_draws_the_same_image() -> None:
    labels = torch.tensor([0, 3, 5])
    student = 100 * nn.functional.one_hot(labels, CLASSES).float()
    image_term, _ = MEKDLoss(Plain()).terms(student, labels=labels)
    assert image_term.item() == pytest.approx(0, abs=1e-6)
    # Sure of another one, it does not.
    image_term, _ = MEKDLoss(Plain()).terms(student, labels=labels.flip(0))
    assert image_term.item() > 1e-2


@pytest.mark.parametrize(
    ("floor", "low", "lower", "alike"),
    [
        # An API of two decimals answers 0.00 for anything below half a step.
        (0.005, 0.004, 0.0, True),
        # Above the floor, a difference is a difference.
        (0.005, 0.02, 0.01, False),
        # What float32 cannot tell from 0 beside 1, by default.
        (FLOOR, 1e-9, 0.0, True),
        # What it can.
        (FLOOR, 1e-6, 1e-7, False),
    ],
)
def test_probabilities_are_floored(floor: float, low: float, lower: float, alike: bool) -> None:
    def probs(p: float) -> Tensor:
        # The others keep their values: nothing but the small one differs.
        return torch.tensor([[p, 0.3, 0.25, 0.2, 0.15, 0.1 - floor]], dtype=torch.float64)

    student = probs(low).log().float()
    # Normalisation of the student moves all by log of a sum that is near 1.
    total = float(probs(low).sum())
    generator = Plain()
    loss = MEKDLoss(generator, tau=1.0, floor=floor)
    got = loss.terms(student, probs=probs(lower).float())[0].item()

    def code(p: Tensor) -> Rows:
        return centre(np.log(np.maximum((p / p.sum()).numpy(), 1e-300)), floor)

    wanted = np.abs(image(generator, code(probs(low))) - image(generator, code(probs(lower)))).mean()
    assert abs(total - 1) < 0.02
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert (got < 2e-3) == alike


def test_a_floored_class_gets_no_gradient_from_the_image() -> None:
    student = torch.tensor([[-60.0, 1.0, 0.5, 0.0, -0.5, -1.0]], requires_grad=True)
    _, teacher = inputs()
    image_term, _ = MEKDLoss(Plain()).terms(student, probs=teacher[:1].softmax(-1))
    image_term.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert abs(student.grad[0, 0].item()) < 1e-12
    assert student.grad[0, 1:].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("code", "target", "num_classes"),
    [
        # Two classes, standardised, are +1 and -1 whatever their values.
        ("standardized", "logits", 2),
        ("standardized", "probs", 2),
        ("standardized", "labels", 2),
        # One class has no variance at all.
        ("standardized", "logits", 1),
        # A label of two classes is standardised too.
        ("auto", "labels", 2),
    ],
)
def test_standardizing_fewer_than_three_classes_is_refused(code: str, target: str, num_classes: int) -> None:
    student, teacher = inputs(num_classes)
    answer = {"logits": teacher, "probs": teacher.softmax(-1), "labels": teacher.argmax(-1)}[target]
    with pytest.raises(ValueError, match=f"at least 3 classes, not {num_classes}"):
        MEKDLoss(Plain(num_classes), code=code)(student, **{target: answer})


def test_two_classes_are_enough_for_probabilities() -> None:
    student, teacher = inputs(2)
    assert MEKDLoss(Plain(2))(student, probs=teacher.softmax(-1)).item() > 0


@pytest.mark.parametrize(
    ("code", "target"),
    [
        # log p is no logit: the difference of the two formats would be the loss.
        ("logits", "probs"),
        ("logits", "topk"),
        ("logits", "labels"),
        # A label has no log-probabilities.
        ("log_probs", "labels"),
        # Probabilities are more than their argmax.
        ("onehot", "logits"),
        ("onehot", "probs"),
        ("onehot", "topk"),
    ],
)
def test_codes_that_do_not_fit_the_answer_are_refused(code: str, target: str) -> None:
    student, teacher = inputs()
    with pytest.raises(ValueError, match=rf"code is '{code}'.*{target}.*auto"):
        MEKDLoss(Plain(), code=code)(student, **answer_of(target, teacher)[0])


@pytest.mark.parametrize("label", [-100, -1, CLASSES])
def test_no_image_is_drawn_from_a_label_of_no_class(label: int) -> None:
    student, _ = inputs()
    labels = torch.zeros(len(student), dtype=torch.int64)
    labels[1] = label
    loss = MEKDLoss(Plain())
    said = rf"labels hold {label}\b.*; .*classes are 0 to {CLASSES - 1}"
    with pytest.raises(ValueError, match=said):
        loss(student, labels=labels)
    with pytest.raises(ValueError, match=f"{said}: leave out the rows without a label"):
        loss.teacher_image(CLASSES, labels=labels)
    # What is advised works, and the KL alone ignores it.
    assert loss(student[labels == 0], labels=labels[labels == 0]).isfinite()
    if label == -100:
        assert MEKDLoss(Plain(), image=0).forward(student, labels=labels).isfinite()
