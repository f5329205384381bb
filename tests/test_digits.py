"""scikit-learn's digits, which need no download."""

import numpy as np
import pytest
import torch

from mekd.data import Dataset, load


@pytest.fixture(scope="module")
def digits() -> Dataset:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'mekd[demo]'")
    return load("digits", None, 16)


def test_digits(digits: Dataset) -> None:
    assert digits.train_images.shape == (1437, 1, 16, 16)
    assert digits.test_images.shape == (360, 1, 16, 16)
    assert digits.train_images.dtype == torch.uint8
    assert len(digits.train_labels) == 1437 and len(digits.test_labels) == 360
    # Every digit is in both parts, about as often as every other.
    assert torch.bincount(digits.train_labels).min() > 100
    assert torch.bincount(digits.test_labels).min() > 20
    assert digits.classes == tuple("0123456789")


def test_digits_keep_their_own_pixels_and_labels() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    data = load("digits", None, 8)
    # Pixels from 0 to 16 become 0 to 255; and nothing is lost, doubled or given another's label.
    wanted = sorted(
        (int(label), *np.rint(image.ravel() * 255 / 16).astype(int).tolist())
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    images = torch.cat([data.train_images, data.test_images]).flatten(1).tolist()
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    assert sorted((label, *image) for image, label in zip(images, labels, strict=True)) == wanted


def test_digits_are_split_alike_every_time(digits: Dataset) -> None:
    torch.manual_seed(123)
    np.random.seed(123)
    again = load("digits", None, 16)
    assert torch.equal(again.test_images, digits.test_images)
    assert torch.equal(again.train_labels, digits.train_labels)
