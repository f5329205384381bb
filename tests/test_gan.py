"""The losses of step 1: generator_loss, discriminator_loss, and DeprivatizationLoss over both."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.functional import discriminator_loss, generator_loss
from mekd.losses import DeprivatizationLoss

ALPHA = 0.5
#: torch's softplus is linear above 20, which leaves out log(1 + e^-20).
SOFTPLUS = math.exp(-20)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-softplus(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits of the discriminator (5,) and of a teacher (5, 4)."""
    random = np.random.default_rng(0)
    d, logits = 2 * random.standard_normal(5), 3 * random.standard_normal((5, 4))
    return torch.from_numpy(d).to(dtype), torch.from_numpy(logits).to(dtype)


KINDS = [
    # y was computed before.
    "confidence",
    # A teacher that shows its logits.
    "logits",
    # An API that answers probabilities.
    "probs",
    # An API that answers labels: y = 1.
    "nothing",
]


def answer_of(kind: str, logits: Tensor) -> tuple[dict[str, Any], np.ndarray]:
    """The answer as generator_loss takes it, and y."""
    probs = softmax(logits.double().numpy())
    as_tensor = torch.from_numpy(probs).to(logits.dtype)
    return {
        "confidence": ({"confidence": as_tensor.amax(-1)}, probs.max(-1)),
        "logits": ({"logits": logits}, probs.max(-1)),
        "probs": ({"probs": as_tensor}, probs.max(-1)),
        "nothing": ({}, np.ones(len(probs))),
    }[kind]


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
@pytest.mark.parametrize("minimax", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_generator_value(kind: str, minimax: bool, reduction: str) -> None:
    d, logits = make()
    answer, y = answer_of(kind, logits)
    x = d.numpy()
    fooling = np.log(1 - sigmoid(x)) if minimax else -np.log(sigmoid(x))
    losses = fooling + ALPHA * y * -np.log(sigmoid(x))
    wanted = {"none": losses, "sum": losses.sum()}.get(reduction, losses.mean())
    got = generator_loss(d, **answer, alpha=ALPHA, minimax=minimax, reduction=reduction)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12)


def test_the_paper_in_one_line() -> None:
    d, logits = make()
    y = answer_of("logits", logits)[1]
    np.testing.assert_allclose(
        generator_loss(d, logits=logits).item(), ((1 + 0.5 * y) * softplus(-d.numpy())).mean(), rtol=1e-12
    )


