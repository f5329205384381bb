"""image_l1_loss: the L1 distance of two images, given before or after their tanh."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mekd.functional import image_l1_loss

FLAGS = [
    # Two pre-activations: what the generator gives MEKDLoss.
    (True, False),
    # A pre-activation and a finished image: a teacher's half that was drawn before.
    (True, True),
    # Two finished images: a generator that keeps its tanh to itself.
    (False, False),
    # tanh=False already says that both are finished.
    (False, True),
]
SHAPES = [
    # A batch of colour images.
    (4, 3, 8, 8),
    # One image, one channel, not square.
    (1, 1, 2, 5),
    # Generators that draw no planes.
    (3, 7),
]


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(0)
    a, b = (torch.from_numpy(1.5 * random.standard_normal(shape)).to(dtype) for _ in range(2))
    return a, b


def distances(a: Tensor, b: Tensor, tanh: bool, finished: bool) -> np.ndarray:
    """|a - b| per element in float64, with the tanh of what has none yet."""
    x, y = a.detach().double().numpy(), b.double().numpy()
    if tanh:
        x = np.tanh(x)
        y = y if finished else np.tanh(y)
    return np.abs(x - y).reshape(len(x), -1)


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
@pytest.mark.parametrize(("tanh", "finished"), FLAGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_is_the_formula(shape: tuple[int, ...], tanh: bool, finished: bool, reduction: str) -> None:
    a, b = pair(shape)
    each = distances(a, b, tanh, finished)
    wanted = {
        "none": each.sum(1),
        "mean": each.mean(),
        "batchmean": each.sum(1).mean(),
        "sum": each.sum(),
    }[reduction]
    got = image_l1_loss(a, b, tanh=tanh, finished=finished, reduction=reduction)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12)


def test_pre_activations_and_the_mean_are_the_default() -> None:
    a, b = pair((2, 3, 4, 4))
    np.testing.assert_allclose(image_l1_loss(a, b).item(), distances(a, b, True, False).mean(), rtol=1e-12)


@pytest.mark.parametrize(("tanh", "finished"), FLAGS)
def test_gradient_is_the_formula(tanh: bool, finished: bool) -> None:
    a, b = pair((2, 3, 4, 4))
    a.requires_grad_()
    image_l1_loss(a, b, tanh=tanh, finished=finished, reduction="batchmean").backward()
    x, y = a.detach().numpy(), b.numpy()
    ours, theirs = (np.tanh(x), y if finished else np.tanh(y)) if tanh else (x, y)
    slope = 1 - np.tanh(x) ** 2 if tanh else 1.0
    assert a.grad is not None
    np.testing.assert_allclose(a.grad.numpy(), np.sign(ours - theirs) * slope / 2, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("tanh", "finished"), FLAGS)
def test_gradcheck(tanh: bool, finished: bool, reduction: str) -> None:
    a, b = pair((2, 3, 2, 2))
    a.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: image_l1_loss(x, b, tanh=tanh, finished=finished, reduction=reduction), (a,)
    )


@pytest.mark.parametrize(
    "tie",
    [
        # Equal where the tanh is steep.
        0.0,
        # Equal somewhere.
        0.7,
        # 40 against 50: different pre-activations, the same saturated pixel.
        40.0,
    ],
)
def test_the_subgradient_at_ties_is_zero(tie: float) -> None:
    a = torch.tensor([[tie, 0.5, -0.5]], requires_grad=True)
    b = torch.tensor([[tie if tie < 40 else 50.0, 0.0, 0.0]])
    loss = image_l1_loss(a, b, reduction="sum")
    loss.backward()
    assert a.grad is not None
    slope = 1 - np.tanh(0.5) ** 2
    # The slope of tanh itself at 40 is 7e-35: what is left of it there may be told from 0, but by nobody who adds it.
    np.testing.assert_allclose(a.grad.numpy(), [[0.0, slope, -slope]], rtol=1e-6, atol=1e-18)


def test_large_pre_activations_stay_finite() -> None:
    a = torch.tensor([[600.0, -600.0]], requires_grad=True)
    loss = image_l1_loss(a, -a.detach(), reduction="sum")
    loss.backward()
    assert loss.item() == 4.0
    assert a.grad is not None and a.grad.abs().max() <= 1e-18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    a, b = pair((2, 3, 8, 8), dtype)
    a.requires_grad_()
    loss = image_l1_loss(a, b)
    loss.backward()
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), distances(a, b, True, False).mean(), rtol=2e-6)
    assert a.grad is not None and a.grad.dtype == dtype


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_an_empty_batch_costs_nothing(reduction: str) -> None:
    a = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = image_l1_loss(a, torch.zeros(0, 3, 4, 4), reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum().item() == 0.0
    assert a.grad is not None and a.grad.shape == a.shape


def test_channels_last_is_not_the_value() -> None:
    a, b = pair((2, 3, 4, 4))
    wanted = image_l1_loss(a, b, reduction="none")
    got = image_l1_loss(a.contiguous(memory_format=torch.channels_last), b, reduction="none")
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)


IMAGE = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        # The teacher's half must not be trained.
        ({"teacher": IMAGE.clone().requires_grad_()}, ValueError, ["teacher", "requires grad", "detach"]),
        # Broadcasting would compare one image with all.
        ({"teacher": IMAGE[:1]}, ValueError, ["teacher", "(1, 3, 4, 4)", "(2, 3, 4, 4)"]),
        # Pixels as they come from a file.
        ({"student": IMAGE.to(torch.uint8)}, TypeError, ["student", "torch.uint8", "floating"]),
        # The choice, with its name, its value and what it may be.
        (
            {"reduction": "batch"},
            ValueError,
            ["reduction", "'batch'", "'none', 'mean', 'batchmean', 'sum'"],
        ),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        image_l1_loss(**{"student": IMAGE, "teacher": IMAGE, **arguments})
    for part in parts:
        assert part in str(caught.value)
