"""Small data sets as tensors: scikit-learn's digits, MNIST-like idx folders, CIFAR's python batches."""

import codecs
import gzip
import io
import math
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.errors import MekdError
from mekd.files import shown
from mekd.seeds import generator_at

#: Bytes of a data set's file, unpacked, at most: Fashion-MNIST's largest is 47 million.
LARGEST = 1 << 30


class DataError(MekdError, ValueError):
    """A data file is missing, damaged, or holds what it must not."""

    def __init__(self, message: object) -> None:
        super().__init__(shown(message))  # names of files may hold anything


@dataclass(frozen=True)
class Dataset:
    """Pixels (n, ch, size, size) uint8 and labels (n,) int64, to train with and to test with."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    @property
    def image(self) -> tuple[int, int, int]:
        """(ch, H, W) of every image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    def to(self, device: torch.device) -> "Dataset":
        """The same data on another device."""
        train, test = self.train_images.to(device), self.test_images.to(device)
        return Dataset(train, self.train_labels.to(device), test, self.test_labels.to(device), self.classes)


def load(name: str, path: str | None, size: int) -> Dataset:
    """The data set called name, resized to size pixels; path is its folder where it is not bundled.

    Raises DataError naming the setting or the file, and what to do.
    """
    if name not in LOADERS:
        raise DataError(f"data.name is {name!r}; it must be one of {', '.join(LOADERS)}")
    if name != "digits":
        if path is None:
            raise DataError(f"data.path is not set; {name} needs the folder of its files: --data.path DIR")
        if not os.path.isdir(path):
            raise DataError(f"data.path is {path!r}; no such folder. Put {name}'s files there or set --data.path DIR")
    train, train_labels, test, test_labels, classes = LOADERS[name](Path(path or "."))
    for part, images, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if len(images) != len(labels):
            raise DataError(f"{name}: {len(images)} {part} images but {len(labels)} labels")
        if len(labels) == 0:
            raise DataError(f"{name}: the {part} part is empty")
        if images.size == 0:
            raise DataError(f"{name}: the {part} images have no pixel, they are of shape {images.shape[1:]}")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(
                f"{name}: {part} labels run from {labels.min()} to {labels.max()}; there are {len(classes)} classes"
            )
    return Dataset(
        _resize(train, size),
        torch.from_numpy(train_labels.astype(np.int64)),
        _resize(test, size),
        torch.from_numpy(test_labels.astype(np.int64)),
        tuple(classes),
    )


def local_images(data: Dataset, fraction: float, seed: int) -> Tensor:
    """The private local images: a random part of the training images, without their labels."""
    count = max(1, round(fraction * len(data.train_images)))
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(seed))
    return data.train_images[order[:count].to(data.train_images.device)]


def kept_apart(count: int, held: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of count private images, in order: those that are left, and as many as audit.holdout takes away.

    DataError where nothing would be left.
    """
    if held >= count:
        raise DataError(
            f"audit.holdout is {held}, and there are {count} private images, of which step 1 needs some: it must be "
            f"smaller than {count}, or 0"
        )
    order = torch.randperm(count, generator=generator_at(seed, "held"))
    return order[held:].sort().values, order[:held].sort().values


def moves(count: int, size: int, flip: bool | None, generator: torch.Generator, shift: bool | None = True) -> Tensor:
    """How each of count images is to be moved (count, 3): down and right, up to an eighth of the size; mirrored or not.

    flip, shift: whether they are mirrored and shifted at all. Draws for a whole batch: its parts are the same in
    however many processes it is dealt out.
    """
    mirrored = torch.rand(count, 1, generator=generator) < (0.5 if flip else 0.0)
    down, right = torch.randint(-(size // 8), size // 8 + 1, (2, count, 1), generator=generator)
    return torch.cat([down, right, mirrored.long()], 1) * torch.tensor([bool(shift), bool(shift), True])


def moved(images: Tensor, how: Tensor) -> Tensor:
    """Each image (m, ch, S, S) as its row of moves (m, 3) says, edges repeated."""
    m, _, size, _ = images.shape
    down, right, mirrored = how.to(images.device)[:, :, None].unbind(1)
    span = torch.arange(size, device=images.device)
    rows = (down + span).clamp_(0, size - 1)[:, :, None]
    columns = (right + torch.where(mirrored > 0, span.flip(0), span)).clamp_(0, size - 1)[:, None, :]
    return images[torch.arange(m, device=images.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]


def _resize(images: np.ndarray, size: int) -> Tensor:
    """uint8 (n, ch, h, w) to uint8 (n, ch, size, size), bilinear and antialiased, in slices."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if pixels.shape[-2:] == (size, size):
        return pixels
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for part in pixels.split(4096)
    ]
    return torch.cat(parts)


