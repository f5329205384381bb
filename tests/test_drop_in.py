"""A training script that changes one import keeps its curve."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mekd.compat.mdistiller import kd_loss

TAU = 4.0


def by_hand(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """What such a script has: the mean over images of the KL, times tau^2."""
    log_q, p = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean() * temperature**2


def curve(loss_of: Callable[[Tensor, Tensor, float], Tensor], steps: int) -> Tensor:
    """The losses of a small student that learns a teacher's answers to the digits."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data).float() / 16
    teacher = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    with torch.no_grad():
        answers = 5 * teacher(images)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = loss_of(student(images[rows]), answers[rows], TAU)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_200_steps_of_training_give_the_same_losses() -> None:
    ours, plain = curve(kd_loss, 200), curve(by_hand, 200)
    assert plain[-20:].mean() < 0.5 * plain[:20].mean()  # it does learn
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_the_comparison_can_fail() -> None:
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            curve(lambda s, t, tau: kd_loss(s, t, tau) * 1.0001, 20), curve(by_hand, 20), rtol=1e-5, atol=1e-6
        )
