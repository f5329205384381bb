"""MEKDLoss with a nuisance: both pictures are drawn with the same one, by generators of any make."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mekd.losses import MEKDLoss
from mekd.nets import Generator
from mekd.nets.frozen import freeze
from small_generator import CLASSES, answer_of, inputs

ENTRIES = 7


class Own(nn.Module):
    """A generator of another make that takes a nuisance, and says of how many entries."""

    def __init__(self, nuisance: int = ENTRIES) -> None:
        super().__init__()
        self.nuisance, self.linear = nuisance, nn.Linear(CLASSES + nuisance, 12)
        self.given: list[Tensor] = []

    def forward(self, code: Tensor, n: Tensor) -> Tensor:
        self.given.append(n)
        return self.linear(torch.cat([code, n], 1)).unflatten(1, (3, 2, 2)).tanh()


def ours() -> Generator:
    torch.manual_seed(0)
    return Generator(CLASSES, 16, width=0.25, nuisance=ENTRIES).eval()


GENERATORS = [
    # Folded, the nuisance's part computed once.
    ours,
    # Folded before it came.
    lambda: freeze(ours()),
    # As it is.
    lambda: (torch.manual_seed(0), Own())[1],
]


def distance(generator: nn.Module, student: Tensor, teacher: Tensor, n: Tensor) -> Tensor:
    with torch.no_grad():
        return (generator(student / 5.0, n) - generator(teacher / 5.0, n)).abs().mean()


@pytest.mark.parametrize("make", GENERATORS)
@pytest.mark.parametrize("target", ["logits", "probs", "topk", "labels"])
def test_one_nuisance_for_both_pictures(target: str, make: Any) -> None:
    generator, n = make(), torch.randn(5, ENTRIES)
    student, teacher = inputs()
    answer, _ = answer_of(target, teacher)
    loss = MEKDLoss(generator)
    image, _ = loss.terms(student, **answer, n=n)
    if target == "logits":
        torch.testing.assert_close(image, distance(generator, student, teacher, n), rtol=1e-4, atol=1e-6)
    # A student that says what the teacher says draws the same picture, whatever n is.
    if target in ("logits", "probs"):
        same = loss.terms(teacher, **answer, n=n)[0]
        drawn = loss.terms(teacher, **answer)[0]
        assert max(same.item(), drawn.item()) < 1e-5 < image.item()
    # Another n is another distance.
    assert loss.terms(student, **answer, n=-n)[0] != image


@pytest.mark.parametrize("make", GENERATORS)
def test_without_n_it_is_drawn(make: Any) -> None:
    generator = make()
    student, teacher = inputs()
    torch.manual_seed(3)
    got = MEKDLoss(generator).terms(student, teacher)[0]
    n = torch.manual_seed(3) and torch.randn(5, ENTRIES)
    torch.testing.assert_close(got, MEKDLoss(generator).terms(student, teacher, n=n)[0], rtol=0, atol=0)
    assert not isinstance(generator, Own) or generator.given[0] is generator.given[1]


@pytest.mark.parametrize("make", GENERATORS)
def test_a_kept_picture_is_of_its_n(make: Any) -> None:
    loss, n = MEKDLoss(make()), torch.randn(5, ENTRIES)
    student, teacher = inputs()
    kept = loss.teacher_image(CLASSES, n, logits=teacher)
    drawn = loss.terms(student, teacher, n=n)[0]
    torch.testing.assert_close(loss.terms(student, teacher, n=n, kept=kept)[0], drawn, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"kept was drawn with a nuisance.*pass the n"):
        loss.terms(student, teacher, kept=kept)


def test_the_student_learns_through_its_own_picture_alone() -> None:
    student, teacher = inputs()
    student.requires_grad_()
    n = torch.randn(5, ENTRIES, requires_grad=True)
    MEKDLoss(ours(), beta=0.0)(student, teacher, n=n).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0 and n.grad is None


@pytest.mark.parametrize(
    ("generator", "n", "parts"),
    [
        # Of another batch, and of another length.
        (ours, torch.zeros(4, ENTRIES), ["n has shape (4, 7)", "(5, 7)"]),
        (ours, torch.zeros(5, 3), ["n has shape (5, 3)", "(5, 7)"]),
        # The paper's generator takes none.
        (lambda: Generator(CLASSES, 16, width=0.25), torch.zeros(5, 3), ["n has shape (5, 3)", "(5, 0)"]),
    ],
)
def test_a_nuisance_that_does_not_fit_is_refused(generator: Any, n: Tensor, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        MEKDLoss(generator())(*inputs(), n=n)
    for part in parts:
        assert part in str(caught.value)
