"""Idx folders, as MNIST and Fashion-MNIST come: read, resized, and refused where they are damaged."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mekd.data import load
from mekd.data.arrays import DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")
#: Images in the training and in the test part of what is written here.
TRAIN, TEST = 12, 5


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """An idx file of unsigned bytes (kind 8)."""
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_arrays(size: int = 28) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": random.integers(0, 256, (TRAIN, size, size), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(TRAIN) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": random.integers(0, 256, (TEST, size, size), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (9 - np.arange(TEST)).astype(np.uint8),
    }


def write_idx(folder: Path, zipped: bool = False, **replaced: Any) -> Path:
    """The folder of an MNIST-like set; replaced names files by their first word and kind: train_labels."""
    folder.mkdir()
    for name, array in idx_arrays().items():
        short = "_".join(name.split("-")[:2])
        raw = idx(replaced.get(short, array))
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize(
    "zipped",
    [
        # As they are fetched.
        True,
        # As some unpack them.
        False,
    ],
)
def test_idx_folders(tmp_path: Path, name: str, zipped: bool) -> None:
    data = load(name, str(write_idx(tmp_path / "set", zipped)), 28)
    arrays = idx_arrays()
    assert (data.train_images.shape, data.test_images.shape) == ((TRAIN, 1, 28, 28), (TEST, 1, 28, 28))
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    np.testing.assert_array_equal(data.train_images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test_images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert data.train_labels.tolist() == [*range(10), 0, 1]
    assert data.test_labels.tolist() == [9, 8, 7, 6, 5]
    assert data.image == (1, 28, 28)
    assert len(data.classes) == 10
    assert data.classes[9] == {"mnist": "9", "fashion_mnist": "Ankle boot"}[name]


def test_zipped_and_plain_files_may_be_mixed(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "set")
    labels = folder / "train-labels-idx1-ubyte"
    (folder / f"{labels.name}.gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    assert load("mnist", str(folder), 28).train_labels.tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize(
    "size",
    [
        # Smaller: pixels are averaged.
        16,
        # Larger: the size that the paper trains at.
        32,
        # Larger by more than 2.
        64,
    ],
)
def test_images_are_resized(tmp_path: Path, size: int) -> None:
    # Half black, half white, left to right; and three that are gray all over.
    images = np.zeros((TRAIN, 28, 28), np.uint8)
    images[:, :, 14:] = 255
    for i, gray in enumerate((0, 77, 255)):
        images[i] = gray
    data = load("mnist", str(write_idx(tmp_path / "set", train_images=images)), size)
    assert data.train_images.shape == (TRAIN, 1, size, size)
    assert data.test_images.shape == (TEST, 1, size, size)
    assert data.train_images.dtype == torch.uint8
    for i, gray in enumerate((0, 77, 255)):
        assert (data.train_images[i] == gray).all()
    row = data.train_images[3, 0].float()
    # The edge stays in the middle, the same in every row, and darkness stays on the left.
    assert (row == row[0]).all()
    assert (row[0, : size // 2 - 2] == 0).all() and (row[0, size // 2 + 2 :] == 255).all()
    assert row[0].mean().item() == pytest.approx(127.5, abs=1)


def test_halving_the_size_averages_with_a_triangle(tmp_path: Path) -> None:
    # A single white dot: bilinear with antialiasing gives the 4 x 4 pixels around an output pixel the
    # weights 1 3 3 1 (over 8) along each side.
    images = np.zeros((TRAIN, 28, 28), np.uint8)
    images[0, 11, 12] = 255
    data = load("mnist", str(write_idx(tmp_path / "set", train_images=images)), 14)
    along_y = {5: 3 / 8, 6: 1 / 8}
    along_x = {5: 1 / 8, 6: 3 / 8}
    wanted = np.zeros((14, 14))
    for y, wy in along_y.items():
        for x, wx in along_x.items():
            wanted[y, x] = 255 * wx * wy
    np.testing.assert_allclose(data.train_images[0, 0].numpy(), wanted, atol=0.5)


def test_more_images_than_are_resized_at_once_keep_their_order(tmp_path: Path) -> None:
    count = 4100
    images = np.broadcast_to((np.arange(count) % 251).astype(np.uint8)[:, None, None], (count, 2, 2)).copy()
    labels = (np.arange(count) % 10).astype(np.uint8)
    folder = write_idx(tmp_path / "set", train_images=images, train_labels=labels)
    data = load("mnist", str(folder), 4)
    assert data.train_images.shape == (count, 1, 4, 4)
    assert data.train_images.float().mean((1, 2, 3)).tolist() == [i % 251 for i in range(count)]


Damage = Callable[[Path], Any]


def cut(name: str, keep: Callable[[int], int]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / name
        raw = file.read_bytes()
        file.write_bytes(raw[: keep(len(raw))])

    return damage


def change(name: str, at: int, value: int) -> Damage:
    def damage(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[at] = value
        (folder / name).write_bytes(bytes(raw))

    return damage


@pytest.mark.parametrize(
    ("zipped", "damage", "parts"),
    [
        # Not all files were fetched.
        (
            False,
            lambda f: (f / "t10k-labels-idx1-ubyte").unlink(),
            ["t10k-labels-idx1-ubyte", "missing", ".gz"],
        ),
        # The download stopped: pixels are missing, the header, everything.
        (False, cut("train-images-idx3-ubyte", lambda n: n - 1), ["train-images-idx3-ubyte", "truncated"]),
        (False, cut("train-images-idx3-ubyte", lambda n: 10), ["train-images-idx3-ubyte", "no idx file"]),
        (False, cut("train-labels-idx1-ubyte", lambda n: 0), ["train-labels-idx1-ubyte", "no idx file"]),
        # ... in a zipped file.
        (
            True,
            cut("train-images-idx3-ubyte.gz", lambda n: n // 2),
            ["train-images-idx3-ubyte.gz", "cut short"],
        ),
        (
            True,
            cut("train-images-idx3-ubyte.gz", lambda n: n - 1),
            ["train-images-idx3-ubyte.gz", "cut short"],
        ),
        (True, cut("train-images-idx3-ubyte.gz", lambda n: 5), ["train-images-idx3-ubyte.gz", "cut short"]),
        # A web page that says "not found", saved under the name of the file.
        (
            True,
            lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"<html>404</html>"),
            ["train-images-idx3-ubyte.gz", "fetch it again"],
        ),
        (
            False,
            lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"<html>404 Not Found</html>"),
            ["train-images-idx3-ubyte", "no idx file"],
        ),
        # Another type (9 is int8), another number of dimensions, another magic.
        (
            False,
            change("train-images-idx3-ubyte", 2, 9),
            ["train-images-idx3-ubyte", "no idx file", "00 00 09 03"],
        ),
        (
            False,
            change("train-images-idx3-ubyte", 3, 1),
            ["train-images-idx3-ubyte", "no idx file", "00 00 08 01"],
        ),
        (
            False,
            change("train-labels-idx1-ubyte", 0, 7),
            ["train-labels-idx1-ubyte", "no idx file", "07 00 08 01"],
        ),
        # A header that promises more images, and one that promises fewer.
        (False, change("train-images-idx3-ubyte", 7, TRAIN + 1), ["train-images-idx3-ubyte", "truncated"]),
        (False, change("train-images-idx3-ubyte", 7, TRAIN - 1), ["train-images-idx3-ubyte", "promises"]),
        # A bit of a zipped file flipped on the disk: the checksum, and the stream itself.
        (True, change("train-images-idx3-ubyte.gz", -6, 1), ["train-images-idx3-ubyte.gz", "fetch it again"]),
        pytest.param(
            True,
            change("train-images-idx3-ubyte.gz", 10, 0xFF),
            ["train-images-idx3-ubyte.gz", "fetch it again"],
        ),
    ],
)
def test_damaged_idx_files(tmp_path: Path, zipped: bool, damage: Damage, parts: list[str]) -> None:
    folder = write_idx(tmp_path / "set", zipped)
    damage(folder)
    with pytest.raises(DataError) as caught:
        load("mnist", str(folder), 28)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        # A label above the classes.
        ({"train_labels": np.full(TRAIN, 10, np.uint8)}, ["mnist", "train", "10", "10 classes"]),
        ({"t10k_labels": np.full(TEST, 255, np.uint8)}, ["mnist", "test", "255", "10 classes"]),
        # The labels of another set.
        ({"train_labels": np.zeros(TRAIN + 1, np.uint8)}, [f"{TRAIN} train images but {TRAIN + 1} labels"]),
        ({"t10k_labels": np.zeros(TEST - 1, np.uint8)}, [f"{TEST} test images but {TEST - 1} labels"]),
        # Files without an image.
        (
            {"train_images": np.zeros((0, 28, 28), np.uint8), "train_labels": np.zeros(0, np.uint8)},
            ["train", "empty"],
        ),
        # Images without a pixel.
        ({"train_images": np.zeros((TRAIN, 0, 0), np.uint8)}, ["mnist", "train", "no pixel", "(1, 0, 0)"]),
    ],
)
def test_idx_files_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], parts: list[str]) -> None:
    folder = write_idx(tmp_path / "set", **arrays)
    with pytest.raises(DataError) as caught:
        load("mnist", str(folder), 28)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.skipif(
    not FASHION.is_dir(), reason=f"{FASHION} is not there: the real Fashion-MNIST, Debian's dataset-fashion-mnist"
)
def test_the_real_fashion_mnist() -> None:
    data = load("fashion_mnist", str(FASHION), 28)
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.train_labels).tolist() == [6000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
    # The mean of its pixels, as everybody normalises with: 0.2860.
    assert data.train_images.double().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)