def _digits(path: Path) -> Arrays:
    """8 x 8 digits of scikit-learn; every fifth image of a fixed shuffle is for testing, wherever it runs."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("data.name 'digits' needs scikit-learn: pip install 'mekd[demo]'") from error
    bunch = load_digits()
    images = np.rint(bunch.images[:, None] * (255 / 16)).astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(images))
    test, train = order[:360], order[360:]
    return images[train], bunch.target[train], images[test], bunch.target[test], [str(d) for d in range(10)]


def _read(path: Path) -> bytes:
    """A file of that name, or gzipped with .gz behind it."""
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            try:
                if candidate.suffix != ".gz":
                    return candidate.read_bytes()
                with gzip.open(candidate) as file:
                    raw = file.read(LARGEST + 1)  # a small file can unpack to any size
                if len(raw) > LARGEST:
                    raise OSError(f"it unpacks to more than {LARGEST:,} bytes, and no data set here does")
                return raw
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{candidate} cannot be read ({error}); it may be cut short: fetch it again") from error
    raise DataError(f"{path} is missing, and so is {path.name}.gz; data.path must hold it")


def _idx(path: Path, dims: int) -> np.ndarray:
    """An idx file: two zero bytes, type 8 (uint8), the number of dimensions, their sizes, the data."""
    raw = _read(path)
    if len(raw) < 4 + 4 * dims or raw[:4] != bytes([0, 0, 8, dims]):
        raise DataError(f"{path} is no idx file of uint8 in {dims} dimension(s): it begins with {raw[:4].hex(' ')}")
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    body = raw[4 + 4 * dims :]
    if len(body) != math.prod(shape):
        raise DataError(f"{path} is truncated: {len(body)} bytes of data where its header promises {math.prod(shape)}")
    return np.frombuffer(body, np.uint8).reshape(shape).copy()


def _mnist(path: Path) -> Arrays:
    def part(prefix: str) -> tuple[np.ndarray, np.ndarray]:
        return _idx(path / f"{prefix}-images-idx3-ubyte", 3)[:, None], _idx(path / f"{prefix}-labels-idx1-ubyte", 1)

    (train, train_labels), (test, test_labels) = part("train"), part("t10k")
    return train, train_labels, test, test_labels, [str(d) for d in range(10)]


def _fashion(path: Path) -> Arrays:
    *arrays, _ = _mnist(path)
    names = [
        "T-shirt",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ]
    return arrays[0], arrays[1], arrays[2], arrays[3], names


def _array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """What numpy's pickles begin with, whatever they say: the numbers come after it, as many as the file has."""
    return np.empty(0, np.uint8)


#: All that a pickle of CIFAR's may call, under the names that numpy 1 and numpy 2 give it. The class of arrays is no
#: class here: called with a shape it would take any memory.
_CALLABLES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles CIFAR's dictionaries of numpy arrays and refuses everything else a pickle could run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CALLABLES:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return _CALLABLES[module, name]  # nothing is imported by a name that the file gives


def _batch(path: Path) -> dict[bytes, Any]:
    if not path.is_file():
        raise DataError(f"{path} is missing; data.path must hold CIFAR's python version, unpacked")
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:
        raise DataError(f"{path} is no CIFAR batch ({error}); it may be cut short: fetch it again") from error
    return content


def _cifar(path: Path, train: list[str], test: str, meta: str, label: bytes, names: bytes) -> Arrays:
    def part(files: list[str]) -> tuple[np.ndarray, np.ndarray]:
        batches = [_batch(path / file) for file in files]
        try:
            images = np.concatenate([b[b"data"] for b in batches]).astype(np.uint8).reshape(-1, 3, 32, 32)
            return images, np.concatenate([np.asarray(b[label], np.int64) for b in batches])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: {', '.join(files)} are no CIFAR batches of {label.decode()} ({error})") from error

    (images, labels), (test_images, test_labels) = part(train), part([test])
    try:
        classes = [name.decode() for name in _batch(path / meta)[names]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path / meta} does not list {names.decode()} ({error!r})") from error
    return images, labels, test_images, test_labels, classes


def _cifar10(path: Path) -> Arrays:
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    return _cifar(path, batches, "test_batch", "batches.meta", b"labels", b"label_names")


def _cifar100(path: Path) -> Arrays:
    return _cifar(path, ["train"], "test", "meta", b"fine_labels", b"fine_label_names")


LOADERS: dict[str, Callable[[Path], Arrays]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion_mnist": _fashion,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
}
