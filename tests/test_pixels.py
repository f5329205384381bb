"""Images as an API sees them and as networks see them."""

import numpy as np
import pytest
import torch

from mekd.pixels import as_float, to_float, to_uint8

ALL = torch.arange(256, dtype=torch.uint8)


def test_all_256_values_survive_the_round_trip() -> None:
    assert torch.equal(to_uint8(to_float(ALL)), ALL)


def test_pixels_are_spread_evenly_over_minus_one_to_one() -> None:
    got = to_float(ALL)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.double().numpy(), np.arange(256) / 127.5 - 1, atol=1e-7)
    assert (got[0].item(), got[-1].item()) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("offset", "moved"),
    [
        # Less than half a step either way is rounded off.
        (0.49, 0),
        (-0.49, 0),
        # More than half a step is another value.
        (0.51, 1),
        (-0.51, -1),
    ],
)
def test_the_nearest_value_is_taken(offset: float, moved: int) -> None:
    inner = np.arange(1, 255)
    images = torch.from_numpy((inner + offset) / 127.5 - 1).float()
    assert to_uint8(images).tolist() == (inner + moved).tolist()


@pytest.mark.parametrize(
    ("value", "pixel"),
    [
        # A generator's tanh, saturated.
        (-1.0, 0),
        (1.0, 255),
        # Beyond the range: clamped, never wrapped around.
        (-1.01, 0),
        (1.01, 255),
        (-100.0, 0),
        (100.0, 255),
        (float("-inf"), 0),
        (float("inf"), 255),
    ],
)
def test_values_are_clamped(value: float, pixel: int) -> None:
    assert to_uint8(torch.tensor([value])).tolist() == [pixel]


@pytest.mark.parametrize(
    "shape",
    [
        # A batch.
        (2, 3, 4, 4),
        # A batch without an image.
        (0, 3, 4, 4),
        # One pixel.
        (),
    ],
)
def test_shapes_and_dtypes(shape: tuple[int, ...]) -> None:
    pixels = to_uint8(torch.zeros(shape))
    assert (pixels.shape, pixels.dtype) == (shape, torch.uint8)
    images = to_float(pixels)
    assert (images.shape, images.dtype) == (shape, torch.float32)


def test_images_are_floats_however_they_came() -> None:
    assert torch.equal(as_float(ALL), to_float(ALL))
    # A float transport sends what the generator drew: not rounded, not mapped again.
    drawn = torch.tensor([-0.999, 0.1234, 1.0])
    assert torch.equal(as_float(drawn), drawn)


def test_inputs_are_left_alone() -> None:
    images, pixels = torch.linspace(-1, 1, 9), ALL.clone()
    before = images.clone()
    to_uint8(images)
    to_float(pixels).zero_()
    assert torch.equal(images, before) and torch.equal(pixels, ALL)