@pytest.mark.parametrize(
    "alpha",
    [
        # No information term: the teacher is not asked.
        0.0,
        # The paper's.
        0.5,
        # More weight on the teacher than on the discriminator.
        2.0,
    ],
)
@pytest.mark.parametrize("minimax", [False, True])
def test_generator_gradient(minimax: bool, alpha: float) -> None:
    d, logits = make()
    d.requires_grad_()
    generator_loss(d, logits=logits, alpha=alpha, minimax=minimax).backward()
    x, y = d.detach().numpy(), answer_of("logits", logits)[1]
    fooling = -sigmoid(x) if minimax else -sigmoid(-x)
    assert d.grad is not None
    np.testing.assert_allclose(d.grad.numpy(), (fooling - alpha * y * sigmoid(-x)) / 5, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("minimax", [False, True])
def test_generator_gradcheck(kind: str, minimax: bool) -> None:
    d, logits = make()
    answer, _ = answer_of(kind, logits)
    d.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return generator_loss(x, **answer, minimax=minimax, reduction="none")

    assert torch.autograd.gradcheck(loss, (d,))


@pytest.mark.parametrize(
    ("d", "minimax", "loss", "slope"),
    [
        # A discriminator that is sure of the fake: the gradient does not vanish.
        (-1000.0, False, 1500.0, -1.5),
        # A discriminator that is fooled.
        (1000.0, False, 0.0, 0.0),
        # Minimax: the adversarial part vanishes, the information term stays.
        (-1000.0, True, 500.0, -0.5),
        (1000.0, True, -1000.0, -1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generator_is_finite(d: float, minimax: bool, loss: float, slope: float, dtype: torch.dtype) -> None:
    fake = torch.full((3,), d, dtype=dtype, requires_grad=True)
    got = generator_loss(fake, alpha=0.5, minimax=minimax, reduction="sum")
    got.backward()
    assert got.item() == pytest.approx(3 * loss, abs=1e-6)
    assert fake.grad is not None
    np.testing.assert_allclose(fake.grad.numpy(), [slope] * 3, atol=1e-6)


def test_a_sure_teachers_logits_do_not_overflow() -> None:
    logits = torch.tensor([[600.0, -600.0, 0.0]])
    got = generator_loss(torch.zeros(1), logits=logits, alpha=1.0)
    assert got.item() == pytest.approx(2 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    d, logits = make(dtype)
    got = generator_loss(d, logits=logits)
    x, y = d.double().numpy(), softmax(logits.double().numpy()).max(-1)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(((1 + 0.5 * y) * softplus(-x)).mean(), rel=1e-6)
    both = discriminator_loss(d, d + 1)
    assert both.dtype == torch.float32
    wanted = softplus(-x).mean() + softplus((d + 1).double().numpy()).mean()
    assert both.item() == pytest.approx(wanted, rel=1e-6)


def test_an_empty_batch_costs_nothing() -> None:
    d = torch.zeros(0, requires_grad=True)
    loss = generator_loss(d, logits=torch.zeros(0, 4)) + discriminator_loss(d, d)
    loss.backward()
    assert loss.item() == 0.0
    assert d.grad is not None and d.grad.shape == (0,)


# The discriminator.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "fakes",
    [
        # As many fakes as real images.
        5,
        # A last batch of private images: the two means are taken apart.
        8,
    ],
)
def test_discriminator_agrees_with_binary_cross_entropy(fakes: int, reduction: str) -> None:
    random = np.random.default_rng(1)
    real, fake = (torch.from_numpy(3 * random.standard_normal(n)).requires_grad_() for n in (5, fakes))
    loss = discriminator_loss(real, fake, reduction=reduction)
    wanted = F.binary_cross_entropy_with_logits(real, torch.ones_like(real), reduction=reduction)
    wanted = wanted + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction=reduction)
    torch.testing.assert_close(loss, wanted)
    for got, exact in zip(
        torch.autograd.grad(loss, (real, fake)), torch.autograd.grad(wanted, (real, fake)), strict=True
    ):
        torch.testing.assert_close(got, exact)


def test_discriminator_gradcheck() -> None:
    real, fake = (make()[0].requires_grad_(), (make()[0] + 1).requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: discriminator_loss(a, b), (real, fake))


def test_discriminator_stays_finite() -> None:
    real = torch.tensor([1000.0, -1000.0], requires_grad=True)
    fake = torch.tensor([1000.0, -1000.0], requires_grad=True)
    loss = discriminator_loss(real, fake, reduction="sum")
    loss.backward()
    assert loss.item() == 2000.0
    assert real.grad is not None and real.grad.tolist() == [0.0, -1.0]
    assert fake.grad is not None and fake.grad.tolist() == [1.0, 0.0]


def test_softplus_in_float64_is_off_by_no_more_than_torchs_threshold() -> None:
    d = torch.linspace(-60, 60, 241, dtype=torch.float64)
    got = generator_loss(d, alpha=0.0, reduction="none")
    np.testing.assert_allclose(got.numpy(), softplus(-d.numpy()), rtol=1e-12, atol=1.01 * SOFTPLUS)


# The module.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("minimax", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_module_is_both_functions(kind: str, minimax: bool, alpha: float) -> None:
    d, logits = make()
    answer, y = answer_of(kind, logits)
    loss = DeprivatizationLoss(alpha, minimax)
    x = d.numpy()
    fooling = -softplus(x) if minimax else softplus(-x)
    wanted = (fooling + alpha * y * softplus(-x)).mean()
    np.testing.assert_allclose(loss(d, **answer).item(), wanted, rtol=1e-12)
    assert torch.equal(loss(d, **answer), generator_loss(d, **answer, alpha=alpha, minimax=minimax))
    assert torch.equal(loss.discriminator(d, d + 1), discriminator_loss(d, d + 1))
    np.testing.assert_allclose(
        loss.discriminator(d, d + 1).item(), softplus(-x).mean() + softplus(x + 1).mean(), rtol=1e-12
    )


def test_module_defaults_to_the_paper() -> None:
    loss = DeprivatizationLoss()
    assert (loss.alpha, loss.minimax) == (0.5, False)
    assert not list(loss.parameters())


# Errors.

D = torch.zeros(4)
ANSWER = torch.full((4, 3), 1 / 3)


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        # Two answers.
        ({"logits": ANSWER, "probs": ANSWER}, ValueError, ["confidence, logits and probs", "one"]),
        ({"confidence": D, "probs": ANSWER}, ValueError, ["confidence, logits and probs", "one"]),
        # The teacher is still in a graph.
        ({"logits": ANSWER.clone().requires_grad_()}, ValueError, ["logits", "requires grad", "detach"]),
        ({"probs": ANSWER.clone().requires_grad_()}, ValueError, ["probs", "requires grad", "detach"]),
        ({"confidence": D.clone().requires_grad_()}, ValueError, ["confidence", "requires grad", "detach"]),
        # (4, 1) and (4,) would broadcast to (4, 4).
        ({"confidence": D.unsqueeze(1)}, ValueError, ["confidence", "(4, 1)", "(4,)"]),
        # Another batch's answer, and one that was reduced already.
        ({"logits": ANSWER[:3]}, ValueError, ["(3, 3)", "(4, C)"]),
        ({"probs": D}, ValueError, ["(4,)", "(4, C)"]),
        # A negative weight would train G to be unsure.
        ({"alpha": -0.5}, ValueError, ["alpha", "-0.5", "at least 0"]),
        # Labels are no logits.
        ({"d_fake": D.long()}, TypeError, ["d_fake", "torch.int64", "floating"]),
        # The choice, with its name, its value and what it may be.
        (
            {"reduction": "avg"},
            ValueError,
            ["reduction", "'avg'", "'none', 'mean', 'batchmean', 'sum'"],
        ),
    ],
)
def test_generator_errors(arguments: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        generator_loss(**{"d_fake": D, **arguments})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        ({"d_real": D.long()}, TypeError, ["d_real", "torch.int64", "floating"]),
        ({"d_fake": D.long()}, TypeError, ["d_fake", "torch.int64", "floating"]),
        # One loss per sample: there are two kinds of samples.
        ({"reduction": "none"}, ValueError, ["reduction", "'none'", "'mean', 'sum'"]),
    ],
)
def test_discriminator_errors(arguments: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        discriminator_loss(**{"d_real": D, "d_fake": D, **arguments})
    for part in parts:
        assert part in str(caught.value)


def test_module_refuses_a_negative_weight() -> None:
    with pytest.raises(ValueError, match=r"alpha is -1.*at least 0"):
        DeprivatizationLoss(alpha=-1)
